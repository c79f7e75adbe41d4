"""Which part of the picture a step of a VAE needs for a part of its output, and how the picture is cut.

Positions are whole pixels of the picture, halved at each level.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from ..sampling.tiling import Span

Box = tuple[Span, Span]
"""Rows and columns."""
RUNS = 4  # of latents along each axis that the mosaic is made of


class Reaching(Protocol):
    """What says how much of its input a part of its output needs."""

    @property
    def reach(self) -> int: ...
    @property
    def resize(self) -> int: ...
    @property
    def window(self) -> int: ...
    @property
    def before(self) -> int: ...


class Step(Reaching, Protocol):
    """One at a level, 0 the picture's resolution."""

    @property
    def level(self) -> int: ...


def needed_span(step: Reaching, out: Span, extent: int) -> Span:
    """What part of a step's input, `extent` long, `out` of its output depends on."""
    if step.resize > 0:
        start, stop = (out.start - step.reach) // 2, -(-(out.stop + step.reach) // 2)
    elif step.resize < 0:
        # Padded at the end alone: the output at i sees 2i, 2i+1 and 2i+2.
        start, stop = 2 * out.start - step.before, 2 * out.stop + 1 + step.before
    else:
        start, stop = out.start - step.reach, out.stop + step.reach
        start, stop = start // step.window * step.window, -(-stop // step.window) * step.window
        start, stop = start - step.before, stop + step.before
    return Span(max(start, 0), min(stop, extent))


def resized(span: Span, resize: int) -> Span:
    """Where a part lies after a step that doubles (1) or halves (-1) the picture."""
    if resize > 0:
        return Span(2 * span.start, 2 * span.stop)
    return Span(span.start // 2, span.stop // 2) if resize < 0 else span


def _plan(steps: Sequence[Step], out: Span, extent: int, taps: Sequence[tuple[int, Span]]) -> list[Span]:
    """One axis: the part of each step's input that is needed, then `out` itself. `extent` is the picture's length.

    `taps` are levels, and parts that must be there after the last residual block of each.
    """
    plan = [out]
    for step in reversed(steps):
        length = extent >> step.level
        span = needed_span(step, plan[0], length)
        if step.resize < 0:
            for tap in (tap for level, tap in taps if level == step.level):
                span = Span(min(span.start, tap.start), max(span.stop, tap.stop))
            # A halved picture begins at an even pixel.
            span = Span(span.start - span.start % 2, span.stop)
        plan.insert(0, span)
    return plan


def crop(x: Tensor, have: Box, want: Box) -> Tensor:
    """The part `want` of what lies at `have`; a view."""
    rows, cols = (slice(w.start - h.start, w.stop - h.start) for h, w in zip(have, want, strict=True))
    return x[..., rows, cols]


@dataclass(frozen=True)
class Tap:
    """A part of the encoder's features after the last residual block of a level, in that level's pixels."""

    level: int
    box: Box


def needed_boxes(steps: Sequence[Step], out: Box, extent: tuple[int, int], taps: Iterable[Tap] = ()) -> list[Box]:
    """Rows and columns that every step needs of its input for `out`, then `out`; `extent` is the picture's size."""
    rows, cols = (
        _plan(steps, out[axis], extent[axis], [(tap.level, tap.box[axis]) for tap in taps]) for axis in (0, 1)
    )
    return list(zip(rows, cols, strict=True))


def axis_parts(side: int, tile: int, cell: int) -> list[Span]:
    """An axis of `side` latents, as pixels, in parts of nearly one size, none longer than `tile` latents."""
    count = -(-side // tile)
    edges = [side * i // count * cell for i in range(count + 1)]
    return [Span(start, stop) for start, stop in pairwise(edges)]


def mosaic_index(side: int, tile: int) -> Tensor:
    """Which of an axis' latents the mosaic holds: all, or evenly spread runs that fill a tile."""
    if side <= tile:
        return torch.arange(side)
    run = -(-tile // RUNS)
    count = tile // run
    starts = [(side - run) * i // max(count - 1, 1) for i in range(count)]
    return torch.cat([torch.arange(start, start + run) for start in starts])


def magnified(index: Tensor, cell: int) -> Tensor:
    """The pixels of these latents along one axis."""
    return (index[:, None] * cell + torch.arange(cell)).flatten()


def pick(x: Tensor, index: Sequence[Tensor]) -> Tensor:
    """These rows and columns of `(..., h, w)`."""
    rows, cols = (i.to(x.device) for i in index)
    return x[..., rows, :][..., cols]


def at_level(box: Box, level: int) -> Box:
    """The same part of the picture, in the pixels of a level."""
    rows, cols = (Span(span.start >> level, span.stop >> level) for span in box)
    return rows, cols
