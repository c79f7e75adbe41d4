"""What a tile takes in the UNet: short runs of the very UNet, on a tile as large as the time allows. For a host too."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..sampling.schedule import Kind
from ..sampling.tiling import TileSize

#: Runs one tile through the UNet and waits for it: seconds of a tile pass, by the kind of step.
TileRunner = Callable[[TileSize], Mapping[Kind, float]]

#: Shares of a tile's sides and of its frames, from the first that is tried to the tile itself.
SHARES = ((0.0, 0.0), (0.25, 0.25), (0.5, 0.5), (0.5, 1.0), (0.75, 1.0), (1.0, 1.0))
#: Cells of the UNet's factor a side: norms want more than one value.
SMALLEST = 2
#: Runs this much shorter than the time there is say nothing of the next size: they are all beginning and end.
BRIEF = 50


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
        cells = (max(math.ceil(sides * side / factor), SMALLEST) * factor for side in (tile.height, tile.width))
        height, width = (min(side, most) for side, most in zip(cells, (tile.height, tile.width), strict=True))
        size = TileSize(height, width, max(math.ceil(frames * tile.frames), 1))
        if size not in found:
            found.append(size)
    return found


def tile_seconds(
    run: TileRunner,
    flops: Callable[[TileSize], float],
    tile: TileSize,
    factor: int,
    seconds: float,
    once_more: TileRunner | None = None,
) -> TileSeconds:
    """Runs the smallest tile twice, and then the largest that takes no more than about `seconds`, by those before.
    Where that is smaller than `tile` itself, the rest is by their operations, `flops`. The last is run once more, by
    `once_more` where the job itself takes tiles in another way."""
    sizes = sizes_up_to(tile, factor)
    run(sizes[0])  # what is first used takes longer
    kinds: Mapping[Kind, float] = run(sizes[0])
    size, left = sizes[0], sizes[1:]
    while left:
        spent = sum(kinds.values())
        known = [larger for larger in left if spent * volume(larger) / volume(size) <= seconds]
        if not known and spent > seconds / BRIEF:
            break
        size = known[-1] if known else left[0]
        kinds, left = run(size), left[left.index(size) + 1 :]
    again = (once_more or run)(size)  # as above: twice as long at a process's start
    kinds = {kind: min(each, again[kind]) for kind, each in kinds.items()}
    times = 1.0 if size == tile else flops(tile) / flops(size)
    return TileSeconds(tile, size, {kind: times * each for kind, each in kinds.items()})
