"""Modules on disk that come in two halves, one for a UNet's decoder and one for a VAE's, either of which may miss:
one file of the pack's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from ..checkpoints.module_file import fill, read_module, write_module
from ..errors import CheckpointError, SettingError

HALVES = ("unet", "vae")


class Half(Protocol):
    """A module whose `shape`, a dataclass with a `backbone` and `widths` by level, says how to build it again."""

    @property
    def shape(self) -> Any: ...


H = TypeVar("H", bound=Half)


def check_half(name: str, half: Half, backbone: str, widths: Mapping[str, int]) -> None:
    """Raises SettingError unless a model is of the backbone that a half, which people call `name`, was made for, and
    its `widths` by level are its own."""
    shape = half.shape
    if backbone != shape.backbone:
        raise SettingError(
            f"{name} is made for backbone {shape.backbone}, this model is {backbone}: give the model it was trained on"
        )
    if any(widths.get(level) != width for level, width in shape.widths.items()):
        raise SettingError(
            f"{name} is made for levels {dict(shape.widths)}, this model has {dict(widths)}: give the model it was"
            " trained on"
        )


def level_of(name: str, half: Half, levels: nn.ModuleDict, level: str, features: Tensor | None = None) -> nn.Module:
    """The module of one level of a half, which people call `name`. Raises SettingError for an unknown level, and for
    features `(n, c, h, w)` of another width than it takes."""
    widths = half.shape.widths
    if level not in widths:
        raise SettingError(f"unknown {name} level {level!r}: this one has {', '.join(widths)}; give it one of these")
    if features is not None and features.shape[1] != widths[level]:
        raise SettingError(
            f"{name}'s {level} takes {widths[level]} channels, these features have {features.shape[1]}: expected the"
            f" backbone {half.shape.backbone} it was made for; use one of this model"
        )
    return levels[key_of(level)]


def key_of(level: str) -> str:
    """A level's name as a module's, which may hold no dot."""
    return level.replace(".", "_")


def read_halves(
    file: Path, kind: str, name: str, build: Callable[[Mapping[str, Any]], H], device: torch.device | str = "cpu"
) -> dict[str, H]:
    """The halves of a file of `kind`, which people call `name`, float32, by half; `build` makes one of its
    configuration. Raises CheckpointError for a file that is missing, damaged or of another kind, or holds no half."""
    stored = read_module(file, kind)
    try:
        halves = {half: _built(half, config, build) for half, config in stored.config.items()}
    except (TypeError, KeyError, ValueError, AttributeError, RuntimeError, SettingError) as error:
        raise CheckpointError(f"{file}: its configuration {stored.config} is no {name}'s; get it again") from error
    if not halves:
        raise CheckpointError(f"{file}: holds neither a UNet's nor a VAE's {name}; get it again")
    modules = nn.ModuleDict({half: cast(nn.Module, module) for half, module in halves.items()})
    fill(file, modules, kind, stored.tensors)
    modules.to(device).eval().requires_grad_(False)
    return halves


def write_halves(path: Path, kind: str, halves: Mapping[str, Half], trained_on: str) -> None:
    """Writes a file that `read_halves` reads, float16. Raises CheckpointError."""
    tensors = nn.ModuleDict({name: cast(nn.Module, half) for name, half in halves.items()}).state_dict()
    write_module(path, kind, {name: asdict(half.shape) for name, half in halves.items()}, tensors, trained_on)


def _built(half: str, config: Mapping[str, Any], build: Callable[[Mapping[str, Any]], H]) -> H:
    if half not in HALVES or not str(config["backbone"]).endswith(f"-{half}"):
        raise ValueError(half)
    return build(config)
