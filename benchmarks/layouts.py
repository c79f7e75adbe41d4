"""Tile layouts where tiles drift apart: seams, flicker and error beside the number of tile passes.

The lite SVD holds so close to its LR latents that borders never show. Two things loosen that: the bundled Stable
Diffusion from pure noise, without control, and the lite SVD with weakened LR latents (`--strength`). For models of full
size, give a checkpoint that `python -m vsr_ops --model` takes.

    python -m benchmarks.layouts --data ../clips
    python -m benchmarks.layouts --data ../clips --model PATH --tile 64x64x14 --steps 25 --frames 30 --strength 1

Seams are gradients across the borders of a layout's tiles over those beside them, against the clip's own there (of
pure noise: against the same seed without tiles), the worst of its grids. Each figure is a mean over clips and seeds;
`+-` is twice the standard error of the difference from `paper`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import isfinite
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor

from training.data.held_out import shrunk, truths
from vsr_ops.backbones.sd import load_sd
from vsr_ops.backbones.svd import Backbone, load_svd, pick_device, pick_dtype
from vsr_ops.image.color import correct
from vsr_ops.image.resize import quantize8
from vsr_ops.metrics.pixels import psnr_y
from vsr_ops.metrics.seams import plan_borders, seam_ratio
from vsr_ops.metrics.table import aligned
from vsr_ops.metrics.time import flicker, warp_error
from vsr_ops.modules.dcm import load_dcm
from vsr_ops.pipeline.sampler import Settings, sample
from vsr_ops.sampling.layouts import LAYOUTS, TileLayout, laid_out, lay_out
from vsr_ops.sampling.propagation import PROPAGATION, Propagation
from vsr_ops.sampling.tiling import TileSize, plan_tiles
from vsr_ops.vae.encode import stream_encode
from vsr_ops.vae.latents import CELL, decode_frames
from vsr_ops.video.pictures import save_png8

#: Beside the table of layouts: without overlap, a quarter of it everywhere, and without tiles.
OTHERS: dict[str, Callable[[int, int, int, TileSize, int], TileLayout]] = {
    "no tiles": lambda f, h, w, _, k: laid_out(plan_tiles(f, h, w, TileSize(h, w, f), factor=k)),
    "no overlap": lambda f, h, w, tile, k: lay_out("balanced", f, h, w, tile, 0.0, factor=k),
    "a quarter": lambda f, h, w, tile, k: lay_out("balanced", f, h, w, tile, 0.25, factor=k),
}
#: Of layouts and propagation. SAP and TAP are taken apart where they have most and least to do.
ROWS = [
    *((name, "none") for name in (*OTHERS, *LAYOUTS)),
    *((name, kinds) for name, kinds in product(("no overlap", *LAYOUTS), ("sap", "tap", "sap+tap"))),
]
PICTURE = (240, 384)
#: A person, a car, and a photograph under a moving camera.
CLIPS = ("kite-surf", "car-shadow", "tea-gardens")


@dataclass(frozen=True)
class Case:
    """What is sampled: LR latents `(frames, 4, h, w)`; where there are such, the true and the enlarged pictures."""

    name: str
    lr: Tensor
    truth: Tensor | None = None
    large: Tensor | None = None


def cases_of(model: Backbone, data: Path, frames: int, strength: float) -> list[Case]:
    """Held-out clips, enlarged by the bundled DCM and encoded, their latents weakened."""
    upscale = load_dcm("lite", model.device)
    height, width = PICTURE
    clips = {name: clip for name, clip in truths(data, frames, False).items() if name in CLIPS}
    found: list[Case] = []
    for clip in shrunk({name: clip[..., :height, :width] for name, clip in clips.items()}, None):
        large = torch.cat([upscale(frame[None]).clamp(0, 1) for frame in clip.small])
        rows, cols = (-(-side // CELL // model.factor) * model.factor for side in clip.truth.shape[-2:])
        lr = torch.stack(list(stream_encode(model.vae, large, rows, cols)))
        found.append(Case(clip.name, lr * strength, clip.truth, large))
    return found


def plans_of(name: str, lr: Tensor, tile: TileSize, factor: int) -> TileLayout:
    frames, _, height, width = lr.shape
    if name in OTHERS:
        return OTHERS[name](frames, height, width, tile, factor)
    return lay_out(name, frames, height, width, tile, factor=factor)


def pictures(model: Backbone, latents: Tensor, truth: Tensor | None) -> Tensor:
    video = torch.stack(list(decode_frames(model, latents / model.scaling_factor, len(latents))))
    height, width = video.shape[-2:] if truth is None else truth.shape[-2:]
    return quantize8(video[..., :height, :width].clamp(0, 1))


def seams(result: Tensor, like: Tensor, layout: TileLayout) -> float:
    """The worst of the layout's grids; 1 where it has no borders."""
    height, width = result.shape[-2:]
    borders = [plan_borders(plan, height, width, CELL) for plan in layout.plans]
    return max((seam_ratio(result, like, b).mean().item() for b in borders if b.rows or b.cols), default=1.0)


def measure(result: Tensor, case: Case, untiled: Tensor, layout: TileLayout) -> dict[str, float]:
    """One row's figures for one clip and seed."""
    found = {"seams": seams(result, untiled if case.truth is None else case.truth, layout)}
    found["from untiled"] = (result - untiled).pow(2).mean().sqrt().item() * 255
    if case.truth is not None and case.large is not None:
        # The bundled VAE leaves the tones to what comes after it.
        result = correct("detail", result, case.large).clamp(0, 1)
        found["psnr_y"] = psnr_y(result, case.truth).mean().item()
        found["flicker"] = flicker(result, case.truth).nanmean().item()
        found["warp"] = warp_error(result, case.truth).nanmean().item()
    return found


def passes(layout: TileLayout, steps: int) -> int:
    return sum(layout.over(steps).at(index).tiles for index in range(steps))


def told(values: Sequence[float], beside: Sequence[float]) -> str:
    """The mean, and twice the standard error of the difference, clip by clip and seed by seed; a clip that has no such
    figure (flicker where nothing stands still) is left out."""
    pairs = [(a, b) for a, b in zip(values, beside, strict=True) if isfinite(a) and isfinite(b)]
    apart = [a - b for a, b in pairs]
    margin = f" +-{2 * stdev(apart) / len(apart) ** 0.5:.3f}" if len(apart) > 1 and any(apart) else ""
    return f"{mean(a for a, _ in pairs):.3f}{margin}" if pairs else "-"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="the folder of clips whose held-out ones are taken")
    add("--model", default="lite", help="lite, or a checkpoint of SVD")
    add("--noise", action="store_true", help="the bundled Stable Diffusion from pure noise instead")
    add("--device", default="auto")
    add("--dtype", default="auto")
    add("--tile", default="16x16x6")
    add("--frames", type=int, default=9)
    add("--steps", type=int, default=4)
    add("--start-sigma", type=float, help="from the LR latents at this noise level; from noise when left out")
    add("--strength", type=float, default=0.5, help="what the LR latents are multiplied with")
    add("--seeds", type=int, default=3)
    add("--rows", nargs="*", help="LAYOUT,PROPAGATION; all of them when left out")
    add("--save", type=Path, help="a folder for the last frames of each row")
    args = parser.parse_args()
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    model = load_sd("lite", device, dtype) if args.noise else load_svd(args.model, device, dtype)
    tile = TileSize.parse(args.tile)
    if args.noise:
        cases = [Case("noise", torch.zeros(tile.frames, 4, 48, 64))]
    else:
        cases = cases_of(model, args.data, args.frames, args.strength)
    rows = [tuple(row.split(",")) for row in args.rows] if args.rows else ROWS
    settings = Settings(steps=args.steps, guidance="none", tile=tile, start_sigma=args.start_sigma)
    for _, kinds in rows:
        assert kinds in PROPAGATION, kinds
    found: dict[tuple[str, str], list[dict[str, float]]] = {(name, kinds): [] for name, kinds in rows}
    counts: dict[tuple[str, str], int] = {}
    for case, seed in product(cases, range(args.seeds)):
        untiled: Tensor | None = None
        for name, kinds in [("no tiles", "none"), *(row for row in found if row != ("no tiles", "none"))]:
            layout = plans_of(name, case.lr, tile, model.factor)
            chosen = replace(settings, seed=seed, propagation=Propagation.named(kinds))
            result = pictures(model, sample(model, case.lr, layout, chosen), case.truth)
            untiled = result if untiled is None else untiled
            counts[name, kinds] = passes(layout, args.steps)
            if (name, kinds) in found:
                found[name, kinds].append(measure(result, case, untiled, layout))
            if args.save is not None and seed == 0:
                save(args.save, f"{case.name} {name} {kinds}", result)
        print(f"{case.name}, seed {seed}; until here:\n{report(found, counts)}\n", flush=True)


def save(folder: Path, name: str, result: Tensor) -> None:
    """The last frame as a picture."""
    folder.mkdir(parents=True, exist_ok=True)
    save_png8(folder / f"{name.replace(' ', '_')}.png", result[-1], None)


def report(found: dict[tuple[str, str], list[dict[str, float]]], counts: dict[tuple[str, str], int]) -> str:
    """Rows down, figures across."""
    keys = list(next(iter(found.values()))[0])
    beside = next((found[row] for row in (("paper", "none"),) if row in found), next(iter(found.values())))
    lines = [["layout", "propagation", "tile passes", *keys]]
    for (name, kinds), figures in found.items():
        values = [[each[key] for each in figures] for key in keys]
        others = [[each[key] for each in beside] for key in keys]
        shown = [told(v, o) for v, o in zip(values, others, strict=True)]
        lines.append([name, kinds, str(counts[name, kinds]), *shown])
    return aligned(lines, 2)


if __name__ == "__main__":
    main()
