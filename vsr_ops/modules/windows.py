"""A transformer block whose attention stays in windows of the frame's grid: cost grows with the area alone, and a tile
of whole windows is exact."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from ..sampling.attention import fused_attention

#: Side of the windows that attention is confined to, in the level's own pixels.
WINDOW = 8
#: Channels of an attention head.
HEAD = 16


@dataclass(frozen=True)
class Place:
    """Where a tile lies in its frame of `height` x `width`, in the pixels of one level."""

    top: int
    left: int
    height: int
    width: int

    def scaled(self, times: float) -> Place:
        """The same place on a level `times` as large."""
        top, left, height, width = (round(value * times) for value in (self.top, self.left, self.height, self.width))
        return Place(top, left, height, width)


class WindowAttention(nn.Module):
    """Self-attention of `(n, h, w, c)` inside windows of the frame's grid."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, place: Place) -> Tensor:
        """What is added to `x`, a tile that lies at `place`: beyond the frame's border nothing is seen."""
        height, width = x.shape[1:3]
        top, left = place.top % WINDOW, place.left % WINDOW
        bottom, right = -(top + height) % WINDOW, -(left + width) % WINDOW
        tokens = F.pad(self.qkv(self.norm(x)), (0, 0, left, right, top, bottom))
        count = (tokens.shape[1] // WINDOW, tokens.shape[2] // WINDOW)
        split = "n (y i) (x j) (three g d) -> three (n y x) g (i j) d"
        q, k, v = rearrange(tokens, split, three=3, i=WINDOW, j=WINDOW, d=HEAD)
        mask: list[Tensor] = []
        if top or left or bottom or right:
            there = F.pad(x.new_ones(height, width), (left, right, top, bottom)).bool()
            mask = [repeat(there, "(y i) (x j) -> (n y x) 1 1 (i j)", n=x.shape[0], i=WINDOW, j=WINDOW)]
        out = fused_attention(q, k, v, *mask)
        join = "(n y x) g (i j) d -> n (y i) (x j) (g d)"
        out = rearrange(out, join, y=count[0], x=count[1], i=WINDOW, j=WINDOW)
        return self.out(out[:, top : top + height, left : left + width])


class FeedForward(nn.Module):
    """Restormer's gated one: a depthwise convolution lets neighbours talk across windows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.enter = nn.Linear(width, 2 * width)
        self.around = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """What is added to `x` `(n, h, w, c)`."""
        wide = self.around(rearrange(self.enter(self.norm(x)), "n h w c -> n c h w"))
        value, gate = rearrange(wide, "n c h w -> n h w c").chunk(2, -1)
        return self.out(value * F.gelu(gate))
