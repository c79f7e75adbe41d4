"""Validation on clips kept out of training: x4, clean and H.264 apart, against bicubic, sharpened bicubic and DCM.

    python -m training.report.validation --data ../clips --out runs/validation

prints and writes the table that the model card shows; `--ablation` compares propagation and guidance instead.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import torch
from kornia.filters.unsharp import unsharp_mask
from torch import Tensor

from training.data.held_out import SCALE, Clip, shrunk, truths
from vsr_ops.backbones.svd import SVD, Backbone, load_svd, pick_device
from vsr_ops.cli.demo_clip import load_frames
from vsr_ops.errors import VSRError
from vsr_ops.image.resize import quantize8, resize_bicubic
from vsr_ops.metrics.report import Scores, check_folder, joined
from vsr_ops.metrics.scoring import score
from vsr_ops.metrics.table import aligned, written
from vsr_ops.modules.dcm import load_dcm
from vsr_ops.modules.refiner import load_refiner
from vsr_ops.pipeline.job import Job
from vsr_ops.pipeline.parts import PipelineModules
from vsr_ops.pipeline.sampler import NoiseRange, Settings, make_layout, unet_calls
from vsr_ops.pipeline.upscale import upscale
from vsr_ops.sampling.guidance import GUIDANCE
from vsr_ops.sampling.propagation import PROPAGATION, Propagation
from vsr_ops.sampling.tiling import TilePlan
from vsr_ops.system.allocator import keep_freed
from vsr_ops.system.outputs import files_of, held_folder, refuse_inputs
from vsr_ops.video import Frame, made_info, open_writer, probe

METRICS = "psnr_y,ssim_y,vmaf,vmaf_neg,gmsd,haarpsi,tof,warp_error,flicker,seam,color_drift"


def bicubic(small: Tensor) -> Tensor:
    """Antialiased bicubic x4, 8-bit: the baseline of the papers."""
    return quantize8(resize_bicubic(small, (small.shape[-2] * SCALE, small.shape[-1] * SCALE)).clamp(0, 1))


def sharpened(video: Tensor) -> Tensor:
    """Unsharp mask, radius 2, 100 %: what sharpening alone does to the metrics."""
    return quantize8(torch.cat([unsharp_mask(frame[None], (13, 13), (2.0, 2.0)) for frame in video]).clamp(0, 1))


def whole(model: Backbone, clip: Clip, settings: Settings, parts: PipelineModules) -> Tensor:
    """The main job on one clip, as the command line runs it: pictures in a folder in, pictures out."""
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "in", Path(folder) / "out"
        count, _, height, width = clip.small.shape
        info = made_info(width, height, count, Fraction(24))
        with open_writer(source, info, size=(height, width), codec="png8") as writer:
            for index, frame in enumerate(clip.small):
                writer.write(Frame(frame, None, index))
        found = probe(source)
        upscale(model, Job(found, 0, count, SCALE), output, settings, "png8", cuts=(), parts=parts)
        return quantize8(load_frames(output))


def plan_of(model: SVD, clip: Clip, settings: Settings) -> TilePlan:
    count, _, height, width = clip.small.shape
    info = made_info(width, height, count, Fraction(24))
    return make_layout(Job(info, 0, count, SCALE), settings, model.tile, model.factor, NoiseRange.of(model)).settled


def measured(
    methods: Mapping[str, Callable[[Clip], Tensor]], clips: Iterable[Clip], model: SVD, settings: Settings
) -> tuple[Scores, dict[str, float]]:
    """Scores of every method on every clip, and each method's seconds. One clip's results are held at a time."""
    parts: list[Scores] = []
    seconds = dict.fromkeys(methods, 0.0)
    for clip in clips:
        results: dict[str, dict[str, Tensor]] = {}
        for name, method in methods.items():
            start = time.monotonic()
            results[name] = {clip.name: method(clip)}
            seconds[name] += time.monotonic() - start
            print(f"  {clip.name}: {name} {time.monotonic() - start:.0f} s", flush=True)
        plan = plan_of(model, clip, settings)
        parts.append(score(results, {clip.name: clip.truth}, METRICS, borders=plan))
    return joined(parts), seconds


def comparison(model: SVD, settings: Settings, parts: PipelineModules) -> dict[str, Callable[[Clip], Tensor]]:
    """Baselines, the whole pipeline, and the pipeline with the LR latent in the sampled one's place."""
    upscale_fn = parts.upscale_fn or bicubic
    undiffused = replace(settings, steps=0)

    def dcm(clip: Clip) -> Tensor:
        return quantize8(torch.cat([upscale_fn(frame[None]) for frame in clip.small]))

    return {
        "bicubic": lambda clip: bicubic(clip.small),
        "bicubic+USM": lambda clip: sharpened(bicubic(clip.small)),
        "DCM": dcm,
        "DCM+USM": lambda clip: sharpened(dcm(clip)),
        "LR latent": lambda clip: whole(model, clip, undiffused, parts),
        "ours": lambda clip: whole(model, clip, settings, parts),
    }


def ablation_settings(settings: Settings) -> dict[str, Settings]:
    """Every guidance, at its own strengths, with every propagation."""
    return {
        f"{guidance}, {propagation}": replace(settings, propagation=Propagation.named(propagation), guidance=guidance)
        for guidance in GUIDANCE
        for propagation in PROPAGATION
    }


def ablation(model: SVD, settings: Settings, parts: PipelineModules) -> dict[str, Callable[[Clip], Tensor]]:
    """`ablation_settings` as methods."""

    def method(chosen: Settings) -> Callable[[Clip], Tensor]:
        return lambda clip: whole(model, clip, chosen, parts)

    return {name: method(chosen) for name, chosen in ablation_settings(settings).items()}


def ablation_rows(scores: Scores, seconds: Mapping[str, float], passes: Mapping[str, int]) -> str:
    """Methods down, metrics across: twenty methods do not fit side by side."""
    lines = [["guidance, propagation", *scores.names, "UNet calls", "seconds"]]
    for method in scores.methods:
        values = [written(name, scores.value(method, name)) for name in scores.names]
        lines.append([method, *values, str(passes[method]), f"{seconds[method]:.0f}"])
    return aligned(lines, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="folder for tables, CSV files and curves")
    parser.add_argument("--model", default="lite")
    parser.add_argument("--dcm", default="lite")
    parser.add_argument("--refiner", default="lite")
    parser.add_argument("--crf", type=int, nargs="*", default=[0, 25], help="0 is clean")
    parser.add_argument("--frames", type=int, default=8)
    # What the published tables of the bundled weights were measured with.
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", default="dssag")
    parser.add_argument("--clips", nargs="*", help="only these")
    parser.add_argument("--small", action="store_true", help="leave the 1280x720 clip out")
    parser.add_argument("--ablation", action="store_true")
    parser.add_argument("--overwrite", action="store_true", help="replace those files")
    args = parser.parse_args()
    try:
        with ExitStack() as held:
            if args.out is not None:
                for crf in args.crf:
                    check_folder(args.out / _folder(crf), args.overwrite)
                refuse_inputs(args.out, files_of(args.data))
                held.enter_context(held_folder(args.out))
            _run(args)
    except VSRError as error:
        parser.exit(2, f"error: {error}\n")


def _title(crf: int) -> str:
    return f"CRF {crf}" if crf else "clean"


def _folder(crf: int) -> str:
    return _title(crf).replace(" ", "_").lower()


def _run(args: argparse.Namespace) -> None:
    device = pick_device("auto")
    model = load_svd(args.model, device, torch.float32)
    parts = PipelineModules(load_dcm(args.dcm, device), load_refiner(args.refiner, device))
    settings = Settings(steps=args.steps, guidance=args.guidance, color="none")
    clips = truths(args.data, args.frames, not args.small)
    clips = {name: clip for name, clip in clips.items() if args.clips is None or name in args.clips}
    for crf in args.crf:
        methods = (ablation if args.ablation else comparison)(model, settings, parts)
        made = shrunk(clips, crf or None)
        scores, seconds = measured(methods, made, model, settings)
        if args.ablation:
            calls = {
                name: sum(unet_calls(plan_of(model, clip, s), s) for clip in made)
                for name, s in ablation_settings(settings).items()
            }
            text = ablation_rows(scores, seconds, calls)
        else:
            text = scores.table(by_clip=True)
        print(f"\n{_title(crf)}\n\n{text}\n", flush=True)
        if args.out is not None:
            scores.write(args.out / _folder(crf), overwrite=args.overwrite)


if __name__ == "__main__":
    keep_freed()
    main()
