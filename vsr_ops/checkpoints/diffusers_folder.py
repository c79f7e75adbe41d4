"""A model in diffusers' folder: its configuration and the files of its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import CheckpointError
from .safefile import PICKLE, PICKLE_SUFFIXES, Source, json_object, refuse_differences
from .svd_parts import Part

# What the libraries note in a configuration beside their classes' arguments: transformers, and diffusers' EMAModel,
# which writes its own settings among those of the model that it averages.
_BOOKKEEPING = {
    *("architectures", "model_type", "torch_dtype", "dtype", "transformers_version"),
    *("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power"),
}
# Buffers that older transformers stored with the weights; they are rebuilt from the configuration.
_REBUILT = {"vision_model.embeddings.position_ids", "embeddings.position_ids"}
# What diffusers called the projections of a VAE's attention when Stable Diffusion was published.
_ONCE = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def folder_config(folder: Path, part: Part, advice: str) -> dict[str, Any]:
    """The configuration of a model in its folder. Raises CheckpointError, ending with `advice`, for no such
    model."""
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file, expected in a diffusers folder; {advice}")
    config = json_object(file.read_text(encoding="utf-8", errors="replace"))
    if config is None:
        raise CheckpointError(f"{file}: not a JSON object, expected the configuration of a model; copy it again")
    name: Any = config.get("_class_name") or ", ".join(config.get("architectures") or [])
    if name != part.class_name:
        raise CheckpointError(f"{file}: a '{name}', expected a '{part.class_name}'; {advice}")
    return config_kwargs(config)


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors files of a model: full precision before fp16, one file before shards. Raises
    CheckpointError."""
    for single, index in (
        (f"{stem}.safetensors", f"{stem}.safetensors.index.json"),
        (f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.fp16.json"),
    ):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            return shards(folder / index)
    if pickles := sorted(f.name for f in folder.iterdir() if f.suffix in PICKLE_SUFFIXES):
        raise CheckpointError(f"{folder / pickles[0]}: {PICKLE}")
    raise CheckpointError(f"{folder}: no weights, expected {stem}.safetensors (or .fp16, or shards); copy it again")


def shards(index: Path) -> list[Path]:
    """The files that an index names, beside it. Raises CheckpointError for one that names none, or any elsewhere."""
    content = json_object(index.read_text(encoding="utf-8", errors="replace")) or {}
    map_: Any = content.get("weight_map")
    names = {str(name) for name in cast("dict[str, Any]", map_).values()} if isinstance(map_, dict) else set[str]()
    if not names or any(Path(name).name != name for name in names):
        raise CheckpointError(f"{index}: no usable weight_map, expected file names; copy it again")
    return [index.parent / name for name in sorted(names)]


def config_kwargs(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments out of a stored configuration: bookkeeping left out, lists as tuples."""
    kept = {k: v for k, v in config.items() if not k.startswith("_") and k not in _BOOKKEEPING}
    return {k: tuple(cast("list[Any]", v)) if isinstance(v, list) else v for k, v in kept.items()}


def with_current_names(source: Source) -> Source:
    """A file of diffusers' VAE under the names that diffusers has now."""

    def current(key: str) -> str:
        return re.sub(r"(\.attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{_ONCE[m[2]]}.", key)

    stored = {current(key): key for key in source.shapes}
    shapes = {new: source.shapes[old] for new, old in stored.items()}
    return Source(source.path, source.metadata, shapes, lambda key: source.get(stored[key]))


def read_named(
    sources: list[Source],
    part: Part,
    state: Mapping[str, Tensor],
    dtype: torch.dtype,
    path: Path,
    prefix: str = "",
) -> dict[str, Tensor]:
    """A model stored under its own library's names, over one or several files, tensor by tensor as `dtype`. Raises
    CheckpointError for tensors that are not those of `state`, or not finite."""
    owners = named_tensors(sources, part, state, path, prefix)
    return {key: owners[key].tensor(prefix + key, dtype) for key in state}


def named_tensors(
    sources: list[Source], part: Part, state: Mapping[str, Tensor], path: Path, prefix: str = ""
) -> dict[str, Source]:
    """Which file holds each tensor of such a model. Raises CheckpointError for others than those of `state`."""
    owners = {key[len(prefix) :]: source for source in sources for key in source.shapes if key.startswith(prefix)}
    found = {key: source.shapes[prefix + key] for key, source in owners.items() if key not in _REBUILT}
    refuse_differences(path, part.name, {key: tuple(tensor.shape) for key, tensor in state.items()}, found)
    return owners
