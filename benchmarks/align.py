"""What alignment along the flow adds to a sampling step of tiles alone, and what the flow itself takes, once a video.

A step is `sampler.sample` without guidance on 2 x 2 tiles in three windows, neither SAP nor TAP. Alignment is that of
the sampler, on the whole video's latents, timed by itself: within a step it would drown in the step's own noise.

    python -m benchmarks.align --size full
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from benchmarks.common import build, describe, heading, interleaved, parser, ratio, read, table
from vsr_ops.backbones.svd import SIGMA_MAX, SVD
from vsr_ops.flow.field import Flow, streamed_flow
from vsr_ops.flow.warp import inside
from vsr_ops.pipeline.sampler import Settings, sample
from vsr_ops.sampling.align import ROUNDS, SHARE, align, bounded
from vsr_ops.sampling.propagation import Propagation
from vsr_ops.sampling.tiling import TilePlan, TileSize, plan_tiles
from vsr_ops.system.allocator import keep_freed
from vsr_ops.vae.latents import CELL

STEP, FLOW = "tiles alone", "flow by DIS, a pair of frames"
#: Mode and lambda. At 1 a gradient step is too long, and is halved again and again.
ROWS = {
    "gradient, lambda 0.05": ("gradient", 0.05),
    "gradient, lambda 1": ("gradient", 1.0),
    "propagate, lambda 0.5": ("propagate", 0.5),
}
TARGET = 1.05


def step(model: SVD, lr: Tensor, plan: TilePlan, tile: TileSize) -> Tensor:
    return sample(model, lr, plan, Settings(steps=1, guidance="none", tile=tile, propagation=Propagation(())))


def flow_of(plan: TilePlan) -> Flow:
    """All moves alike but for a wobble of a third of a latent, so that no difference along the flow is 0."""
    there = torch.tensor([1.3, -0.6]).view(1, 2, 1, 1) + 0.3 * torch.randn(plan.frames - 1, 2, plan.height, plan.width)
    return Flow(there, -there, inside(there), inside(-there), (), plan.frames)


def main() -> None:
    options = read(parser(__doc__, repeats=5).parse_args())
    model, tile = build(options), options.tile
    plan = plan_tiles(2 * tile.frames, tile.height * 3 // 2, tile.width * 3 // 2, tile, 0.5, factor=model.factor)
    heading("Alignment, one step", options)
    print(f"{describe(model, options)}; {len(plan.spatial)} tiles x {len(plan.windows)} windows\n", flush=True)
    torch.manual_seed(0)
    lr, flow = torch.randn(plan.frames, 4, plan.height, plan.width), flow_of(plan)
    x0 = step(model, lr, plan, tile)
    size = (plan.height, plan.width)
    pair = torch.rand(2, 3, plan.height * CELL, plan.width * CELL)
    work: dict[str, Callable[[], object]] = {STEP: lambda: step(model, lr, plan, tile)}
    for name, (mode, strength) in ROWS.items():
        work[name] = lambda m=mode, s=strength: align(x0, flow, s, bounded(SIGMA_MAX, 0.0), m, ROUNDS)
    work[FLOW] = lambda: streamed_flow(pair, 2, size, CELL, (), SHARE)
    times = interleaved(work, options)
    rows = [[STEP, f"{median(times[STEP]):.3f}", "1.000", ""]]
    rows += [
        [name, f"{median(times[name]):.3f}", f"{1 + ratio(times, name, STEP):.3f}", f"<= {TARGET}"] for name in ROWS
    ]
    rows.append([FLOW, f"{median(times[FLOW]):.3f}", "", ""])
    table([f"{plan.frames} frames, {plan.width}x{plan.height} latents", "s", "step / tiles alone", "target"], rows)


if __name__ == "__main__":
    keep_freed()
    main()
