"""What the frames before and after a frame show of it, along the optical flow: for a refiner that follows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..flow.warp import SMALLEST, dis_flow, visibility, warp

Pair = tuple[Tensor, Tensor]
"""A frame decoded and the same frame upscaled, `(3, h, w)` each."""


def neighbours(video: Tensor) -> Tensor:
    """What the frames before and after each frame of one scene `(frames, 3, h, w)` add to it: `(frames, 6, h, w)`.

    Both are brought onto the frame along DIS flow, and the frame is taken away; 0 where they do not show what it shows,
    at the scene's ends, and for frames too small for a flow.
    """
    changes, nothing = between(video), video.new_zeros(1, 3, *video.shape[-2:])
    return torch.cat([torch.cat([nothing, changes[:, :3]]), torch.cat([changes[:, 3:], nothing])], 1)


def followed(chunks: Iterable[tuple[list[Pair], bool]]) -> Iterator[tuple[list[Pair], Tensor, bool]]:
    """One scene's chunks, of which the last is marked, with `neighbours` of their upscaled frames: one frame later, as
    the frame after each must be seen. The flow between two frames is estimated once."""
    held: list[Pair] = []
    before: Tensor | None = None
    for new, last in chunks:
        held += new
        video = torch.stack([upscaled for _, upscaled in held])
        nothing, changes = video.new_zeros(1, 3, *video.shape[-2:]), between(video)
        before = torch.cat([nothing if before is None else before, changes[:, :3]])
        behind = torch.cat([changes[:, 3:], nothing]) if last else changes[:, 3:]
        count = len(behind)
        if count:
            yield held[:count], torch.cat([before[:count], behind], 1), last
        held, before = held[count:], before[count:]


def between(video: Tensor) -> Tensor:
    """Of frames `(n, 3, h, w)` and those after them, `(n - 1, 6, h, w)`: what the first adds to the second, and what
    the second adds to the first."""
    if video.shape[0] < 2 or min(video.shape[-2:]) < 2 * SMALLEST:
        return video.new_zeros(max(video.shape[0] - 1, 0), 6, *video.shape[-2:])
    now, after = video[:-1].float(), video[1:].float()
    forward, backward = flow_by_halves(now, after)
    to_after = (warp(now, backward) - after) * visibility(backward, forward)
    to_now = (warp(after, forward) - now) * visibility(forward, backward)
    return torch.cat([to_after, to_now], 1).to(video.dtype)


def flow_by_halves(now: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """DIS flow `(n, 2, h, w)` there and back between frames `(n, 3, h, w)` of at least 24 pixels a side, estimated on
    halved frames: a fifth of the time."""
    height, width = now.shape[-2:]
    odd = (0, width % 2, 0, height % 2)
    start, end = (F.avg_pool2d(F.pad(frames, odd, mode="replicate"), 2) for frames in (now, after))
    flow = dis_flow(torch.cat([start, end]), torch.cat([end, start]))
    whole = 2 * F.interpolate(flow, scale_factor=2, mode="bilinear", align_corners=False)
    forward, backward = whole[..., :height, :width].chunk(2)
    return forward, backward
