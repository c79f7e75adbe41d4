"""The low-resolution video at the result's size: what diffusion is conditioned on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SettingError
from .resize import resize
from .video_tensor import empty_video

#: Frames that are enlarged together.
CHUNK = 4
LARGEST = 16384


@dataclass(frozen=True)
class Restorer:
    """An upscale model of factor 1: it cleans pictures that are enlarged already, as DiffBIR's SwinIRs do."""

    run: Callable[[Tensor], Tensor]

    def __call__(self, frames: Tensor) -> Tensor:
        return self.run(frames)


def of_factor(run: Callable[[Tensor], Tensor], factor: float) -> Callable[[Tensor], Tensor]:
    """An upscale model as `upscale_frames` takes it: a Restorer where it enlarges nothing."""
    return Restorer(run) if factor == 1 else run


def target_size(size: tuple[int, int], scale: float = 4.0, width: int = 0, height: int = 0) -> tuple[int, int]:
    """Height and width of the result in pixels, of a video of `size`.

    A width or height of 0 follows from the other in proportion; both 0: `scale` decides. Raises SettingError.
    """
    if width < 0 or height < 0 or (not width and not height and not scale > 0):
        raise SettingError(
            f"size is {width}x{height} at scale {scale}: expected positive numbers (0 leaves a side to the other)"
        )
    if width and height:
        wanted = (height, width)
    elif width or height:
        ratio = width / size[1] if width else height / size[0]
        wanted = (height or round(size[0] * ratio), width or round(size[1] * ratio))
    else:
        wanted = (round(size[0] * scale), round(size[1] * scale))
    if not 1 <= min(wanted) <= max(wanted) <= LARGEST:
        raise SettingError(
            f"{size[1]}x{size[0]} would become {wanted[1]}x{wanted[0]} (width x height): expected 1 to {LARGEST} pixels"
            " a side; change the scale or the size"
        )
    return wanted


def upscale_frames(
    frames: Tensor,
    size: tuple[int, int],
    method: str = "bicubic",
    upscale_fn: Callable[[Tensor], Tensor] | None = None,
    tick: Callable[[int], None] = lambda done: None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`(n, 3, h, w)` in [0, 1] at exactly `size` = (height, width), a few frames at a time, in the frames' precision or
    in `dtype`.

    `upscale_fn`, an upscale model, goes first, a Restorer last; `method` (a name in RESIZE) does the rest. `tick` is
    told of frames done. Raises SettingError.
    """
    out = empty_video(frames, frames.shape[0], size, dtype)
    for first in range(0, frames.shape[0], CHUNK):
        part = frames[first : first + CHUNK]
        if isinstance(upscale_fn, Restorer):
            part = resize(method, part.to(out), size).clamp(0, 1)
        larger = part if upscale_fn is None else upscale_fn(part)
        out[first : first + CHUNK] = resize(method, larger.to(frames), size).clamp(0, 1)
        tick(part.shape[0])
    return out
