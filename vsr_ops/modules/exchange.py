"""Features that every frame exchanges with the frames before and after it, along the optical flow, several times: after
n exchanges a frame has heard of n on each side. Both directions are alike: a clip played backwards gives the result
played backwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..flow.warp import warp
from .blocks import ResidualBlock
from .motion_pairs import Felt, Pairs, clips_of

#: The slope of what is heard below zero.
SLOPE = 0.1


class Exchange(nn.Module):
    """Every frame hears what its two neighbours hold where the flow leads."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.own = nn.Conv2d(width, width, 3, padding=1)
        self.other = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.visible = nn.Parameter(torch.zeros(width, 1, 1))
        self.body = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))

    def heard(self, own: Tensor, other: Tensor, flow: Tensor, seen: Tensor) -> Tensor:
        """What frames `own` hear of the neighbours `other`, to which `flow` leads, where `seen` there or not."""
        return F.leaky_relu(own + warp(other, flow) + self.visible * seen.to(own.dtype), SLOPE)

    def forward(self, x: Tensor, pairs: Pairs) -> Tensor:
        """Features `(clips, frames, c, h, w)` of whole scenes; the `pairs` of all clips, one after the other."""
        flat, frames = x.flatten(0, 1), x.shape[1]
        if frames > 1:
            own, other = (clips_of(conv(flat), frames) for conv in (self.own, self.other))
            forward, backward, seen_after, seen_before = pairs
            of_after = self.heard(own[:, :-1].flatten(0, 1), other[:, 1:].flatten(0, 1), forward, seen_after)
            of_before = self.heard(own[:, 1:].flatten(0, 1), other[:, :-1].flatten(0, 1), backward, seen_before)
            nothing = torch.zeros_like(x[:, :1])
            sides = [clips_of(each, frames - 1) for each in (of_before, of_after)]
            flat = flat + (torch.cat([nothing, sides[0]], 1) + torch.cat([sides[1], nothing], 1)).flatten(0, 1)
        return clips_of(self.body(flat), frames)


def exchanged(stages: Iterable[nn.Module], x: Tensor, pairs: Pairs) -> Tensor:
    """All exchanges over whole clips `(clips, frames, c, h, w)`."""
    for stage in stages:
        x = stage(x, pairs)
    return x


def exchanged_one_by_one(stages: Iterable[nn.Module], felt: Iterator[Felt]) -> Iterator[Tensor]:
    """The same over a scene's frames as they come."""
    for stage in stages:
        felt = _exchanged(cast(Exchange, stage), felt)
    return (x for x, _ in felt)


def _exchanged(stage: Exchange, felt: Iterator[Felt]) -> Iterator[Felt]:
    """A stage over a scene's frames: each is given out when the one after it is known."""
    heard: Tensor | None = None  # by the frame under way, of the one before
    before: tuple[Felt, Tensor, Tensor] | None = None
    for now in felt:
        own, other = stage.own(now.x), stage.other(now.x)
        heard_next: Tensor | None = None
        if before is not None and (pairs := before[0].onward) is not None:
            of_after = stage.heard(before[1], other, pairs.forward, pairs.seen_after)
            heard_next = stage.heard(own, before[2], pairs.backward, pairs.seen_before)
            yield Felt(stage.body(before[0].x + (of_after if heard is None else heard + of_after)), pairs)
        heard, before = heard_next, (now, own, other)
    if before is not None:
        x = before[0].x
        yield Felt(stage.body(x if heard is None else x + heard), None)
