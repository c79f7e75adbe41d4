"""Spatio-temporal tiles: one frozen plan serves splitting, merging, cost estimates and previews.

DC-VSR, section 3: overlapping tiles of the latent video are denoised one by one and blended with Gaussian weights.
A plan holds numbers only, no tensors; equal settings give equal plans.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor

from ..errors import SettingError
from ..system.memory import to_device


@dataclass(frozen=True)
class TileSize:
    """Height and width in latent pixels (8 picture pixels each), and frames."""

    height: int
    width: int
    frames: int

    @staticmethod
    def parse(text: str) -> TileSize:
        """Reads `64x64x14` (height x width x frames). Raises SettingError."""
        parts = text.lower().split("x")
        if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
            raise SettingError(f"tile is {text!r}: expected HEIGHTxWIDTHxFRAMES in latents, such as 64x64x14")
        return TileSize(*(int(part) for part in parts))

    def __str__(self) -> str:
        return f"{self.height}x{self.width}x{self.frames}"


@dataclass(frozen=True)
class Span:
    """The half-open range [start, stop) along one axis."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        """How many places it covers."""
        return self.stop - self.start

    @property
    def slice(self) -> slice:
        """For indexing."""
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class Window:
    """A span of frames and the scene it lies in."""

    span: Span
    scene: int


@dataclass(frozen=True)
class TilePlan:
    """Where the tiles of a `(frames, c, height, width)` latent video lie.

    Every latent pixel is covered; the last tile of an axis is flush with the border; no window crosses a cut.
    Tiles of one axis have one length, but that a scene shorter than the window makes a shorter window.
    """

    frames: int
    height: int
    width: int
    rows: tuple[Span, ...]
    cols: tuple[Span, ...]
    windows: tuple[Window, ...]

    @property
    def spatial(self) -> tuple[tuple[Span, Span], ...]:
        """The spatial tiles (row, column) in reading order; a tile's place here is the paper's index m."""
        return tuple((row, col) for row in self.rows for col in self.cols)

    @property
    def tiles(self) -> int:
        """How many spatio-temporal tiles one pass over the video takes."""
        return len(self.rows) * len(self.cols) * len(self.windows)

    def tile_size(self, window: int) -> TileSize:
        """The size of the tiles of one window."""
        return TileSize(self.rows[0].length, self.cols[0].length, self.windows[window].span.length)

    def magnified(self, times: int) -> TilePlan:
        """The same tiles on a grid `times` finer in space, such as the pixels of a latent."""

        def grow(axis: tuple[Span, ...]) -> tuple[Span, ...]:
            return tuple(Span(span.start * times, span.stop * times) for span in axis)

        return replace(
            self, height=self.height * times, width=self.width * times, rows=grow(self.rows), cols=grow(self.cols)
        )


def spans(extent: int, tile: int, overlap: float) -> tuple[Span, ...]:
    """Starts 0, stride, 2*stride ..., the last span flush with the end; one span where the tile covers all.

    `overlap` is the share of a tile that its neighbour covers too.
    """
    if tile >= extent:
        return (Span(0, extent),)
    stride = max(1, round(tile * (1 - overlap)))
    starts = [*range(0, extent - tile, stride), extent - tile]
    return tuple(Span(start, start + tile) for start in starts)


@dataclass(frozen=True)
class Core:
    """One part of an axis: `core` is its own, `outer` what it must see, `inner` where `core` lies within `outer`."""

    core: slice
    outer: slice
    inner: slice


def cores(extent: int, size: int, margin: int) -> tuple[Core, ...]:
    """An axis in parts of `size` that do not overlap, each seen with `margin` on both sides.

    For a network that reaches no further than `margin`, the parts together are exactly the whole.
    """
    parts: list[Core] = []
    for start in range(0, extent, size):
        stop, first = min(start + size, extent), max(start - margin, 0)
        parts.append(
            Core(slice(start, stop), slice(first, min(stop + margin, extent)), slice(start - first, stop - first))
        )
    return tuple(parts)


def even_part(extent: int, most: int) -> int:
    """The even length of an axis's parts, for as few of at most `most` as there can be, all nearly equal."""
    parts = -(-extent // most)
    return 2 * -(-extent // (2 * parts))


def plan_tiles(
    frames: int,
    height: int,
    width: int,
    tile: TileSize,
    overlap: float = 0.5,
    cuts: Sequence[int] = (),
    factor: int = 8,
) -> TilePlan:
    """Plans tiles over a latent video of `frames` x `height` x `width`.

    `cuts` are the first frames of new scenes. `factor` is by how much the UNet shrinks a tile: tiles must be
    multiples of it. Raises SettingError for a tile that is not positive or no such multiple, an overlap outside
    [0, 0.75], cuts outside the video or out of order.
    """
    if min(tile.height, tile.width, tile.frames) < 1:
        raise SettingError(f"tile is {tile}: expected positive numbers, such as 64x64x14")
    if tile.height % factor or tile.width % factor:
        raise SettingError(f"tile is {tile}: its height and width must be multiples of {factor}, the UNet's factor")
    if not 0 <= overlap <= 0.75:
        raise SettingError(f"overlap is {overlap}: expected a share from 0 to 0.75 (0.5 is the paper's)")
    edges = [0, *cuts, frames]
    if any(a >= b for a, b in pairwise(edges)):
        raise SettingError(
            f"scene cuts {list(cuts)} of {frames} frames: expected rising frame numbers inside the video"
        )
    windows = [
        Window(Span(start + span.start, start + span.stop), scene)
        for scene, (start, stop) in enumerate(pairwise(edges))
        for span in spans(stop - start, tile.frames, overlap)
    ]
    rows, cols = spans(height, tile.height, overlap), spans(width, tile.width, overlap)
    return TilePlan(frames, height, width, rows, cols, tuple(windows))


@lru_cache(maxsize=256)
def _profile(span: Span, extent: int) -> tuple[float, ...]:
    """Gaussian weights along one axis, deviation a quarter of the span; flat where one span covers the axis."""
    if span.length == extent:
        return (1.0,) * span.length
    centre, deviation = (span.length - 1) / 2, max(span.length / 4, 0.5)
    return tuple(math.exp(-0.5 * ((step - centre) / deviation) ** 2) for step in range(span.length))


def _alone(plan: TilePlan, window: int) -> bool:
    """Whether a window is its scene's only one."""
    scene = plan.windows[window].scene
    return sum(w.scene == scene for w in plan.windows) == 1


def blend_weight(plan: TilePlan, window: int, tile: int) -> Tensor:
    """Separable Gaussian weight of one tile, `(frames, 1, h, w)` float32; largest at the centre."""
    row, col = plan.spatial[tile]
    span = plan.windows[window].span
    time = (1.0,) * span.length if _alone(plan, window) else _profile(span, plan.frames + 1)
    axes = (time, _profile(row, plan.height), _profile(col, plan.width))
    t, y, x = (torch.tensor(axis, dtype=torch.float64) for axis in axes)
    return rearrange(torch.einsum("t,y,x->tyx", t, y, x), "t y x -> t 1 y x").float()


def cut_tile(plan: TilePlan, window: int, tile: int, video: Tensor) -> Tensor:
    """The tile's part of `(frames, c, height, width)`, a view."""
    row, col = plan.spatial[tile]
    return video[plan.windows[window].span.slice, :, row.slice, col.slice]


def split(plan: TilePlan, video: Tensor) -> list[list[Tensor]]:
    """All tiles of `(frames, c, height, width)` as views, by window and then by spatial tile."""
    places = range(len(plan.spatial))
    return [[cut_tile(plan, n, m, video) for m in places] for n in range(len(plan.windows))]


class Merger:
    """Collects tiles and blends them: sum(w * tile) / sum(w), in float32.

    A plan of one tile takes no weighting at all: x * w / w is not x.
    """

    def __init__(self, plan: TilePlan) -> None:
        self._plan = plan
        self._total: Tensor | None = None
        self._weight: Tensor | None = None
        self._dtype = torch.float32
        self._blend: dict[tuple[int, bool], Tensor] = {}

    def add(self, window: int, tile: int, value: Tensor) -> None:
        """Adds one tile's `(frames, c, h, w)`."""
        plan = self._plan
        if self._total is None:
            self._dtype = value.dtype
            shape = (plan.frames, value.shape[1], plan.height, plan.width)
            self._total = torch.zeros(shape, dtype=torch.float32, device=value.device)
            self._weight = torch.zeros((plan.frames, 1, *shape[2:]), dtype=torch.float32, device=value.device)
        assert self._weight is not None
        if plan.tiles == 1:
            self._total.copy_(value)
            return
        weight = self._blend_weight(window, tile, value.device)
        cut_tile(plan, window, tile, self._total).add_(value.float() * weight)
        cut_tile(plan, window, tile, self._weight).add_(weight)

    def _blend_weight(self, window: int, tile: int, device: torch.device) -> Tensor:
        """As `blend_weight`, kept: tiles of one plan have one height and width, so only windows make a difference."""
        key = (self._plan.windows[window].span.length, _alone(self._plan, window))
        if key not in self._blend:
            self._blend[key] = to_device(blend_weight(self._plan, window, tile), device)
        return self._blend[key]

    def result(self) -> Tensor:
        """The blended video `(frames, c, height, width)` in the tiles' dtype, once every tile has been added."""
        assert self._total is not None and self._weight is not None
        if self._plan.tiles > 1:
            self._total.div_(self._weight)
        return self._total.to(self._dtype)


def merge(plan: TilePlan, tiles: Sequence[Sequence[Tensor]]) -> Tensor:
    """Blends `tiles`, ordered as `split` orders them."""
    merger = Merger(plan)
    for n, window in enumerate(tiles):
        for m, tile in enumerate(window):
            merger.add(n, m, tile)
    return merger.result()
