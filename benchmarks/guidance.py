"""UNet passes and time per sampling step of each guidance strategy, on one tile, tiles and propagation aside.

Each row is `pipeline.sampler.sample` at one step, from noise to estimate, gamma 1. PAG and SAG act in the middle block.

    python -m benchmarks.guidance --size full
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from benchmarks.common import build, describe, heading, interleaved, parser, ratio, read, table
from vsr_ops.backbones.svd import SVD
from vsr_ops.pipeline.sampler import Settings, sample
from vsr_ops.sampling.propagation import Propagation
from vsr_ops.sampling.tiling import TilePlan, TileSize, plan_tiles
from vsr_ops.system.allocator import keep_freed


@dataclass(frozen=True)
class Row:
    guidance: str
    cfg: float | None = None
    scale: float | None = None
    together: bool = False


ROWS = {
    "CFG": Row("cfg", 2.0),
    "none": Row("none"),
    "DSSAG, eq. 8": Row("dssag", 1.0, 1.0),
    "DSSAG, eq. 9": Row("dssag", 2.0),
    "PAG + CFG": Row("pag", 2.0, 1.0),
    "SAG + CFG": Row("sag", 2.0, 0.5),
    "DSSAG, eq. 8, in one call": Row("dssag", 1.0, 1.0, together=True),
    "DSSAG, eq. 9, in one call": Row("dssag", 2.0, together=True),
}
DSSAG = ("DSSAG, eq. 8", "DSSAG, eq. 9")
#: (baseline, at most) of both DSSAG rows.
TARGETS = {"CFG": 1.03, "PAG + CFG": 0.70, "SAG + CFG": 0.70}


def step(model: SVD, lr: Tensor, plan: TilePlan, row: Row, tile: TileSize, passes: list[int]) -> None:
    """One step; leaves the number of UNet passes as the last of `passes`."""
    settings = Settings(
        1, row.guidance, row.cfg, row.scale, together=row.together, tile=tile, propagation=Propagation(())
    )
    passes.append(0)

    def tick(_: object) -> None:
        passes[-1] += 1

    sample(model, lr, plan, settings, tick=tick)


def main() -> None:
    options = read(parser(__doc__, repeats=5).parse_args())
    model = build(options)
    tile = options.tile
    heading("Guidance, one step", options)
    print(f"{describe(model, options)}; one tile\n", flush=True)
    lr = torch.randn(tile.frames, 4, tile.height, tile.width)
    plan = plan_tiles(tile.frames, tile.height, tile.width, tile, factor=model.factor)
    passes: dict[str, list[int]] = {name: [] for name in ROWS}
    work: dict[str, Callable[[], object]] = {
        name: lambda row=row, counts=passes[name]: step(model, lr, plan, row, tile, counts)
        for name, row in ROWS.items()
    }
    times = interleaved(work, options)
    bases = tuple(TARGETS)
    rows = [
        [
            name,
            str(passes[name][-1]),
            f"{median(times[name]):.2f}",
            *(f"{ratio(times, name, base):.3f}" for base in bases),
        ]
        for name in ROWS
    ]
    rows.append(["target for DSSAG", "2", "", *(f"<= {TARGETS[base]}" for base in bases)])
    table(["", "UNet passes", "s per step", *(f"/ ({base})" for base in bases)], rows)


if __name__ == "__main__":
    keep_freed()
    main()
