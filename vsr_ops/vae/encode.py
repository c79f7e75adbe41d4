"""A VAE's encoder over a video, frame by frame: tiles that give the latents of one pass over the whole picture.

As the decoder's (`tiles`): all tiles step from one group norm to the next together and each is computed once. For that
two or three whole activations are kept, on the device or in the machine's memory, from frame to frame (1080p, float32:
0.17 GB of the bundled SVD, 2.7 GB of a full one): flat in length, in proportion to the picture. Where there is no room
for them tiles are run in passes until their norms stand still, and memory is flat in area too but for the latents' own
level, 1/64 of it. That runs whole in any case, for its attention sees all of the picture. So latents do not depend on
the memory that is free.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, product
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import SettingError
from ..sampling.tiling import Span
from .budget import encoding_bytes, home_of_kept
from .group_norm import Statistics
from .latents import pad_to
from .layout import DecoderOp, encoding_steps
from .lockstep import Arena, Lockstep
from .passes import run_passes, walk
from .places import Box, at_level, axis_parts, magnified, mosaic_index, needed_boxes, pick
from .stream import Streaming
from .sweeps import joined, sweeps_of
from .tiles import ComputedIn


def stream_encode(
    vae: Any, frames: Iterable[Tensor], height: int, width: int, how: Streaming | None = None
) -> Iterator[Tensor]:
    """Unscaled latents `(4, height, width)` float32, their distribution's mode, of frames `(3, h, w)` in [0, 1], grown
    at the bottom and right to the latents' size by repeating their edge: one by one, where the frames are.

    `vae` is diffusers' or a host's autoencoder module. Raises SettingError for one whose encoder is of no known layout.
    """
    steps = encoding_steps(vae)
    if steps is None:
        name = type(getattr(vae, "encoder", vae)).__name__
        raise SettingError(f"the VAE's encoder is a {name}: expected Stable Diffusion's or SVD's")
    return _stream(TiledEncoder(vae, steps, how or Streaming()), frames, height, width)


@torch.no_grad()
def _stream(encoder: TiledEncoder, frames: Iterable[Tensor], height: int, width: int) -> Iterator[Tensor]:
    for frame in frames:
        yield encoder(pad_to(frame, height * encoder.cell, width * encoder.cell))


@dataclass
class TiledEncoder:
    """One VAE's encoder, all of whose `steps` are known, for pictures of one size."""

    vae: Any
    steps: list[DecoderOp]
    how: Streaming
    arena: Arena | None = None
    in_passes: bool = False
    statistics: Statistics = field(init=False)

    def __post_init__(self) -> None:
        self.cell = 1 << self.steps[-1].level
        split = 1 + max(index for index, step in enumerate(self.steps) if step.resize)
        self.above, self.deepest = self.steps[:split], self.steps[split:]
        self.statistics = Statistics(self.above)

    @property
    def place(self) -> ComputedIn:
        """Where it computes."""
        weight = next(cast("Iterator[Tensor]", self.vae.encoder.parameters()))
        return self.how.computed_in or ComputedIn(weight.device, weight.dtype)

    def __call__(self, picture: Tensor) -> Tensor:
        """Latents `(4, h, w)` of a picture `(3, 8h, 8w)` in [0, 1]."""
        x = (picture[None] * 2 - 1).to(self.place.dtype)
        sides = [side // self.cell for side in picture.shape[-2:]]
        if max(sides) <= self.how.tile:
            self.how.check_interrupted()
            moments = x.to(self.place.device)
            for step in self.steps:
                moments = step.run(moments)
            return self._mode(moments, picture)
        arena = self._room(sides)
        if self.in_passes:
            moments = self._run(arena, self.deepest, self._in_passes(x, sides))
        else:
            moments = self._run(arena, self.steps, x)
        latents = self._mode(moments, picture)
        arena.give(moments)
        return latents

    def _mode(self, moments: Tensor, picture: Tensor) -> Tensor:
        """A Gaussian's means: a copy, whose room nobody takes back."""
        return moments[0, : moments.shape[1] // 2].to(picture.device, torch.float32, copy=True)

    def _room(self, sides: Sequence[int]) -> Arena:
        """Memory for whole activations, or where there is none, settled with the first picture, for those of the
        latents' own level."""
        if self.arena is None:
            device, home = self.place.device, None
            if sweeps_of(self.above) is not None:
                home = home_of_kept(encoding_bytes(self.steps, sides, self.place.dtype.itemsize), device, self.how.kept)
            self.in_passes = home is None
            self.arena = Arena(home or device, device.type == "cpu")
        return self.arena

    def _run(self, arena: Arena, steps: Sequence[DecoderOp], x: Tensor) -> Tensor:
        """Every tile once, from one group norm to the next; steps that are made of no sweeps, attentions, whole."""
        lockstep = Lockstep(self.place.device, arena, self.how.check_interrupted, self.how.tile * self.cell)
        x = x.contiguous(memory_format=arena.layout)
        for known, part in groupby(steps, lambda step: sweeps_of([step]) is not None):
            if known:
                made = lockstep.run(joined(sweeps_of(list(part)) or []), x)
                assert made is not None
                x = made
                continue
            for step in part:
                self.how.check_interrupted()
                whole = step.run(x.to(self.place.device))
                arena.give(x)
                x = whole
        return x

    def _in_passes(self, x: Tensor, sides: Sequence[int]) -> Tensor:
        """What comes to the latents' own level of a picture whose tiles are run until their norms stand still."""
        little = [mosaic_index(side, self.how.tile) for side in sides]
        mosaic = pick(x, [magnified(index, self.cell) for index in little])
        down, across = (axis_parts(side, self.how.tile, self.cell) for side in sides)
        tiles = list(product(down, across))
        whole = Span(0, mosaic.shape[-2]), Span(0, mosaic.shape[-1])
        made: dict[Box, Tensor] = {}

        def run() -> None:
            made.update({tile: self._tile(x, tile) for tile in tiles})

        run_passes(self.statistics, lambda: self._tile(mosaic, whole), run, self.how.tolerance)
        self.statistics.lend()
        rows = [torch.cat([made[top, left] for left in across], -1) for top in down]
        return torch.cat(rows, -2)

    def _tile(self, x: Tensor, tile: Box) -> Tensor:
        """One tile of a picture, down to the latents' own level."""
        self.how.check_interrupted()
        extent = x.shape[-2], x.shape[-1]
        boxes = needed_boxes(self.above, at_level(tile, self.steps[-1].level), extent)
        rows, cols = boxes[0]
        part = x[..., rows.slice, cols.slice].to(self.place.device)
        return walk(self.above, part, boxes, {}, self.statistics, extent, tile)[0]
