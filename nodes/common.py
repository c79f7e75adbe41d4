"""What nodes share: pictures in and out of the pack's layout, choices that are checked, inputs used by several."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from comfy_api.latest import io
from einops import rearrange
from torch import Tensor

from ..vsr_ops.errors import SettingError
from ..vsr_ops.sampling.interval import ALL_NOISE
from ..vsr_ops.sampling.layers import LAYERS
from . import host

CATEGORY = "VSR"
#: What goes from Load Refiner to Refine.
REFINER = io.Custom("VSR_REFINER")
#: From Load Video Upscaler to what enlarges.
VIDEO_UPSCALER = io.Custom("VSR_VIDEO_UPSCALER")
#: The VAE's half of a SATeCo, to Decode Video.
SATECO = io.Custom("VSR_SATECO")
#: How far resizing may leave an IMAGE outside [0, 1]; beyond, it is not one: [-1, 1], [0, 255], light without a limit.
OVERSHOOT = 0.5


def to_frames(image: Tensor, name: str = "image") -> Tensor:
    """`(frames, 3, height, width)` float32 in [0, 1] of an IMAGE: a view where it is that already, whatever the host's
    choice for what goes between nodes. What resizing leaves a little outside is clamped, as every output node does.
    Raises SettingError for an empty or not RGB one, for NaN, and for values that are no picture's."""
    if image.ndim != 4 or image.numel() == 0:
        raise SettingError(
            f"{name} is empty (shape {tuple(image.shape)}): expected at least one frame; check its source"
        )
    if image.shape[-1] != 3:
        raise SettingError(
            f"{name} has {image.shape[-1]} channels: expected 3 (RGB); take its alpha off with Split Image with Alpha"
        )
    # Of the picture as it lies in memory: of another order, torch would make a copy.
    low, high = (float(end) for end in torch.aminmax(image))
    # So written that NaN, which is on neither side, is refused.
    if not (low >= -OVERSHOOT and high <= 1 + OVERSHOOT):
        raise SettingError(
            f"{name} holds values from {low:.3g} to {high:.3g}: expected 0 to 1; check the node that made it, and"
            " tone-map high dynamic range first"
        )
    frames = rearrange(image, "t h w c -> t c h w").float()
    return frames if low >= 0 and high <= 1 else frames.clamp(0, 1)


def to_image(frames: Tensor) -> Tensor:
    """The IMAGE of `(frames, 3, height, width)`, in the precision that the host hands on between nodes: a view where
    its memory has the channels last (`empty_video`)."""
    return rearrange(frames, "t c h w -> t h w c").to(host.intermediate_dtype()).contiguous()


def check_choice(name: str, value: str, options: Iterable[str]) -> str:
    """`value` itself; raises SettingError for one that is not among the options: the host does not check combos."""
    known = list(options)
    if value not in known:
        raise SettingError(f"{name} is {value!r}: expected one of {', '.join(known)}; choose one from the list")
    return value


def choice(id: str, options: Iterable[str], default: str, tooltip: str, **rest: Any) -> Any:
    """A dropdown."""
    return io.Combo.Input(id, options=list(options), default=default, tooltip=tooltip, **rest)


def number(id: str, default: float, low: float, high: float, tooltip: str, step: float = 0.01, **rest: Any) -> Any:
    """A decimal widget."""
    return io.Float.Input(id, default=default, min=low, max=high, step=step, tooltip=tooltip, **rest)


def count(id: str, default: int, low: int, high: int, tooltip: str, step: int = 1, **rest: Any) -> Any:
    """A whole-number widget."""
    return io.Int.Input(id, default=default, min=low, max=high, step=step, tooltip=tooltip, **rest)


def node_defaults(node: type[io.ComfyNode]) -> dict[str, Any]:
    """The values that a node's widgets begin with, by name."""
    inputs = node.define_schema().inputs
    return {each.id: each.default for each in inputs if getattr(each, "default", None) is not None}


def interval_inputs() -> list[Any]:
    """Where a guidance acts: the last widgets of the nodes that guide. At their defaults it acts everywhere."""
    return [
        number(
            "sigma_min", 0.0, 0.0, ALL_NOISE, "Guided where the noise level (sigma) is no lower; 0: to the end.",
            step=0.001, optional=True,
        ),
        number(
            "sigma_max", ALL_NOISE, 0.0, ALL_NOISE, "Guided where the noise level is no higher; 10000: from the start.",
            step=0.001, optional=True,
        ),
        count(
            "every", 1, 1, 1000, "Its passes are spent at every n-th step; those between add what it found there.",
            optional=True,
        ),
    ]  # fmt: skip


def layers_input(default: str, **rest: Any) -> Any:
    """Which layers a method acts in."""
    return choice(
        "layers",
        LAYERS,
        default,
        "Spatial self-attention layers it acts in: the first two and last two (ends, the DC-VSR paper's), the middle"
        " block (PAG's and SAG's), or others to experiment with.",
        **rest,
    )
