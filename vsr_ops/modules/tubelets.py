"""Attention in tubelets (SATeCo): windows of 8x8 pixels of the frame's grid, through all frames of a clip.

A tile of a frame is cut along the frame's own grid, so that tiles of whole windows give what the frame gives. Positions
turn the queries and keys (rotary, in time, y and x): clips may be longer than those that were learnt from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from ..errors import SettingError
from ..sampling.attention import in_chunks
from .windows import WINDOW, Place

#: Windows times heads that are attended to at once.
TOGETHER = 8192
#: The slowest turn of a pair of channels, of the fastest, which is one radian a pixel or frame.
SLOWEST = 1 / 8


@dataclass(frozen=True)
class Grid:
    """How a tile is cut into the windows of its frame: pixels that are missing on each side, windows down and
    across."""

    top: int
    left: int
    bottom: int
    right: int
    rows: int
    cols: int

    @classmethod
    def of(cls, height: int, width: int, place: Place) -> Grid:
        """Of a tile of `height` x `width` pixels that lies at `place`."""
        top, left = place.top % WINDOW, place.left % WINDOW
        bottom, right = -(top + height) % WINDOW, -(left + width) % WINDOW
        return cls(top, left, bottom, right, (top + height + bottom) // WINDOW, (left + width + right) // WINDOW)

    def cut(self, x: Tensor, heads: int) -> Tensor:
        """`(n, t, h, w, heads * d)` to `(n * windows, heads, t * 64, d)`; zeros where nothing is."""
        x = F.pad(x, (0, 0, self.left, self.right, self.top, self.bottom))
        split = "n t (y i) (x j) (g d) -> (n y x) g (t i j) d"
        return rearrange(x, split, i=WINDOW, j=WINDOW, g=heads)

    def join(self, x: Tensor, frames: int) -> Tensor:
        """The way back from `cut`."""
        joined = "(n y x) g (t i j) d -> n t (y i) (x j) (g d)"
        x = rearrange(x, joined, y=self.rows, x=self.cols, t=frames, i=WINDOW, j=WINDOW)
        height, width = x.shape[2:4]
        return x[:, :, self.top : height - self.bottom, self.left : width - self.right]

    def seen(self, like: Tensor, clips: int, frames: int) -> Tensor | None:
        """Which keys there are, `(n * windows, 1, 1, t * 64)`; None where all are."""
        if not (self.top or self.left or self.bottom or self.right):
            return None
        inside = like.new_ones(self.rows * WINDOW - self.top - self.bottom, self.cols * WINDOW - self.left - self.right)
        there = F.pad(inside, (self.left, self.right, self.top, self.bottom)).bool()
        return repeat(there, "(y i) (x j) -> (n y x) 1 1 (t i j)", n=clips, t=frames, i=WINDOW, j=WINDOW)


def turns(frames: int, dim: int) -> Tensor:
    """Angles `(t * 64, dim / 2)` of a tubelet's places: a third each of the pairs of channels tell y and x, the others
    time."""
    pairs = dim // 2
    within = pairs // 3
    t, y, x = torch.meshgrid(torch.arange(frames), torch.arange(WINDOW), torch.arange(WINDOW), indexing="ij")
    angles = [_speeds(n) * at.flatten()[:, None] for n, at in ((pairs - 2 * within, t), (within, y), (within, x))]
    return torch.cat(angles, 1)


def _speeds(count: int) -> Tensor:
    return SLOWEST ** (torch.arange(count) / max(count - 1, 1))


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Queries or keys `(..., tokens, d)` turned by the angles of their places."""
    cos, sin = angles.cos().to(x), angles.sin().to(x)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def attend(q: Tensor, k: Tensor, v: Tensor, place: Place, head: int) -> Tensor:
    """Attention of clips `(n, t, h, w, c)`, c in heads of `head` channels, within the tubelets of a tile at `place`.
    Beyond the frame's border nothing is seen."""
    clips, frames, height, width, channels = q.shape
    grid, heads = Grid.of(height, width, place), channels // head
    angles = turns(frames, head).to(q.device)
    q, k, v = (grid.cut(x, heads) for x in (q, k, v))
    mask = grid.seen(q, clips, frames)
    given = [turned(q, angles), turned(k, angles), v, *([] if mask is None else [mask])]
    return grid.join(in_chunks(F.scaled_dot_product_attention, max(1, TOGETHER // heads), *given), frames)


class Around(nn.Module):
    """A depthwise convolution over 3x3x3 places of clips `(n, t, h, w, c)`; zeros beyond their ends and borders."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, 3, 3, 3))
        self.bias = nn.Parameter(torch.zeros(width))
        # What a place holds itself passes, the rest is learnt.
        nn.init.normal_(self.weight, std=0.1)
        with torch.no_grad():
            self.weight[:, 1, 1, 1] += 1

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        frames = x.shape[1]
        flat = rearrange(x, "n t h w c -> (n t) c h w")
        # The three frames' kernels of each channel at once: a convolution over pictures, which is fast everywhere.
        kernels = rearrange(self.weight, "c t y x -> (c t) 1 y x")
        seen = F.conv2d(flat, kernels, padding=1, groups=flat.shape[1])
        before, now, after = rearrange(seen, "(n t) (c s) h w -> s n t h w c", t=frames, s=3)
        out = now + self.bias
        if frames == 1:
            return out
        nothing = torch.zeros_like(out[:, :1])
        return out + torch.cat([nothing, before[:, :-1]], 1) + torch.cat([after[:, 1:], nothing], 1)


class TubeletAttention(nn.Module):
    """What clips `(n, t, h, w, inner)` gain by looking at themselves, and at a guide `(n, t, h, w, guide)`.

    Queries, keys and values are D(P LN x), P a layer over channels, D `Around`. Raises SettingError where `inner` is
    not a multiple of an even `head`.
    """

    def __init__(self, inner: int, guide: int, head: int) -> None:
        super().__init__()
        if head % 2 or head < 6 or inner % head:
            raise SettingError(f"attention has {inner} channels in heads of {head}: expected whole, even heads")
        self.head = head
        self.norm, self.norm_again = nn.LayerNorm(inner), nn.LayerNorm(inner)
        self.qkv, self.around_qkv = nn.Linear(inner, 3 * inner), Around(3 * inner)
        self.q, self.around_q = nn.Linear(inner, inner), Around(inner)
        self.kv, self.around_kv = nn.Linear(guide, 2 * inner), Around(2 * inner)

    def forward(self, h: Tensor, guide: Tensor, place: Place) -> Tensor:
        """Features with both gains."""
        q, k, v = self.around_qkv(self.qkv(self.norm(h))).chunk(3, -1)
        h = h + attend(q, k, v, place, self.head)
        q = self.around_q(self.q(self.norm_again(h)))
        k, v = self.around_kv(self.kv(guide)).chunk(2, -1)
        return h + attend(q, k, v, place, self.head)
