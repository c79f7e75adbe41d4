"""DSSAG in an interval of noise levels, and kept between steps, against DSSAG at every step: the bundled models.

`latents` is the relative difference of the sampled latents, `of DSSAG` that by what DSSAG itself changes (1 is as far
as no guidance); scores are of the decoded and refined pictures, on the middle of clips kept out of training. Tile
passes are those of 25 steps of 1080p, 300 frames, at stock SVD's tile in the layout `shifted`.

    python -m benchmarks.guidance_interval --data ../clips
"""

from __future__ import annotations

import math
from statistics import mean

import torch

from benchmarks.clips import pictures, sampled
from benchmarks.common import machine, table
from benchmarks.fewer_steps import METRICS, bundled, parser, read_clips
from vsr_ops.metrics.report import Scores, joined
from vsr_ops.metrics.scoring import score
from vsr_ops.modules.dcm import load_dcm
from vsr_ops.modules.refiner import load_refiner
from vsr_ops.pipeline.parts import PipelineModules
from vsr_ops.pipeline.sampler import SVD_NOISE, Settings, run_steps, strengths, total_steps
from vsr_ops.sampling.guidance import guide
from vsr_ops.sampling.interval import GuidanceInterval
from vsr_ops.sampling.layouts import lay_out
from vsr_ops.sampling.tiling import TileSize

EVERY_STEP, NONE = "every step", "no guidance"
INTERVALS = {
    EVERY_STEP: GuidanceInterval(),
    "every 2nd": GuidanceInterval(every=2),
    "every 3rd": GuidanceInterval(every=3),
    "every 6th": GuidanceInterval(every=6),
    "0.1 to 100": GuidanceInterval(0.1, 100.0),
    "0.01 to 10": GuidanceInterval(0.01, 10.0),
    "0.1 to 10": GuidanceInterval(0.1, 10.0),
    "1 to 20": GuidanceInterval(1.0, 20.0),
    "1 to 50, every 2nd": GuidanceInterval(1.0, 50.0, 2),
    "0.1 to 30, every 2nd": GuidanceInterval(0.1, 30.0, 2),
    "0.01 to 10, every 2nd": GuidanceInterval(0.01, 10.0, 2),
    "0.1 to 100, every 3rd": GuidanceInterval(0.1, 100.0, 3),
    "0.1 to 300, every 4th": GuidanceInterval(0.1, 300.0, 4),
}
#: 1080p and 300 frames in latents; stock SVD's tile.
FULL, FULL_TILE = (300, 136, 240), TileSize(64, 64, 14)


def tile_passes(settings: Settings, layout: str = "shifted") -> int:
    """Of a full-size run."""
    tiles = lay_out(layout, *FULL, FULL_TILE).over(total_steps(settings, SVD_NOISE))
    steps = zip(strengths(settings), run_steps(settings), strict=True)
    return sum(guide(settings.guidance).passes(power) * tiles.at(step.index).tiles for power, step in steps)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=25)
    options.add_argument("--scale", type=float, default=1.0, help="DSSAG's s")
    options.add_argument("--rows", nargs="*", default=list(INTERVALS))
    options.add_argument("--latents", action="store_true", help="leave the pictures out, which take most of the time")
    args = options.parse_args()
    device, model = torch.device("cpu"), bundled(args.model)
    parts = PipelineModules(load_dcm("lite", device), load_refiner("lite", device))
    guided = {
        name: Settings(steps=args.steps, guidance="dssag", guidance_scale=args.scale, interval=INTERVALS[name])
        for name in dict.fromkeys((EVERY_STEP, *args.rows))
    }
    runs = {**guided, NONE: Settings(steps=args.steps, guidance="none")}
    # What DSSAG changes is what the others are measured by.
    runs = {name: runs[name] for name in (EVERY_STEP, NONE, *guided)}
    print(
        f"{', '.join(args.clips)}: {args.frames} frames of {args.size}, CRF {args.crf}; {machine(device)}\n", flush=True
    )
    off: dict[str, list[float]] = {name: [] for name in runs}
    scores: dict[str, list[Scores]] = {name: [] for name in runs}
    for video in read_clips(args, model, parts):
        exact = sampled(model, video, runs[EVERY_STEP])
        for name, settings in runs.items():
            latents = exact if name == EVERY_STEP else sampled(model, video, settings)
            off[name].append(float((latents - exact).norm() / exact.norm()))
            if not args.latents:
                result = pictures(model, parts, video, latents)
                one = score({name: {video.clip.name: result}}, {video.clip.name: video.clip.truth}, METRICS)
                scores[name].append(one)
            print(f"  {video.clip.name}: {name}: latents {off[name][-1]:.5f}", flush=True)
    print()
    lines: list[list[str]] = []
    for name, settings in runs.items():
        own = joined(scores[name]) if scores[name] else None
        values = [] if own is None else [f"{own.value(name, metric):.5g}" for metric in METRICS.split(",")]
        share = mean(a / b if b else math.nan for a, b in zip(off[name], off[NONE], strict=True))
        passes = tile_passes(Settings(steps=25, guidance=settings.guidance, interval=settings.interval))
        lines.append([name, f"{mean(off[name]):.5f}", f"{share:.3f}", *values, str(passes)])
    measured = [] if args.latents else METRICS.split(",")
    table(["guided", "latents", "of DSSAG", *measured, "tile passes"], lines)


if __name__ == "__main__":
    main()
