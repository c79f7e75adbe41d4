"""Attention of a frame to windows of the frames around it (VRT's temporal mutual self attention, TMSA), as SATeCo's
upscaler has it.

Queries are a frame's, in windows of 8x8 pixels that every second layer shifts by half. Keys and values are those of the
same window, and of what the frames around held at the start, in a window that the mean optical flow displaces by whole
pixels: nothing is resampled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..errors import SettingError
from ..flow.warp import warp
from ..sampling.attention import in_chunks
from .motion_pairs import Felt, Pairs
from .tubelets import TOGETHER
from .windows import WINDOW, FeedForward


class Seen(NamedTuple):
    """Of frames, each one's neighbour at some distance: features `(n, h, w, c)`, and the flow that leads there `(n, 2,
    h, w)` in pixels."""

    features: Tensor
    flow: Tensor


class Windows(NamedTuple):
    """A frame's pixels cut into windows: rows and columns `(windows, 64)`, and which of these are in the frame."""

    rows: Tensor
    cols: Tensor
    inside: Tensor
    down: int
    across: int

    @classmethod
    def of(cls, height: int, width: int, shift: int, device: torch.device) -> Windows:
        """Of windows that begin `shift` pixels before the frame."""
        rows, cols = (
            torch.arange(-(-(side + shift) // WINDOW) * WINDOW, device=device) - shift for side in (height, width)
        )
        y, x = (
            rearrange(each, "(y i) (x j) -> (y x) (i j)", i=WINDOW, j=WINDOW)
            for each in torch.meshgrid(rows, cols, indexing="ij")
        )
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        return cls(y, x, inside, len(rows) // WINDOW, len(cols) // WINDOW)

    def displaced(self, flow: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and columns `(n, windows, 64)` where the mean of the flow `(n, 2, h, w)` over each window leads."""
        height, width = flow.shape[-2:]
        at = self.rows.clamp(0, height - 1) * width + self.cols.clamp(0, width - 1)
        within = flow.flatten(2)[:, :, at] * self.inside
        mean = (within.sum(-1) / self.inside.sum(-1).clamp(min=1)).round().long()
        return self.rows + mean[:, 1, :, None], self.cols + mean[:, 0, :, None]

    def joined(self, x: Tensor, height: int, width: int) -> Tensor:
        """Frames `(n, h, w, c)` of windows `(n, windows, 64, c)`."""
        whole = rearrange(x, "n (y x) (i j) c -> n (y i) (x j) c", y=self.down, i=WINDOW)
        top, left = -int(self.rows[0, 0]), -int(self.cols[0, 0])
        return whole[:, top : top + height, left : left + width]


def taken(x: Tensor, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
    """Of frames `(n, h, w, c)` the pixels at these places `(n, windows, 64)`, and which of them there are."""
    height, width, channels = x.shape[1:]
    there = (rows >= 0) & (rows < height) & (cols >= 0) & (cols < width)
    at = rows.clamp(0, height - 1) * width + cols.clamp(0, width - 1)
    found = x.flatten(1, 2).gather(1, at.flatten(1)[..., None].expand(-1, -1, channels))
    return found.view(*rows.shape, channels), there


class MutualLayer(nn.Module):
    """One layer: attention within windows `shift` pixels off, where `mutual` also to the frames around, and a gated
    feed-forward."""

    def __init__(self, width: int, head: int, shift: int, mutual: bool) -> None:
        super().__init__()
        if width % head:
            raise SettingError(f"attention has {width} channels in heads of {head}: expected whole heads")
        self.head, self.shift, self.mutual = head, shift, mutual
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.others = nn.Linear(width, 2 * width) if mutual else None
        self.place = nn.Parameter(torch.zeros(width // head, WINDOW**2, WINDOW**2))
        self.out = nn.Linear(width, width)
        self.feed_forward = FeedForward(width)

    def forward(self, x: Tensor, around: Sequence[Seen]) -> Tensor:
        """Frames `(n, h, w, c)` with what they saw."""
        count, height, width = x.shape[:3]
        windows = Windows.of(height, width, self.shift, x.device)
        rows, cols = (each.expand(count, -1, -1) for each in (windows.rows, windows.cols))
        q, k, v = (taken(each, rows, cols)[0] for each in self.qkv(self.norm(x)).chunk(3, -1))
        keys, values, masks = [k], [v], [windows.inside.expand(count, -1, -1)]
        for other in around if self.others is not None else ():
            assert self.others is not None
            places = windows.displaced(other.flow)
            both, there = taken(self.others(other.features), *places)
            for part, held in zip(both.chunk(2, -1), (keys, values), strict=True):
                held.append(part)
            masks.append(there)
        x = x + self.out(windows.joined(self._attended(q, keys, values, masks), height, width))
        return x + self.feed_forward(x)

    def _attended(self, q: Tensor, keys: list[Tensor], values: list[Tensor], masks: list[Tensor]) -> Tensor:
        """Of windows `(n, windows, 64, c)` each."""
        split = "n m p (g d) -> (n m) g p d"
        q, k, v = (rearrange(each, split, d=self.head) for each in (q, torch.cat(keys, 2), torch.cat(values, 2)))
        seen = torch.cat(masks, 2).flatten(0, 1)[:, None, None]
        place = self.place.repeat(1, 1, len(keys)).to(q.dtype)

        def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
            bias = place.masked_fill(~seen, -torch.inf)
            return F.scaled_dot_product_attention(q, k, v, bias)

        out = in_chunks(attend, max(1, TOGETHER // q.shape[1]), q, k, v, seen)
        return rearrange(out, "(n m) g p d -> n m p (g d)", n=masks[0].shape[0])


def layers_of(width: int, head: int, count: int) -> list[MutualLayer]:
    """So many layers, every second one shifted by half a window; the first three quarters look around."""
    return [MutualLayer(width, head, WINDOW // 2 * (i % 2), i < 3 * count / 4) for i in range(count)]


def attended(layers: Iterable[nn.Module], x: Tensor, pairs: Pairs, radius: int) -> Tensor:
    """All layers over whole clips `(clips, frames, c, h, w)`, `radius` frames around on each side."""
    frames = x.shape[1]
    felt = (Felt(x[:, i], pairs.at(i, frames) if i + 1 < frames else None) for i in range(frames))
    return torch.stack(list(attended_one_by_one(list(layers), felt, radius)), 1)


def attended_one_by_one(layers: Sequence[nn.Module], felt: Iterator[Felt], radius: int) -> Iterator[Tensor]:
    """The same over a scene's frames as they come: each waits for `radius` after it."""
    held = deque[Felt]()
    at = 0  # of the frame that is next, among those held
    for now in felt:
        held.append(now)
        if len(held) > at + radius:
            yield _attended(layers, held, at, radius)
            at += 1
            if at > radius:
                held.popleft()
                at -= 1
    for number in range(at, len(held)):
        yield _attended(layers, held, number, radius)


def _attended(layers: Sequence[nn.Module], held: Sequence[Felt], at: int, radius: int) -> Tensor:
    """One frame of those held, `(n, c, h, w)`."""
    x = rearrange(held[at].x, "n c h w -> n h w c")
    around = [*_looking(held, at, radius, 1), *_looking(held, at, radius, -1)]
    for layer in layers:
        x = layer(x, around)
    return rearrange(x, "n h w c -> n c h w")


def _looking(held: Sequence[Felt], at: int, radius: int, step: int) -> Iterator[Seen]:
    """The frames on one side of a frame, and the flow that leads to each."""
    flow: Tensor | None = None
    for distance in range(1, radius + 1):
        other = at + step * distance
        if not 0 <= other < len(held):
            return
        pairs = held[other - 1 if step > 0 else other].onward
        assert pairs is not None, "both are of one scene"
        onward = pairs.forward if step > 0 else pairs.backward
        flow = onward if flow is None else flow + warp(onward, flow)
        yield Seen(rearrange(held[other].x, "n c h w -> n h w c"), flow)
