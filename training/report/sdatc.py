"""SDATC's ablations, tables IV to VII of the paper: each part added to the same base, ours beside the published.

    python -m training.report.sdatc --data ../clips --out runs/sdatc

The rows differ in one part; clips, noise and everything else are the same. The published rows are of REDS4, SD 2.1 and
metrics that need downloads: they say which way a part acts, not what ours compares with.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from training.data.data import halve
from training.data.held_out import SCALE, Clip, shrunk, truths
from training.report.validation import sharpened, whole
from vsr_ops.backbones.sd import load_sd
from vsr_ops.backbones.svd import SVD, Backbone, load_svd, pick_device
from vsr_ops.errors import VSRError
from vsr_ops.image.resize import quantize8, resize_bicubic
from vsr_ops.metrics.pixels import check_equal
from vsr_ops.metrics.report import joined
from vsr_ops.metrics.scoring import score
from vsr_ops.metrics.table import aligned, written
from vsr_ops.modules.capm_file import load_capms
from vsr_ops.modules.cfw import load_cfw
from vsr_ops.modules.compression import load_compression
from vsr_ops.modules.control import load_control
from vsr_ops.modules.dcm import load_dcm
from vsr_ops.modules.refiner import load_refiner
from vsr_ops.modules.stam import load_stam
from vsr_ops.pipeline.parts import CAPMSettings, PipelineModules
from vsr_ops.pipeline.sampler import Settings
from vsr_ops.system.allocator import keep_freed
from vsr_ops.system.outputs import files_of, held_folder, refuse_inputs, refuse_taken
from vsr_ops.system.outputs import whole as whole_file
from vsr_ops.video import probe, read_frames

METRICS = "psnr_y,ssim_y,vmaf,vmaf_neg,haarpsi,tof,warp_error,flicker"
SD_STEPS = 10
START = 40
MODULES = ("dcm", "refiner", "capm", "cfw", "stam", "compression", "sd", "control")
"""Options that name files of weights."""
WINDOW = 7
"""Side of the neighbourhood that LDL's local variance is taken over."""

PUBLISHED = """
Table IV, REDS4 at CRF 25 | DISTS | NIQE | MANIQA | CLIP-IQA
Baseline | 0.1551 | 4.104 | 0.1694 | 0.1470
+USM | 0.1451 | 4.107 | 0.1796 | 0.1670
+DiffBIR | 0.1215 | 3.293 | 0.2655 | 0.3169
+TMSA | 0.1408 | 3.475 | 0.2354 | 0.2486
+DCM | 0.1005 | 2.964 | 0.3386 | 0.4371

Table V, REDS4 at CRF 25 | PSNR/SSIM | NIQE | MANIQA | CLIP-IQA
Baseline | 26.26/0.7009 | 4.104 | 0.1694 | 0.1470
+Prompt | 26.29/0.7006 | 3.882 | 0.1867 | 0.1767
+Softmax | 26.32/0.7015 | 3.903 | 0.1861 | 0.1820
+CAPM | 26.58/0.7110 | 3.803 | 0.2080 | 0.2053

Table VI, perception-sensitive pixel loss | CRF 15 | CRF 25 | CRF 35
Baseline | 0.2348 | 0.3137 | 0.5263
+CAPM | 0.2058 | 0.2868 | 0.5072

Table VII, REDS4 at CRF 25 | VMAF | NIQE | MANIQA | CLIP-IQA
Baseline | 35.70 | 4.104 | 0.1694 | 0.1470
+STAM | 44.53 | 3.200 | 0.3620 | 0.4869
SDATC | 67.22 | 2.796 | 0.3796 | 0.5616
"""


def perception_sensitive(result: Tensor, truth: Tensor) -> Tensor:
    """LDL's artifact loss of two videos `(frames, 3, h, w)` in [0, 1] (Liang et al., CVPR 2022, without its moving
    average): the error, weighted by its local variance and by the fifth root of its variance over the frame.

    One value per frame, times 1000. Raises SettingError for sizes that differ.
    """
    check_equal(result, truth)
    error = (truth - result).float()
    size = error.abs().sum(1, keepdim=True)
    pad = WINDOW // 2
    patches = F.unfold(F.pad(size, (pad, pad, pad, pad), mode="reflect"), WINDOW)
    local = patches.var(1).unflatten(-1, size.shape[-2:])[:, None]
    over_frame = size.flatten(1).var(1)[:, None, None, None] ** 0.2
    return 1000 * (over_frame * local * error).abs().mean((1, 2, 3))


@dataclass(frozen=True)
class Row:
    """A name, and what makes it from a clip."""

    name: str
    method: Callable[[Clip], Tensor]


def rows(model: SVD, settings: Settings, base: PipelineModules, named: Mapping[str, str]) -> dict[str, list[Row]]:
    """The rows of each table: the bundled pipeline, its parts put in and out. `named`: the files of the modules."""
    cpu = model.device

    def run(parts: PipelineModules, backbone: Backbone = model, **changed: object) -> Callable[[Clip], Tensor]:
        return lambda clip: whole(backbone, clip, replace(settings, **changed), parts)  # type: ignore[arg-type]

    def enlarged_sharply(frames: Tensor) -> Tensor:
        return sharpened(resize_bicubic(frames, (frames.shape[-2] * SCALE, frames.shape[-1] * SCALE)).clamp(0, 1))

    capms, head = load_capms(named["capm"], cpu), load_compression(named["compression"], cpu)
    prompts = CAPMSettings(capms, head=head)
    cfw, stam = load_cfw(named["cfw"], cpu), load_stam(named["stam"], cpu)
    told = replace(base, prompts=prompts)
    control = load_control(named["control"], cpu)
    sd, controlled = (load_sd(named["sd"], cpu, torch.float32, which) for which in (None, control))
    bare = replace(base, refiner=None)
    return {
        "IV": [
            Row("Baseline (bicubic)", run(replace(base, upscale_fn=None))),
            Row("+USM", run(replace(base, upscale_fn=enlarged_sharply))),
            Row("+DCM", run(base)),
        ],
        "control": [
            Row("LR latent", run(base, steps=0)),
            Row("SD, noise alone", run(base, sd, steps=SD_STEPS)),
            Row("SD, from the LR latent at 0.3", run(base, sd, steps=SD_STEPS, denoise=0.3)),
            Row("SD + control", run(base, controlled, steps=SD_STEPS)),
            Row("SVD", run(base)),
        ],
        "V": [
            Row("Baseline", run(base)),
            Row("+CAPM, UNet", run(replace(base, prompts=replace(prompts, capms=replace(capms, vae=None))))),
            Row("+CAPM, decoder", run(replace(base, prompts=replace(prompts, capms=replace(capms, unet=None))))),
            Row("+CAPM", run(told)),
            Row("+CAPM, untold", run(replace(base, prompts=replace(prompts, head=None)))),
        ],
        "align": [
            Row("Baseline, no refiner", run(bare, color="detail")),
            Row("+gradient, lambda 0.5", run(bare, color="detail", align=0.5)),
            Row("+propagate, lambda 0.1", run(bare, color="detail", align=0.1, align_mode="propagate")),
        ],
        "VI": [Row("Baseline", run(base)), Row("+CAPM", run(told))],
        "VII": [
            Row("Baseline", run(base)),
            Row("+STAM", run(replace(base, stam=stam))),
            Row("+CFW 0.75", run(replace(base, cfw=cfw, decode_w=0.75))),
            Row("all", run(replace(told, stam=stam, cfw=cfw, decode_w=0.75))),
            Row("Baseline, no refiner", run(bare, color="detail")),
            Row("+STAM, no refiner", run(replace(bare, stam=stam), color="detail")),
            *(
                Row(f"+CFW {w:g}, no refiner", run(replace(bare, cfw=cfw, decode_w=w), color="detail"))
                for w in (0.25, 0.5, 0.75, 1.0)
            ),
        ],
    }


def filmed(path: Path, frames: int) -> Tensor:
    """`frames` frames from the 40th on of a video file, halved against its own compression, as `truths` has clips."""
    video = torch.stack([frame.image for frame in read_frames(probe(path), START, START + frames)])
    small = halve((255 * video).round().to(torch.uint8)).float() / 255
    height, width = (side // 8 * 8 for side in small.shape[-2:])
    return quantize8(small[..., :height, :width])


def measured(made: list[Row], clips: list[Clip]) -> str:
    """A table: rows down, metrics across, means over the clips."""
    scores = joined(
        score({row.name: {clip.name: row.method(clip)} for row in made}, {clip.name: clip.truth}, METRICS)
        for clip in clips
    )
    lines = [["", *scores.names]]
    lines += [[row.name, *(written(name, scores.value(row.name, name)) for name in scores.names)] for row in made]
    return aligned(lines, 1)


def sensitive(made: list[Row], clips: Mapping[int, list[Clip]]) -> str:
    """Table VI: the perception-sensitive pixel loss, CRFs across."""
    lines = [["", *(f"CRF {crf}" for crf in clips)]]
    for row in made:
        values = [
            torch.stack([perception_sensitive(row.method(clip), clip.truth).mean() for clip in some]).mean()
            for some in clips.values()
        ]
        lines.append([row.name, *(f"{float(value):.4f}" for value in values)])
    return aligned(lines, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="folder for the tables")
    parser.add_argument("--model", default="lite")
    for name in MODULES:
        parser.add_argument(f"--{name}", default="lite")
    parser.add_argument("--tables", nargs="*", default=["IV", "control", "V", "VI", "VII", "align"])
    parser.add_argument("--crf", type=int, nargs="*", default=[25], help="of all tables but VI, which takes 15, 25, 35")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--clips", nargs="*", help="only these")
    parser.add_argument("--videos", type=Path, nargs="*", default=[], help="these files too")
    parser.add_argument("--small", action="store_true", help="leave the 1280x720 clip out")
    parser.add_argument("--overwrite", action="store_true", help="replace those tables")
    args = parser.parse_args()
    try:
        with ExitStack() as held:
            if args.out is not None:
                for table in args.tables:
                    for crf in _crfs(table, args):
                        refuse_taken(_file(args.out, table, crf), args.overwrite)
                named = [Path(getattr(args, name)) for name in ("model", *MODULES)]
                given = [path for path in (args.data, *args.videos, *named) if path.exists()]
                refuse_inputs(args.out, [file for path in given for file in files_of(path)])
                held.enter_context(held_folder(args.out))
            _run(args)
    except VSRError as error:
        parser.exit(2, f"error: {error}\n")


def _crfs(table: str, args: argparse.Namespace) -> list[str]:
    """What the tables of one name are of."""
    return ["CRF 15, 25, 35"] if table == "VI" else [f"CRF {crf}" for crf in args.crf]


def _file(folder: Path, table: str, crf: str) -> Path:
    return folder / f"table_{table}_{crf}.txt".replace(" ", "_").replace(",", "")


def _run(args: argparse.Namespace) -> None:
    device = pick_device("auto")
    model = load_svd(args.model, device, torch.float32)
    base = PipelineModules(load_dcm(args.dcm, device), load_refiner(args.refiner, device))
    settings = Settings(steps=args.steps, guidance="none", color="none")
    clips = truths(args.data, args.frames, not args.small)
    clips = {name: clip for name, clip in clips.items() if args.clips is None or name in args.clips}
    clips |= {path.stem: filmed(path, args.frames) for path in args.videos}
    made = rows(model, settings, base, vars(args))
    for table in args.tables:
        crfs = [15, 25, 35] if table == "VI" else args.crf
        degraded = {crf: shrunk(clips, crf) for crf in crfs}
        texts = (
            {"CRF 15, 25, 35": sensitive(made[table], degraded)}
            if table == "VI"
            else {f"CRF {crf}": measured(made[table], some) for crf, some in degraded.items()}
        )
        for crf, text in texts.items():
            shown = f"Table {table}, ours, {crf}\n\n{text}\n"
            print(shown, flush=True)
            if args.out is not None:
                with whole_file(_file(args.out, table, crf), args.overwrite) as part:
                    part.write_text(shown)
    print(PUBLISHED)


if __name__ == "__main__":
    keep_freed()
    main()
