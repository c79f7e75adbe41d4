"""What enlarges the input, alone: bicubic, the DCM, and the video upscaler on top of it, on clips kept out of training.

Means over the clips, clean and in H.264, what each clip gains over the DCM, and seconds a frame of 480x270, in turn.
`--videos` are files of your own that join the clips, `--with` other video upscalers' files.

    python -m benchmarks.enlarging --data ../clips --rounds 3
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.common import machine, table
from benchmarks.cpu import clip
from training.data.held_out import SCALE, Clip, shrunk, truths
from training.report.sdatc import filmed
from vsr_ops.image.resize import quantize8
from vsr_ops.metrics.report import Scores
from vsr_ops.metrics.scoring import score
from vsr_ops.modules.dcm import load_dcm
from vsr_ops.modules.enlarging import Enlarging
from vsr_ops.modules.video_upscaler import load_video_upscaler

METRICS = ("psnr_y", "vmaf_neg", "haarpsi", "tof", "warp_error", "flicker")
DCM = "DCM"
CPU = torch.device("cpu")
#: Rows, columns and frames of the input that is timed: enough for every frame to have its neighbours.
TIMED = (270, 480, 8)


def enlarged(by: Enlarging, small: Tensor) -> Tensor:
    """A clip four times larger, in 8-bit levels."""
    size = (small.shape[-2] * SCALE, small.shape[-1] * SCALE)
    return quantize8(torch.stack(list(by(small, size))))


def scored(methods: dict[str, Enlarging], clips: list[Clip]) -> Scores:
    """Every method on every clip."""
    results = {name: {each.name: enlarged(by, each.small) for each in clips} for name, by in methods.items()}
    return score(results, {each.name: each.truth for each in clips}, METRICS)


def gains(scores: Scores) -> list[list[str]]:
    """PSNR-Y of every clip over the DCM's, by method."""
    rows: list[list[str]] = []
    for method in scores.methods:
        over = [scores.value(method, "psnr_y", name) - scores.value(DCM, "psnr_y", name) for name in scores.clips]
        rows.append([method, *(f"{each:+.2f}" for each in over)])
    return rows


def seconds(methods: dict[str, Enlarging], rounds: int) -> list[list[str]]:
    """Seconds a frame of each method, one after the other in every round: medians."""
    height, width, count = TIMED
    small = clip((height, width), count)
    taken: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, by in methods.items():
            began = time.perf_counter()
            for _ in by(small, (height * SCALE, width * SCALE)):
                pass
            taken[name].append((time.perf_counter() - began) / count)
    return [[name, f"{median(each):.2f}", f"{median(each) / median(taken[DCM]):.2f}"] for name, each in taken.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of photographs and videos")
    add("--crf", type=int, nargs="+", default=[0, 25], help="0 is clean")
    add("--frames", type=int, default=8, help="of every clip")
    add("--videos", type=Path, nargs="+", default=[])
    add("--with", type=Path, nargs="+", default=[], dest="others", metavar="FILE")
    add("--large", action="store_true", help="the 1280x720 clip too")
    add("--rounds", type=int, default=0, help="of timing")
    args = parser.parse_args()
    dcm = load_dcm("lite", CPU)
    methods = {"bicubic": Enlarging(), DCM: Enlarging(dcm), "video": Enlarging(dcm, load_video_upscaler("lite"))}
    methods |= {file.stem: Enlarging(dcm, load_video_upscaler(file)) for file in args.others}
    known = truths(args.data, args.frames, args.large) | {path.stem: filmed(path, args.frames) for path in args.videos}
    for crf in args.crf:
        scores = scored(methods, shrunk(known, crf or None))
        print(f"\n{f'CRF {crf}' if crf else 'clean'}\n\n{scores.table()}\n", flush=True)
        table(["PSNR-Y over the DCM, dB", *scores.clips], gains(scores))
    if args.rounds:
        print(f"\n{machine(CPU)}; {args.rounds} rounds in turn, medians\n")
        table(["480x270", "s a frame", "of the DCM"], seconds(methods, args.rounds))


if __name__ == "__main__":
    main()
