"""The pack's own modules on disk: one safetensors file each, its configuration as JSON in the metadata.

`vsr.kind` says which module it is, `vsr.version` the layout, `vsr.config` the arguments of its class,
`vsr.trained_on` the data and its licences.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .safefile import json_object, open_safely, refuse_differences, write_whole

VERSION = "1"


@dataclass(frozen=True)
class ModuleFile:
    """What a module's file holds, float32 on the CPU."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    trained_on: str


def read_module(path: Path, kind: str) -> ModuleFile:
    """The module of `kind` at `path`.

    Raises CheckpointError for a file that is missing, damaged, a pickle, of another kind or of a newer version.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give lite, or the .safetensors of a {kind}")
    with open_safely(path) as source:
        found = source.metadata.get("vsr.kind")
        if found != kind:
            raise CheckpointError(f"{path}: weights of kind {found!r}, expected kind {kind!r}; give a {kind}'s file")
        if (version := source.metadata.get("vsr.version")) != VERSION:
            raise CheckpointError(f"{path}: vsr.version {version!r}, expected {VERSION!r}; update this pack")
        config = json_object(source.metadata.get("vsr.config", ""))
        if config is None:
            raise CheckpointError(f"{path}: its vsr.config metadata is no JSON object; get the file again")
        tensors = {key: source.tensor(key, torch.float32) for key in source.shapes}
        return ModuleFile(config, tensors, source.metadata.get("vsr.trained_on", ""))


def write_module(
    path: Path,
    kind: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    trained_on: str,
    dtype: torch.dtype = torch.float16,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Writes a module's file as `dtype` (whole numbers stay), whole or not at all; `notes` join its metadata. Raises
    CheckpointError."""
    stored = {
        key: (value.to(dtype) if value.is_floating_point() else value).detach().cpu().contiguous()
        for key, value in tensors.items()
    }
    metadata = {
        "format": "pt",
        "vsr.kind": kind,
        "vsr.version": VERSION,
        "vsr.config": json.dumps(dict(config), sort_keys=True),
        "vsr.trained_on": trained_on,
        **(notes or {}),
    }
    write_whole(path, stored, metadata)


def fill(path: Path, module: torch.nn.Module, kind: str, tensors: Mapping[str, Tensor]) -> None:
    """Gives `module` its tensors. Raises CheckpointError naming what is missing, unknown or of another shape."""
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    refuse_differences(path, kind, expected, {key: tuple(value.shape) for key, value in tensors.items()})
    # A matrix may stand for a 1x1 convolution.
    module.load_state_dict({key: value.reshape(expected[key]) for key, value in tensors.items()})
