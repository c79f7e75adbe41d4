"""What an artist waits for: seconds a frame of the default job on the command line, start and all, on the CPU.

480x270 to 1920x1080, 8 frames; 320x180 to 1280x720, 24 frames, which are five windows; and the demo. `--against` a
checkout of another commit runs it there in turn. Memory is the most that the operating system counted.

    python -m benchmarks.default_job --against ../before
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from benchmarks.common import machine, table
from benchmarks.cpu import clip
from vsr_ops.cli.demo_clip import write_video

HERE = Path(__file__).resolve().parents[1]
#: Rows, columns and frames of the input.
JOBS = {"1080p": (270, 480, 8), "720p": (180, 320, 24)}
DEMO = "demo"


@dataclass(frozen=True)
class Taken:
    """Seconds of one run, and the most memory it had."""

    wall: float
    user: float
    system: float
    peak: int


def run(place: Path, command: list[str]) -> Taken:
    """One run of the command line in a checkout. Raises CalledProcessError with what it said."""
    start = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(place)}
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(
            [sys.executable, "-m", "vsr_ops", *command], cwd=place, env=environment, stdout=said, stderr=said
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            said.seek(0)
            raise subprocess.CalledProcessError(child.returncode, command, said.read())
    return Taken(
        time.perf_counter() - start,
        usage.ru_utime,
        usage.ru_stime,
        usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--against", type=Path, help="a checkout of the commit to compare with")
    add("--jobs", nargs="+", choices=[*JOBS, DEMO], default=[*JOBS, DEMO])
    add("--rounds", type=int, default=1)
    add("--options", default="", help="of upscale, for both")
    args = parser.parse_args()
    places = {"here": HERE, **({} if args.against is None else {"against": args.against.resolve()})}
    found: dict[tuple[str, str], list[Taken]] = {}
    frames = {name: count for name, (_, _, count) in JOBS.items()} | {DEMO: 1}
    with tempfile.TemporaryDirectory() as folder:
        for name in set(JOBS) & set(args.jobs):
            height, width, count = JOBS[name]
            write_video(Path(folder) / f"{name}.mp4", clip((height, width), count))
        for turn in range(args.rounds):
            for job in args.jobs:
                for place in list(places)[:: -1 if turn % 2 else 1]:
                    output = Path(folder) / f"{job}-{place}-{turn}"
                    source = str(Path(folder) / f"{job}.mp4")
                    upscale = ["upscale", source, f"{output}.mp4", *args.options.split()]
                    taken = run(places[place], ["demo", "--out", str(output)] if job == DEMO else upscale)
                    found.setdefault((job, place), []).append(taken)
                    print(f"  {job}, {place}: {taken.wall / frames[job]:.1f} s a frame", flush=True)
    print(f"\n{machine(torch.device('cpu'))}; {args.rounds} round(s) in turn, medians; the demo in seconds whole\n")
    rows = [
        [
            f"{job}, {place}",
            *(f"{median(getattr(t, part) for t in taken) / frames[job]:.1f}" for part in ("wall", "user", "system")),
            f"{max(t.peak for t in taken) / 2**30:.2f}",
        ]
        for (job, place), taken in found.items()
    ]
    table(["seconds a frame", "wall", "user", "system", "peak, GiB"], rows)


if __name__ == "__main__":
    main()
