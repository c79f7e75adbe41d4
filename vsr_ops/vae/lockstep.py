"""Every tile computed once: all of them step from one group norm to the next together, over whole activations.

Beside the picture that takes two activations of the widest level, which may wait in the machine's memory. They are kept
from one call to the next; and tiles are small, so that what is made of one fits in a processor's caches and in memory
that its allocator holds on to: a third of a decoder's time can be the kernel's, clearing pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from ..modules.windows import Place
from ..sampling.tiling import Span
from .group_norm import Moments, affine, affine_of, over_frames, statistics_of, together
from .places import Box, crop, needed_span, resized
from .sweeps import MAIN, At, Sweep

#: Bytes of a tile, of what a sweep reads; the smallest side, which windows and strides divide.
TILE_BYTES, TILE_BYTES_GPU, SMALLEST = 4 << 20, 128 << 20, 16


@dataclass
class Arena:
    """Memory for activations, given out and taken back: a new one goes where an old one lay that is as large. With
    `channels_last` they lie so, which is faster on a CPU."""

    home: torch.device
    channels_last: bool = False
    free: list[Tensor] = field(default_factory=lambda: [])
    lent: dict[int, Tensor] = field(default_factory=lambda: {})

    @property
    def layout(self) -> torch.memory_format:
        """How tensors lie in it."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Room for frames `(t, c, h, w)`, with anything in it."""
        size = prod(shape)
        self.free = [part for part in self.free if part.dtype == dtype and part.numel() >= size]
        flat = self.free.pop() if self.free else torch.empty(size, dtype=dtype, device=self.home)
        self.lent[flat.data_ptr()] = flat
        if not self.channels_last:
            return flat[:size].view(*shape)
        t, c, h, w = shape
        return flat[:size].view(t, h, w, c).permute(0, 3, 1, 2)

    def give(self, tensor: Tensor) -> None:
        """Takes a tensor's room back, where it lies in one."""
        if (flat := self.lent.pop(tensor.data_ptr(), None)) is not None:
            self.free.append(flat)


@dataclass
class Lockstep:
    """Runs sweeps on `device`, with whole activations in the `arena`, in tiles of at most `side` pixels."""

    device: torch.device
    arena: Arena
    check_interrupted: Callable[[], None]
    side: int

    def run(
        self,
        sweeps: Sequence[Sweep],
        x: Tensor,
        put: Callable[[Box, Tensor], None] | None = None,
        hint: Tensor | None = None,
        features: dict[str, Tensor] | None = None,
    ) -> Tensor | None:
        """All sweeps over `x` `(t, c, h, w)`, with the `features` that they read beside it.

        `put` is given what the last sweep makes, part by part, and where that lies; without it the whole is returned,
        in the arena's memory.
        """
        buffers: dict[str, Tensor] = {MAIN: x, **(features or {})}
        moments: Moments | None = None
        for index, sweep in enumerate(sweeps):
            following = sweeps[index + 1] if index + 1 < len(sweeps) else None
            if sweep.norm is not None and moments is None:
                moments = self._look(sweep, buffers[sweep.reads])
            moments = self._sweep(sweep, following, buffers, moments, put if following is None else None, hint)
            for name in sweep.last:
                self.arena.give(buffers.pop(name))
        if put is None:
            return buffers[MAIN]
        self.arena.give(buffers.pop(MAIN))
        return None

    def _sweep(
        self,
        sweep: Sweep,
        following: Sweep | None,
        buffers: dict[str, Tensor],
        moments: Moments | None,
        put: Callable[[Box, Tensor], None] | None,
        hint: Tensor | None,
    ) -> Moments | None:
        """One sweep; what it says of the norm that the following begins with."""
        source, target = buffers[sweep.reads], None
        seen: list[tuple[tuple[Tensor, Tensor], int]] = []
        beside = None if sweep.beside is None else buffers[sweep.beside]
        norm = None if sweep.norm is None or moments is None else affine_of(sweep.norm, moments, source.ndim)
        gathers = following is not None and following.norm is not None and following.reads == sweep.writes
        for own, have, at in self._tiles(sweep, source, hint):
            self.check_interrupted()
            given, part = (None if x is None else self._cut(x, have) for x in (source, beside))
            assert given is not None
            if norm is not None:
                given = affine(given, *norm)
                given = F.silu(given, inplace=True) if sweep.activated else given
            made = sweep.run(given, part, at)
            if made is None:
                continue
            whole, there = ([resized(span, sweep.resize) for span in box] for box in (have, own))
            made = crop(made, (whole[0], whole[1]), (there[0], there[1]))
            made = made.contiguous(memory_format=self.arena.layout)
            if put is not None:
                put((there[0], there[1]), made)
                continue
            if gathers and following is not None:
                seen.append(_statistics(following, made))
            target = self._target(sweep, buffers, made) if target is None else target
            target[..., there[0].slice, there[1].slice] = made.to(target.device)
        if sweep.ends is not None:
            sweep.ends()
        if target is not None and sweep.writes is not None:
            old = buffers.get(sweep.writes)
            if old is not None and old is not target:
                self.arena.give(old)
            buffers[sweep.writes] = target
        return _moments(following, seen) if following is not None and seen else None

    def _cut(self, x: Tensor, box: Box) -> Tensor:
        return x[..., box[0].slice, box[1].slice].to(self.device)

    def _target(self, sweep: Sweep, buffers: dict[str, Tensor], made: Tensor) -> Tensor:
        """Where a sweep writes: over what no tile reads any more, else into a room of its own."""
        assert sweep.writes is not None
        height, width = (
            side << 1 if sweep.resize > 0 else side >> 1 if sweep.resize < 0 else side
            for side in buffers[sweep.reads].shape[-2:]
        )
        shape = (*made.shape[:2], height, width)
        there = buffers.get(sweep.writes)
        around = sweep.reads == sweep.writes and (sweep.reach or sweep.before or sweep.window > 1)
        if there is not None and there.shape == shape and there.dtype == made.dtype and not around:
            return there
        return self.arena.take(shape, made.dtype)

    def _tiles(self, sweep: Sweep, source: Tensor, hint: Tensor | None) -> Iterator[tuple[Box, Box, At]]:
        """Each tile's own part of what is read, that with its margins, and what the sweep is told of them."""
        height, width = source.shape[-2:]
        limit = TILE_BYTES if self.device.type == "cpu" else TILE_BYTES_GPU
        side = int((limit / (source.shape[0] * max(source.shape[1], sweep.widest) * source.itemsize)) ** 0.5)
        side = max(SMALLEST, min(side, self.side) // SMALLEST * SMALLEST)
        for top in range(0, height, side):
            for left in range(0, width, side):
                own = Span(top, min(top + side, height)), Span(left, min(left + side, width))
                have = (_around(sweep, own[0], height), _around(sweep, own[1], width))
                yield own, have, At(Place(have[0].start, have[1].start, height, width), own, hint)

    def _look(self, sweep: Sweep, source: Tensor) -> Moments:
        """The statistics of what a first sweep reads."""
        tiles = self._tiles(sweep, source, None)
        return _moments(sweep, [_statistics(sweep, self._cut(source, own)) for own, _, _ in tiles])


def _around(sweep: Sweep, own: Span, extent: int) -> Span:
    """What a sweep reads for what is a tile's own, in the pixels of what is read."""
    span = needed_span(sweep, resized(own, sweep.resize), extent)
    # A halved picture begins at an even pixel.
    return Span(span.start - span.start % 2, span.stop) if sweep.resize < 0 else span


def _statistics(sweep: Sweep, x: Tensor) -> tuple[tuple[Tensor, Tensor], int]:
    """Of a part that a sweep's norm will see."""
    assert sweep.norm is not None
    return statistics_of(sweep.norm, x), x[0].numel() // sweep.norm.num_groups


def _moments(sweep: Sweep, parts: Sequence[tuple[tuple[Tensor, Tensor], int]]) -> Moments:
    """Of all parts, frames one by one or all together."""
    moments = together(parts)
    return over_frames(moments) if sweep.over_time else moments
