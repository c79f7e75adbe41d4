"""Noise by frame: what a frame gets follows from the seed and the frame's number in its source, and from nothing else.

So any cut of a video, in any segments and on any machine, starts from the same noise frame by frame.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_WORD = (1 << 64) - 1


def _mixed(*numbers: int) -> int:
    """A 64-bit seed of whole numbers, each of which changes all of it: splitmix64's finish over their running sum, so
    that neighbouring seeds and frames have nothing to do with each other."""
    state = 0
    for number in numbers:
        state = (state + (number & _WORD) + 0x9E3779B97F4A7C15) & _WORD
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _WORD
        state ^= state >> 31
    return state


def frame_noise(frames: Sequence[int], shape: Sequence[int], seed: int, stream: int = 0) -> Tensor:
    """Noise of deviation 1 `(len(frames), *shape)`, float32 on the CPU, of the frames with these numbers in their
    source: one CPU generator each. `stream` tells draws of one frame apart: 0 is what a run starts from, i + 1 what a
    sampler adds at step i."""
    out = torch.empty(len(frames), *shape)
    for place, frame in zip(out, frames, strict=True):
        generator = torch.Generator().manual_seed(_mixed(seed, frame, stream))
        torch.randn(tuple(shape), generator=generator, out=place)
    return out
