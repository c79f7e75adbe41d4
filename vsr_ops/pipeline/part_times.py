"""What each part of a job takes on this machine: short runs of the very parts on the clip's first frames.

Every part works on a square of the picture, larger from run to run until the time for it is spent, and is scaled by the
area that the job gives it, overlaps of tiles and chunks included. A second or two in all.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from ..modules.dcm import tile_spans
from ..modules.refiner import TILE
from ..sampling.guidance import guide
from ..sampling.layouts import TileLayout
from ..sampling.schedule import Kind
from ..sampling.tiling import Span, TileSize, cores, even_part, spans
from ..vae.latents import VAE_OVERLAP, vae_plan
from ..vae.layout import is_temporal
from .cost import networks
from .job import Job
from .operations import Operations
from .part_samples import FRAMES, Samples, Work, run_tile
from .plan_cost import plan_cuts
from .sampler import NoiseRange, Settings, run_steps, strengths
from .tile_time import TileSeconds, tile_seconds

#: Seconds that a part's last run may take, and the UNet's.
PART, UNET = 0.2, 2.0
#: Sides in latents of the squares that a part is tried on, in turn.
SIDES = (8, 16, 32, 64)

#: The parts of a job in their order, and the stage of a run that each belongs to.
PARTS = {
    "reading": "encode",
    "upscaler": "encode",
    "encode": "encode",
    "flow": "flow",
    "UNet": "sample",
    "decode": "decode",
    "refiner": "decode",
    "writing": "decode",
}


@dataclass(frozen=True)
class PartTimes:
    """Seconds of a whole job by part (a name in PARTS), and of one tile in the UNet (None: no step is taken)."""

    parts: Mapping[str, float]
    tile: TileSeconds | None = None

    @property
    def total(self) -> float:
        """Of the whole job."""
        return sum(self.parts.values())

    @property
    def dearest(self) -> str:
        """The part that takes most."""
        return max(self.parts, key=lambda name: self.parts[name])

    @property
    def stages(self) -> dict[str, float]:
        """By the stages that a run reports its progress in."""
        found: dict[str, float] = {}
        for name, seconds in self.parts.items():
            found[PARTS[name]] = found.get(PARTS[name], 0.0) + seconds
        return found


def time_parts(work: Work) -> PartTimes:
    """Times every part of a job. Raises VSRError for an input that cannot be read."""
    job, parts, plan = work.job, work.parts, work.layout.settled
    reading, small = _read(work)
    samples, aligned = Samples(work, small), work.settings.align > 0 and work.settings.steps > 0
    readings = 2 + aligned + (parts.of_decoder.acting.cfw is not None)
    pixels = job.size[0] * job.size[1] * job.frames
    encoded = vae_plan(1, plan.height, plan.width)
    volume = _covered(encoded.rows) * _covered(encoded.cols) * job.frames
    found = {
        "reading": job.frames * readings * reading,
        "upscaler": _each(work, samples.enlarge)
        * pixels
        * (readings if parts.upscale_fn is None else _upscaled_share(job)),
        "encode": _each(work, samples.encode) * volume,
    }
    if aligned and job.frames > 1:
        found["flow"] = _each(work, samples.flow) * pixels * (1 - 1 / job.frames)
    tile = time_tile(work) if work.settings.steps else None
    if tile is not None:
        found["UNet"] = sampling_seconds(work.layout, work.settings, NoiseRange.of(work.model), tile)
    found["decode"] = _each(work, samples.decode) * _decoded_volume(work)
    if parts.refiner is not None:
        height, width = (_with_margins(side, parts.refiner.reach) for side in job.size)
        found["refiner"] = _each(work, samples.refine) * height * width * job.frames
    with tempfile.TemporaryDirectory() as folder:
        found["writing"] = _each(work, lambda side: samples.write(side, Path(folder))) * pixels
    return PartTimes(found, tile)


def _read(work: Work) -> tuple[float, Tensor]:
    """Seconds to read a frame, and the first few `(n, 3, h, w)`."""
    frames: list[Tensor] = []
    began = work.clock()
    for frame in work.job.read():
        if not frames:
            began = work.clock()  # opening is done once
        frames.append(frame.image)
        if len(frames) == 1 + FRAMES:
            break
    return (work.clock() - began) / max(len(frames) - 1, 1), torch.stack(frames)


def _each(work: Work, sample: Callable[[int], float]) -> float:
    """Seconds a unit of `sample(side)`, which returns how many it has done: on the largest square that there is, or
    the last whose successor would take more than PART. The better of two, as what is first used takes longer."""
    spent, units = 0.0, -1.0
    for side in SIDES:
        before, runs = units, list[float]()
        for _ in range(2):
            began = work.clock()
            units = sample(side)
            runs.append(work.clock() - began)
        spent = min(runs)
        if 4 * spent > PART or units == before:
            break
    return spent / units


def _covered(parts: Sequence[Span]) -> int:
    return sum(span.length for span in parts)


def _with_margins(side: int, reach: int) -> int:
    """Of a side in pixels, as the refiner goes over it: every tile with what its layers reach."""
    return sum(part.outer.stop - part.outer.start for part in cores(side, even_part(side, TILE), reach))


def _upscaled_share(job: Job) -> float:
    """How often an upscaler goes over a picture's pixels."""
    height, width = job.info.height, job.info.width
    return _covered(tile_spans(height)) * _covered(tile_spans(width)) / (height * width)


def _decoded_volume(work: Work) -> int:
    """Latent pixels that the decoder goes over: frames that see each other go in chunks that overlap."""
    plan, stam = work.layout.settled, work.parts.of_decoder.acting.stam
    chunk = work.model.tile.frames if stam is not None or is_temporal(work.model.vae.decoder) else 1
    scenes, overlap = [0, *plan_cuts(plan), plan.frames], VAE_OVERLAP if chunk > 1 else 0.0
    frames = sum(_covered(spans(b - a, chunk, overlap)) for a, b in pairwise(scenes))
    return frames * plan.height * plan.width


def time_tile(work: Work) -> TileSeconds:
    """A tile of the layout's largest plan."""
    plan, model = work.layout.largest, work.model
    tile = max((plan.tile_size(n) for n in range(len(plan.windows))), key=lambda size: size.frames)
    windows = 2 if len(plan.windows) > 1 and "tap" in work.settings.propagation.kinds else 1
    operations = Operations(*networks(model))

    def run(size: TileSize) -> dict[Kind, float]:
        with operations.counted(size):
            return run_tile(work, size, windows)

    return tile_seconds(run, operations.of, tile, model.factor, UNET)


def sampling_seconds(layout: TileLayout, settings: Settings, noise: NoiseRange, tile: TileSeconds) -> float:
    """Of all steps' tile passes, the frames of a shorter window counting as the share that they are."""
    guidance = guide(settings.guidance)
    total = 0.0
    for step, power in zip(run_steps(settings, noise), strengths(settings, noise), strict=True):
        plan = layout.at(step.index)
        frames = sum(window.span.length for window in plan.windows)
        total += guidance.passes(power) * len(plan.spatial) * frames / tile.tile.frames * tile.of(step.kind)
    return total
