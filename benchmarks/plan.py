"""What `plan` says against what then happens, on three jobs: seconds in all and of each stage.

A job is planned from its first frames, and run. `--clock cpu` counts the processor's own seconds, which other work on a
busy machine changes little; without it, those on the wall, which are what an artist waits.

    python -m benchmarks.plan
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from benchmarks.common import machine, table
from vsr_ops.cli.demo_clip import degraded, write_video
from vsr_ops.cli.options import make_parser
from vsr_ops.cli.settings import model_of, parts_of, settings_of
from vsr_ops.pipeline.cost import resolve_sap
from vsr_ops.pipeline.job import Job
from vsr_ops.pipeline.part_samples import Work
from vsr_ops.pipeline.part_times import time_parts
from vsr_ops.pipeline.sampler import NoiseRange, make_layout
from vsr_ops.pipeline.upscale import upscale
from vsr_ops.system.allocator import keep_freed
from vsr_ops.video import glance, probe

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
#: How far from the truth a plan may be, either way.
TARGET = 1.3
#: The options of each job.
JOBS = {
    "default": "",
    "sdatc": "--decode-w 0.75 --stam lite --capm lite --align 0.5",
    "sd": "--control lite --steps 4 --guidance dssag --layout shifted --tile 16x16x8",
}


@dataclass
class Stages:
    """Seconds of each stage of a run, from its progress."""

    clock: Callable[[], float]

    def __post_init__(self) -> None:
        self.spent: dict[str, float] = {}
        self._stage, self._began = "encode", self.clock()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = self.clock()
        self.spent[self._stage] = self.spent.get(self._stage, 0.0) + now - self._began
        self._stage, self._began = stage, now


@contextmanager
def clip(frames: int) -> Iterator[Path]:
    """The bundled clip's first frames, compressed, in a folder of their own."""
    with tempfile.TemporaryDirectory() as folder:
        write_video(Path(folder) / "in.mp4", degraded()[:frames])
        yield Path(folder) / "in.mp4"


def planned_and_taken(
    source: Path, options: str, clock: Callable[[], float]
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of each stage, as planned and as they then were."""
    output = source.with_name("out.mp4")
    args = make_parser().parse_args(["upscale", str(source), str(output), *options.split()])
    settings, parts, model = settings_of(args), parts_of(args), model_of(args)
    info = glance(source)
    job = Job(info, 0, info.frames, 4)
    layout = make_layout(job, settings, model.tile, model.factor, NoiseRange.of(model))
    settings = resolve_sap(model, layout, settings, "auto")
    planned = time_parts(Work(model, job, layout, settings, parts, clock=clock)).stages
    stages = Stages(clock)
    job = Job(probe(source), 0, info.frames, 4)
    upscale(model, job, output, settings, overwrite=True, cuts=(), progress=stages, parts=parts)
    stages("done", 0, 0)
    return planned, stages.spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--frames", type=int, default=8, help="of the bundled clip, at most 24")
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(f"plan against run, {args.frames} frames of 384x256, {args.clock} clock, on {machine(torch.device('cpu'))}\n")
    rows: list[list[str]] = []
    with clip(args.frames) as source:
        for name in args.jobs:
            rounds = [planned_and_taken(source, JOBS[name], CLOCKS[args.clock]) for _ in range(args.rounds)]
            ratios = [sum(planned.values()) / sum(taken.values()) for planned, taken in rounds]
            planned, taken = rounds[-1]
            each = ", ".join(f"{stage} {planned.get(stage, 0):.1f}/{seconds:.1f}" for stage, seconds in taken.items())
            took = sum(taken.values())
            rows.append([name, f"{took:.1f}", f"{median(ratios):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}", each])
            print(f"{' '.join(rows[-1])}", flush=True)
    print()
    table(["job", "took, s", "planned / took", "of all rounds", "stages: planned / took, s"], rows)
    print(f"target: within {TARGET} either way")


if __name__ == "__main__":
    keep_freed()
    main()
