"""What a tile takes in the UNet: short runs of the very UNet, on a tile as large as the time allows. For a host too."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..sampling.schedule import Kind
from ..sampling.tiling import TileSize

#: Runs one tile through the UNet and waits for it: seconds of a tile pass, by the kind of step.
TileRunner = Callable[[TileSize], Mapping[Kind, float]]

#: Shares of a tile's sides and of its frames, from the first that is tried to the tile itself.
SHARES = ((0.25, 0.25), (0.5, 0.5), (0.5, 1.0), (0.75, 1.0), (1.0, 1.0))


@dataclass(frozen=True)
class TileSeconds:
    """Seconds of a pass of one `tile`, by the kind of step, measured on a tile of the size `measured`."""

    tile: TileSize
    measured: TileSize
    kinds: Mapping[Kind, float]

    def of(self, kind: Kind) -> float:
        """A step's; one that was not measured is taken for a plain one."""
        return self.kinds.get(kind, self.kinds["plain"])


def volume(tile: TileSize) -> int:
    """Latent pixels of a tile, over all its frames."""
    return tile.height * tile.width * tile.frames


def sizes_up_to(tile: TileSize, factor: int) -> list[TileSize]:
    """Smaller tiles that the UNet takes, growing up to `tile`."""
    found: list[TileSize] = []
    for sides, frames in SHARES:
        height, width = (min(math.ceil(sides * side / factor) * factor, side) for side in (tile.height, tile.width))
        size = TileSize(height, width, math.ceil(frames * tile.frames))
        if size not in found:
            found.append(size)
    return found


def tile_seconds(
    run: TileRunner, flops: Callable[[TileSize], float], tile: TileSize, factor: int, seconds: float
) -> TileSeconds:
    """Runs growing tiles, the smallest one twice, until the next would take more than about `seconds`. Where that is
    before `tile` itself, the rest is by their operations, `flops`."""
    sizes = sizes_up_to(tile, factor)
    run(sizes[0])  # what is first used takes longer
    for size, larger in zip(sizes, [*sizes[1:], None], strict=True):
        began = time.perf_counter()
        kinds = run(size)
        spent = time.perf_counter() - began
        if larger is None or spent * volume(larger) / volume(size) > seconds:
            times = 1.0 if size == tile else flops(tile) / flops(size)
            return TileSeconds(tile, size, {kind: times * each for kind, each in kinds.items()})
    raise AssertionError("the last size has no larger one")
