"""Where tiles lie from step to step: a table of layouts.

DC-VSR's tiles overlap by half in three axes, so that every latent is computed eight times at every step. `balanced`
needs fewer for nearly the same overlap. `shifted` lets tiles barely touch and moves their borders from step to step, so
that what one step leaves there the next one sees from within a tile; its last steps overlap. (SuperGen, arXiv
2508.17756, and SpotDiffusion, arXiv 2407.15507, do this for pictures.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ..errors import SettingError
from .tiling import Span, TilePlan, TileSize, Window, plan_tiles

#: The least overlap of `balanced`, as a share of a tile, to the nearest multiple of the UNet's factor.
LEAST = 3 / 8
#: That of the last steps of `shifted`; where an axis overlaps by as much anyway, it need not move.
ENOUGH = 1 / 4
#: Where `shifted` has its borders, in turn: the share of the way from one tile to the next. Each is far from the last.
PHASES = (0.0, 1 / 2, 1 / 4, 3 / 4)
#: How many last steps of `shifted` overlap.
SETTLING = 2


@dataclass(frozen=True)
class TileLayout:
    """The tile plans of a run: `phases` in turn, and `settled` in the last `settling` of its `steps`, which are counted
    from the beginning of the model's whole schedule (None: it leaves noise for a later run)."""

    phases: tuple[TilePlan, ...]
    settled: TilePlan
    settling: int = 0
    steps: int | None = None

    @staticmethod
    def still(plan: TilePlan) -> TileLayout:
        """One plan at every step."""
        return TileLayout((plan,), plan)

    def over(self, steps: int | None) -> TileLayout:
        """The same for a run that ends after so many steps of the model's whole schedule."""
        return replace(self, steps=steps)

    def at(self, index: int) -> TilePlan:
        """The plan of a step, by its index in the model's whole schedule."""
        settled = self.steps is not None and index >= self.steps - self.settling
        return self.settled if settled else self.phases[index % len(self.phases)]

    @property
    def plans(self) -> tuple[TilePlan, ...]:
        """All that there are."""
        return (*self.phases, *([] if self.settled in self.phases else [self.settled]))

    @property
    def largest(self) -> TilePlan:
        """That of most tiles: what memory must do for."""
        return max(self.plans, key=lambda plan: plan.tiles)


def even_spans(extent: int, tile: int, overlap: float, factor: int = 1) -> tuple[Span, ...]:
    """As few spans as overlap by about the share `overlap`, to the nearest multiple of `factor`, spaced as evenly as
    starts on such multiples can be; the last is flush with the end."""
    if tile >= extent:
        return (Span(0, extent),)
    cells, longest = -(-(extent - tile) // factor), max(1, round(tile * (1 - overlap) / factor))
    gaps = -(-cells // longest)
    starts = [min(i * cells // gaps * factor, extent - tile) for i in range(gaps + 1)]
    return tuple(Span(start, start + tile) for start in starts)


def moved_spans(spans: Sequence[Span], share: float, factor: int = 1) -> tuple[Span, ...]:
    """Spans whose borders lie this share of the way from one of `spans` to the next. The first and the last stay flush
    with the ends, so there is one more; where the axis is one span, or overlaps enough, it stays as it is."""
    tile = spans[0].length
    if share == 0 or all(a.stop - b.start >= ENOUGH * tile for a, b in pairwise(spans)):
        return tuple(spans)
    between = [a.start + round((b.start - a.start) * share / factor) * factor for a, b in pairwise(spans)]
    starts = sorted({spans[0].start, *between, spans[-1].start})
    return tuple(Span(start, start + tile) for start in starts)


def _with_axes(plan: TilePlan, axis: Callable[[int, int, int], tuple[Span, ...]], factor: int) -> TilePlan:
    """The plan with its axes laid out by `axis` of (extent, tile, factor); frames scene by scene."""
    tile = plan.tile_size(0)
    frames = max(window.span.length for window in plan.windows)
    windows: list[Window] = []
    for scene in range(plan.windows[-1].scene + 1):
        own = [window.span for window in plan.windows if window.scene == scene]
        first, stop = own[0].start, own[-1].stop
        spans = axis(stop - first, min(frames, stop - first), 1)
        windows += [Window(Span(first + span.start, first + span.stop), scene) for span in spans]
    rows, cols = axis(plan.height, tile.height, factor), axis(plan.width, tile.width, factor)
    return replace(plan, rows=rows, cols=cols, windows=tuple(windows))


def _paper(plan: TilePlan, overlap: float, factor: int) -> TileLayout:
    """DC-VSR, section 3: `overlap` between all neighbours, the last tile flush with the border."""
    return TileLayout.still(plan)


def _balanced(plan: TilePlan, overlap: float, factor: int) -> TileLayout:
    """Near-equal spacing with an overlap of at least three eighths, or of `overlap` where that is less."""
    least = min(overlap, LEAST)
    even = _with_axes(plan, lambda extent, tile, k: even_spans(extent, tile, least, k), factor)
    return TileLayout.still(even)


def _shifted(plan: TilePlan, overlap: float, factor: int) -> TileLayout:
    """As few tiles as cover the video, their borders elsewhere from step to step; a quarter of overlap at the end."""
    phases = tuple(
        _with_axes(plan, lambda extent, tile, k, s=share: moved_spans(even_spans(extent, tile, 0, k), s, k), factor)
        for share in PHASES
    )
    least = min(overlap, ENOUGH)
    settled = _with_axes(plan, lambda extent, tile, k: even_spans(extent, tile, least, k), factor)
    return TileLayout(phases, settled, SETTLING)


LAYOUTS: dict[str, Callable[[TilePlan, float, int], TileLayout]] = {
    "paper": _paper,
    "balanced": _balanced,
    "shifted": _shifted,
}


def check_layout(name: str) -> None:
    """Raises SettingError for an unknown layout."""
    if name not in LAYOUTS:
        raise SettingError(f"layout is {name!r}: expected one of {', '.join(LAYOUTS)}; choose one of them")


def laid_out(tiles: TilePlan | TileLayout) -> TileLayout:
    """A plan as the layout that keeps to it."""
    return tiles if isinstance(tiles, TileLayout) else TileLayout.still(tiles)


def lay_out(
    name: str,
    frames: int,
    height: int,
    width: int,
    tile: TileSize,
    overlap: float = 0.5,
    cuts: Sequence[int] = (),
    factor: int = 8,
) -> TileLayout:
    """The layout `name` of a latent video; all else as `plan_tiles` takes it. Raises SettingError, also for an unknown
    name."""
    check_layout(name)
    return LAYOUTS[name](plan_tiles(frames, height, width, tile, overlap, cuts, factor), overlap, factor)
