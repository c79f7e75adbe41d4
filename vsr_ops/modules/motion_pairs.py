"""A frame and the next: the flow between them, and a scene's frames as they come, each with its flow onward."""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from ..flow.raft import Estimator
from ..flow.warp import SMALLEST, dis_flow, visibility


class Pairs(NamedTuple):
    """Between each frame and the next: the flow there and back `(n, 2, h, w)` in pixels, and what of the first the
    second shows and the other way round `(n, 1, h, w)`, 1 or 0."""

    forward: Tensor
    backward: Tensor
    seen_after: Tensor
    seen_before: Tensor

    @classmethod
    def of(cls, now: Tensor, after: Tensor, estimate: Estimator = dis_flow) -> Pairs:
        """Of frames `(n, 3, h, w)` in [0, 1] and those after them. Frames too small for a flow stand still."""
        if min(now.shape[-2:]) < SMALLEST:
            still = now.new_zeros(len(now), 2, *now.shape[-2:])
            return cls.along(still, still)
        return cls.along(*estimate(torch.cat([now, after]), torch.cat([after, now])).chunk(2))

    @classmethod
    def along(cls, forward: Tensor, backward: Tensor) -> Pairs:
        """Of the flow alone."""
        return cls(forward, backward, visibility(forward, backward), visibility(backward, forward))

    def at(self, number: int, frames: int) -> Pairs:
        """Of clips of so many frames one after the other: the pair of this number in each."""
        return Pairs(*(clips_of(each, frames - 1)[:, number] for each in self))


class Felt(NamedTuple):
    """A frame's features `(n, c, h, w)`, and its flow to the next one; None at the scene's end."""

    x: Tensor
    onward: Pairs | None


def clips_of(x: Tensor, frames: int) -> Tensor:
    """Frames `(n, ...)` of clips one after the other as `(clips, frames, ...)`."""
    return rearrange(x, "(b t) c h w -> b t c h w", t=frames)
