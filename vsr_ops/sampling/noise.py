"""Noise that belongs to a frame of the source: any cut of a video gets the same, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_WORD = (1 << 64) - 1


def frame_noise(frames: Sequence[int], shape: Sequence[int], seed: int, stream: int = 0) -> Tensor:
    """Standard normal noise `(len(frames), *shape)` float32 on the CPU; `frames` are numbers in the source, `shape` is
    (c, h, w).

    Each frame draws from a generator of its own, of (seed, frame, stream): stream 0 is the noise a run begins with, i+1
    that of its step i.
    """
    out = torch.empty(len(frames), *shape)
    generator = torch.Generator()
    for noise, frame in zip(out, frames, strict=True):
        torch.randn(shape, generator=generator.manual_seed(_mixed(seed, frame, stream)), out=noise)
    return out


def _mixed(*numbers: int) -> int:
    """64 bits in which each of the numbers and their order tell: SplitMix64 (Steele et al., OOPSLA 2014), chained."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _WORD
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _WORD
        state ^= state >> 31
    return state
