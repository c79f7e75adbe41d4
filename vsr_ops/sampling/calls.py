"""The UNet calls of one pass over a video: which tiles go through together, and in what order."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SettingError
from .guidance import Branch
from .schedule import Step
from .tiling import TilePlan, cut_tile


@dataclass(frozen=True)
class Call:
    """One UNet call: the tiles (indices into `plan.spatial`) of one window that go through together."""

    step: Step
    branch: Branch
    window: int
    tiles: tuple[int, ...]
    frames: int
    height: int
    width: int


def calls(plan: TilePlan, step: Step, branch: Branch, batch: int, synchronous: bool) -> Iterator[Call]:
    """The calls of one pass over the video, in the order they must run.

    All spatial tiles of a window go at once at a synchronous SAP step, `batch` at a time otherwise. At a SAP step all
    tiles of a window come before the next window, so that a lagged bank goes to the device once. Else windows are the
    inner loop, in the step's direction, so that TAP's banks are those of one batch of tiles, however large the frame.
    """
    count, sap = len(plan.spatial), step.kind == "sap"
    size = count if synchronous and sap else batch
    groups = [tuple(range(first, min(first + size, count))) for first in range(0, count, size)]
    windows = range(len(plan.windows)) if step.forward else range(len(plan.windows))[::-1]
    order = (
        [(n, tiles) for n in windows for tiles in groups] if sap else [(n, tiles) for tiles in groups for n in windows]
    )
    for n, tiles in order:
        tile = plan.tile_size(n)
        yield Call(step, branch, n, tiles, tile.frames, tile.height, tile.width)


def token_grid(tokens: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of a layer's tokens, from the tile's height and width in latents."""
    for shrink in (1, 2, 4, 8, 16, 32):
        rows, cols = math.ceil(height / shrink), math.ceil(width / shrink)
        if rows * cols == tokens:
            return rows, cols
    raise SettingError(f"a layer with {tokens} tokens does not fit a tile of {height}x{width} latents")


def gather_tiles(plan: TilePlan, call: Call, video: Tensor) -> Tensor:
    """The call's tiles of `(frames, c, height, width)` as a batch of videos `(tiles*frames, c, h, w)`."""
    return torch.cat([cut_tile(plan, call.window, m, video) for m in call.tiles])
