"""Quality against the number of steps, for the bundled models: samplers, and starts from noise or from the LR latent.

Every row is the pipeline from the small clip to the refined pictures, on the middle of clips kept out of training. With
two steps or fewer DPM++ 2M is Euler's. 0 steps decodes the LR latent as it is.

    python -m benchmarks.fewer_steps --data ../clips
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

from benchmarks.clips import NAMES, Ready, parts_of_clips, pictures, ready, sampled
from benchmarks.common import machine, table
from vsr_ops.backbones.sd import load_sd
from vsr_ops.backbones.svd import Backbone, load_svd
from vsr_ops.metrics.report import Scores, joined
from vsr_ops.metrics.scoring import score
from vsr_ops.modules.control import load_control
from vsr_ops.modules.dcm import load_dcm
from vsr_ops.modules.refiner import load_refiner
from vsr_ops.pipeline.parts import PipelineModules
from vsr_ops.pipeline.sampler import Settings

METRICS = "psnr_y,vmaf_neg,haarpsi,warp_error,flicker"
#: Below so many steps DPM++ 2M takes Euler's alone.
SECOND_ORDER = 3


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options of what is measured on clips."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", type=Path, required=True)
    made.add_argument("--clips", nargs="*", default=NAMES)
    made.add_argument("--videos", type=Path, nargs="*", default=[], help="these files too, halved")
    made.add_argument("--frames", type=int, default=8)
    made.add_argument("--size", default="192x192", help="height and width of the result, multiples of 64")
    made.add_argument("--crf", type=int, default=25, help="0 is clean")
    made.add_argument("--model", choices=("svd", "sd"), default="svd", help="sd: Stable Diffusion with its control")
    return made


def bundled(name: str) -> Backbone:
    """The bundled model, float32 on the CPU."""
    device, dtype = torch.device("cpu"), torch.float32
    return load_svd("lite", device, dtype) if name == "svd" else load_sd("lite", device, dtype, load_control("lite"))


def read_clips(args: argparse.Namespace, model: Backbone, parts: PipelineModules) -> Iterator[Ready]:
    """The clips that the options name, one at a time."""
    height, width = map(int, args.size.split("x"))
    for clip in parts_of_clips(args.data, args.clips, args.frames, (height, width), args.crf or None, args.videos):
        yield ready(model, parts, clip)


def rows(steps: list[int], samplers: list[str], starts: list[str]) -> dict[str, Settings]:
    """By name: every number of steps, with each sampler that differs there, from each start."""
    found = {"LR latent, 0 steps": Settings(steps=0, guidance="none")}
    for start in starts:
        origin = None if start == "noise" else float(start)
        for count in steps:
            for sampler in samplers if count >= SECOND_ORDER else samplers[:1]:
                name = f"{start if origin is None else f'LR at {start}'}, {sampler}, {count}"
                found[name] = Settings(steps=count, guidance="none", sampler=sampler, start_sigma=origin)
    return found


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=1, help="so many takes of each row, from seed 0")
    options.add_argument("--steps", type=int, nargs="*", default=[1, 2, 3, 4, 6, 10])
    options.add_argument("--samplers", nargs="*", default=["euler", "dpmpp_2m"])
    options.add_argument("--starts", nargs="*", default=["noise", "1"], help="noise, or a noise level of the LR latent")
    args = options.parse_args()
    device, model = torch.device("cpu"), bundled(args.model)
    parts = PipelineModules(load_dcm("lite", device), load_refiner("lite", device))
    chosen = rows(args.steps, args.samplers, args.starts)
    print(
        f"{', '.join(args.clips)}: {args.frames} frames of {args.size}, CRF {args.crf}; {machine(device)}\n", flush=True
    )
    scores: list[Scores] = []
    seconds = dict.fromkeys(chosen, 0.0)
    for video in read_clips(args, model, parts):
        clip = video.clip.name
        for name, seed in product(chosen, range(args.seeds)):
            start = time.perf_counter()
            latents = sampled(model, video, replace(chosen[name], seed=seed))
            seconds[name] += time.perf_counter() - start
            result, take = pictures(model, parts, video, latents), f"{clip}, seed {seed}"
            scores.append(score({name: {take: result}}, {take: video.clip.truth}, METRICS))
            print(f"  {take}: {name}: {_line(scores[-1], name)}", flush=True)
    print()
    table(
        ["start, sampler, steps", *METRICS.split(","), "s of sampling"],
        [[name, *_means(scores, name), f"{seconds[name]:.1f}"] for name in chosen],
    )


def _means(scores: list[Scores], method: str) -> list[str]:
    """A method's metrics over the clips."""
    own = joined([each for each in scores if each.methods == (method,)])
    return [f"{own.value(method, name):.4g}" for name in METRICS.split(",")]


def _line(scores: Scores, method: str) -> str:
    return " ".join(f"{name} {scores.value(method, name):.5g}" for name in METRICS.split(","))


if __name__ == "__main__":
    main()
