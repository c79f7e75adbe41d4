"""Correctness: half precision against float32 at full size, and a card against the CPU on small models."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.full_size import report
from benchmarks.full_size.build import CONFIGS, MODELS, Sizes
from benchmarks.full_size.measure import release, small_plan
from benchmarks.full_size.report import Line
from benchmarks.full_size.rows import ROWS
from vsr_ops.backbones.svd import Backbone
from vsr_ops.pipeline.sampler import sample
from vsr_ops.sampling.calls import Call
from vsr_ops.sampling.guidance import COND
from vsr_ops.sampling.propagation import Propagation, TileRun
from vsr_ops.sampling.schedule import Step
from vsr_ops.sampling.tiling import TileSize, plan_tiles
from vsr_ops.vae.latents import CELL

HALVES = (torch.float16, torch.bfloat16)
#: What a card may differ by from the CPU in float32, as a share of the values' size.
AGREES = 1e-3
#: A noise level in the middle of both models' schedules.
SIGMA = 1.0


def error(found: Tensor, expected: Tensor) -> float:
    """The difference's size by that of what is expected."""
    return float((found - expected).norm() / expected.norm())


def drawn(*shape: int) -> Tensor:
    """The same noise at every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def outputs(model: Backbone, tile: TileSize, vae_tile: TileSize) -> dict[str, Tensor]:
    """What UNet and VAE make of one tile, on the CPU."""
    size = (tile.frames, tile.height, tile.width)
    call = Call(Step(0), COND, 0, (0,), *size)
    run = TileRun(plan_tiles(*size, tile, factor=model.factor), Propagation(()))
    x, lr = drawn(tile.frames, 8, tile.height, tile.width).split(4, dim=1)
    latents = drawn(vae_tile.frames, 4, vae_tile.height, vae_tile.width)
    picture = drawn(1, 3, vae_tile.height * CELL, vae_tile.width * CELL).sigmoid()
    with model.serving(run, call):
        denoised = model.denoise(x, SIGMA, lr, model.context(None), tile.frames)
    return {"UNet": denoised, "decoder": model.decode(latents), "encoder": model.encode(picture)}


def in_half(name: str, sizes: Sizes, device: torch.device, tile: TileSize, vae_tile: TileSize) -> list[Line]:
    """The relative error of each half precision against float32, one model in memory at a time."""
    expected: dict[str, Tensor] = {}
    lines: list[Line] = []
    for dtype in (torch.float32, *HALVES):
        what = f"{MODELS[name].title}, {str(dtype).removeprefix('torch.')}"
        model = MODELS[name].build(sizes, device, dtype)
        # What a card calls float32 is TF32 in convolutions; here it is the truth.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=dtype != torch.float32):
            found = outputs(model, tile, vae_tile)
        for part, value in found.items():
            computed = str(model.vae.dtype if part != "UNet" else dtype).removeprefix("torch.")
            if not bool(torch.isfinite(value).all()):
                lines.append(report.failure(f"{what}: {part}", ValueError("NaN or infinity")))
            elif dtype != torch.float32:
                kept = "" if computed == str(dtype).removeprefix("torch.") else f" (computed in {computed})"
                lines.append(Line(f"{what}: {part}{kept}", error=f"{error(value, expected[part]):.1e}").tell())
        if dtype == torch.float32:
            expected = found
        del model
        release()
    return lines


@torch.no_grad()
def as_on_the_cpu(name: str, device: torch.device) -> list[Line]:
    """Every row on a small model in float32, on the device against the CPU."""
    cpu = torch.device("cpu")
    models = {each: MODELS[name].build(CONFIGS["tiny"], each, torch.float32) for each in (cpu, device)}
    plan = small_plan(models[cpu].tile)
    lr = drawn(plan.frames, 4, plan.height, plan.width)
    lines: list[Line] = []
    for row in ROWS.values():
        settings = replace(row.settings, steps=2)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            there, here = (sample(models[each], lr, plan, settings) for each in (device, cpu))
        what, off = f"{MODELS[name].title}, small, {device.type} against the CPU: {row.title}", error(there, here)
        if off <= AGREES:
            lines.append(Line(what, error=f"{off:.1e}").tell())
        else:
            lines.append(report.failure(what, ValueError(f"{off:.1e} is above {AGREES}")))
    return lines
