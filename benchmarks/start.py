"""How long `plan` takes, from its start to its end: on the wall, and of the processor, user and system.

    python -m benchmarks.start --against ../before

`--against` is a checkout of another commit, run in turn with this one.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

from benchmarks.common import machine, table
from vsr_ops.cli.demo_clip import degraded, write_video

ROOT = Path(__file__).resolve().parents[1]


def spent(root: Path, clip: Path) -> tuple[float, float]:
    """Seconds on the wall and of the processor that `plan` takes in the checkout at `root`."""
    before = os.times()
    subprocess.run([sys.executable, "-m", "vsr_ops", "plan", str(clip)], cwd=root, check=True, stdout=subprocess.PIPE)
    after = os.times()
    processor = (after.children_user + after.children_system) - (before.children_user + before.children_system)
    return after.elapsed - before.elapsed, processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="a checkout of another commit")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    roots = {"now": ROOT} | ({} if args.against is None else {"before": args.against.resolve()})
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in roots}
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "in.mp4"
        frames = F.interpolate(degraded(), size=(270, 480), mode="bilinear").clamp(0, 1)
        write_video(clip, torch.cat([frames] * 3)[:60])
        for _ in range(args.rounds):
            for name, root in roots.items():
                found[name].append(spent(root, clip))
    print(f"plan of 60 frames of 480x270, {args.rounds} rounds, on {machine(torch.device('cpu'))}\n")
    rows: list[list[str]] = []
    for name, rounds in found.items():
        wall, processor = zip(*rounds, strict=True)
        rows.append([name, *(f"{figure(each):.1f}" for each in (wall, processor) for figure in (median, min))])
    table(["", "wall, s", "least", "user + system, s", "least"], rows)


if __name__ == "__main__":
    main()
