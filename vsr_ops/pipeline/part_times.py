"""What each part of a job takes on this machine: short runs of the very parts on the clip's first frames.

Every part works on a square of the picture, larger from run to run until the time for it is spent, and is scaled by the
area that the job gives it, overlaps of tiles and chunks included. A second or two in all. On a machine that does other
work too, the processor's seconds of one thread stand for those on the wall.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from ..system.load import Watch, one_thread, speedup
from ..vae.latents import VAE_OVERLAP
from ..vae.layout import is_temporal
from .cost import networks
from .job import Job
from .operations import Operations
from .part_samples import FRAMES, Samples, Work, run_tile
from .plan_cost import plan_cuts
from .sampler import NoiseRange, Settings, run_steps, strengths
from .tile_time import TileSeconds, tile_seconds

#: Seconds that a part's second run may take, its last one, and the UNet's.
SECOND, PART, UNET = 0.6, 0.2, 1.5
#: Tiles in one call that say what more of them take each: those of small models up to a third less than one alone.
SEVERAL = 4
#: A part of less than this share of those that are known need not be known well.
NEGLIGIBLE = 0.03
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
    """Seconds of a whole job by part (a name in PARTS), and of one tile in the UNet (None: no step is taken); whether
    the machine was `busy` meanwhile: they are a quiet one's even so."""

    parts: Mapping[str, float]
    tile: TileSeconds | None = None
    busy: bool = False

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


def measure(work: Work, watch: Watch) -> PartTimes:
    """Times every part of a job, as on a quiet machine, where `watch` or the time of measuring itself says that it does
    other work. Raises as `time_parts`."""
    threads = torch.get_num_threads()
    if work.model.device.type != "cpu":
        return time_parts(work)
    if not watch.busy(threads):
        watch = Watch()
        times = time_parts(work)
        if not watch.busy(threads):
            return times
    return time_while_busy(work)


def time_while_busy(work: Work) -> PartTimes:
    """`time_parts` as they would be on a quiet machine: by the processor's seconds of one thread, over what more
    threads would gain. Several threads spend most of a busy machine's time waiting for each other."""
    gain = speedup(torch.get_num_threads())
    with one_thread():
        return replace(time_parts(replace(work, clock=lambda: time.process_time() / gain)), busy=True)


def time_parts(work: Work) -> PartTimes:
    """Times every part of a job, by its clock. Raises VSRError for an input that cannot be read."""
    job, parts, plan = work.job, work.parts, work.layout.settled
    reading, small = _read(work)
    samples, aligned = Samples(work, small), work.settings.align > 0 and work.settings.steps > 0
    readings = 2 + aligned + parts.of_decoder.sees_reference
    pixels = job.size[0] * job.size[1] * job.frames
    found = {"reading": job.frames * readings * reading}
    tile = time_tile(work) if work.settings.steps else None
    if tile is not None:
        found["UNet"] = sampling_seconds(work.layout, work.settings, NoiseRange.of(work.model), tile)

    def add(name: str, sample: Callable[[int], float], units: float) -> None:
        found[name] = _seconds(work, sample, units, sum(found.values()))

    # The dearest first: what others need not be known well beside.
    add("decode", samples.decode, _decoded_volume(work))
    add("encode", samples.encode, plan.height * plan.width * job.frames)
    enlarged = _upscaled_share(job) if parts.enlarging.is_learnt else readings
    add("upscaler", samples.enlarge, pixels * enlarged)
    if parts.refiner is not None:
        height, width = (_with_margins(side, parts.refiner.reach) for side in job.size)
        add("refiner", samples.refine, height * width * job.frames)
    if aligned and job.frames > 1:
        add("flow", samples.flow, pixels * (1 - 1 / job.frames))
    with tempfile.TemporaryDirectory() as folder:
        add("writing", lambda side: samples.write(side, Path(folder)), pixels)
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


def _seconds(work: Work, sample: Callable[[int], float], units: float, known: float) -> float:
    """Seconds of so many `units` of `sample(side)`, which returns how many it has done: on the largest square that
    there is, or the last whose successor would take more than SECOND or PART, or which is little of what is `known`."""

    def run(side: int) -> tuple[float, float]:
        began = work.clock()
        done = sample(side)
        return work.clock() - began, done

    side, (spent, done) = SIDES[0], run(SIDES[0])
    for larger in SIDES[1:]:
        # The first one says little: it is small, and all that is new is done in it.
        if 4 * spent > (SECOND if side == SIDES[0] else PART) or spent / done * units < NEGLIGIBLE * known:
            break
        before, side, (spent, done) = done, larger, run(larger)
        if done == before:
            break
    if spent / done * units >= NEGLIGIBLE * known:
        spent = min(spent, run(side)[0])  # what is first used takes up to twice as long
    return spent / done * units


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
    plan, together = work.layout.settled, work.parts.of_decoder.joins_frames
    chunk = work.model.tile.frames if together or is_temporal(work.model.vae.decoder) else 1
    scenes, overlap = [0, *plan_cuts(plan), plan.frames], VAE_OVERLAP if chunk > 1 else 0.0
    frames = sum(_covered(spans(b - a, chunk, overlap)) for a, b in pairwise(scenes))
    return frames * plan.height * plan.width


def time_tile(work: Work) -> TileSeconds:
    """A tile of the layout's largest plan."""
    plan, model = work.layout.largest, work.model
    tile = max((plan.tile_size(n) for n in range(len(plan.windows))), key=lambda size: size.frames)
    # Only a step that TAP acts in looks at another window; a run of one step has none.
    kinds = {step.kind for step in run_steps(work.settings, NoiseRange.of(model))}
    windows = 2 if len(plan.windows) > 1 and "tap" in kinds else 1
    operations = Operations(*networks(model))

    def run(size: TileSize) -> dict[Kind, float]:
        with operations.counted(size):
            return run_tile(work, size, windows)

    several = min(SEVERAL, _tiles_a_call(work))
    return tile_seconds(
        run, operations.of, tile, model.factor, UNET, lambda size: run_tile(work, size, windows, several)
    )


def _tiles_a_call(work: Work) -> int:
    """How many tiles the job's UNet calls have at least."""
    settings, all_tiles = work.settings, len(work.layout.largest.spatial)
    together = not settings.propagation.sap_lagged
    kinds = {step.kind for step in run_steps(settings, NoiseRange.of(work.model))}
    return all_tiles if together and kinds == {"sap"} else min(settings.batch, all_tiles)


def sampling_seconds(layout: TileLayout, settings: Settings, noise: NoiseRange, tile: TileSeconds) -> float:
    """Of all steps' tile passes, the frames of a shorter window counting as the share that they are."""
    guidance = guide(settings.guidance)
    total = 0.0
    for step, power in zip(run_steps(settings, noise), strengths(settings, noise), strict=True):
        plan = layout.at(step.index)
        frames = sum(window.span.length for window in plan.windows)
        total += guidance.passes(power) * len(plan.spatial) * frames / tile.tile.frames * tile.of(step.kind)
    return total
