"""Videos as tensors `(frames, c, h, w)` whose memory has the channels last, as hosts hand pictures on."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_video(like: Tensor, frames: int, size: tuple[int, int], dtype: torch.dtype | None = None) -> Tensor:
    """`(frames, c, *size)` with the channels, device and precision (or `dtype`) of `like` `(..., c, h, w)`, not filled.

    Turned to `(frames, h, w, c)` it is contiguous: handing it on takes no copy.
    """
    shape, dtype = (frames, like.shape[-3], *size), dtype or like.dtype
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=torch.channels_last)
