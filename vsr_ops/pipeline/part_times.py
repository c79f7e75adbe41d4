"""What each part of a job takes on this machine: short runs of the very parts on the clip's first frames.

Every part works on a square of the picture, larger from run to run until the time for it is spent, and is scaled by the
area that the job gives it, overlaps of tiles and chunks included. A second or two in all.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise
from pathlib import Path

import torch
from torch import Tensor

from ..backbones.svd import Backbone
from ..flow.field import streamed_flow
from ..image.color import correct
from ..image.upscale import upscale_frames
from ..modules import dcm
from ..modules.refiner import CHUNK, TILE
from ..sampling.align import SHARE
from ..sampling.calls import Call, calls, gather_tiles
from ..sampling.guidance import COND, guide
from ..sampling.layouts import TileLayout
from ..sampling.propagation import TileRun
from ..sampling.schedule import Kind, Step
from ..sampling.tiling import TilePlan, TileSize, cores, plan_tiles, spans
from ..vae.latents import CELL, VAE_OVERLAP, VAE_TILE, encode_frames
from ..video import Frame, made_info, open_writer
from .cost import tile_flops
from .job import Job, from_levels, to_levels
from .parts import PipelineModules, apply_capm, decoded, refined
from .sampler import NoiseRange, Settings, run_steps, strengths
from .tile_time import TileSeconds, tile_seconds

#: Seconds for a part's last run, and for the UNet's.
PART, UNET = 0.2, 1.0
#: Sides in latents of the squares that a part is tried on, in turn; the decoder's and the refiner's frames.
SIDES, FRAMES = (8, 16, 32, 64), 2

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
    def stages(self) -> dict[str, float]:
        """By the stages that a run reports its progress in."""
        found: dict[str, float] = {}
        for name, seconds in self.parts.items():
            found[PARTS[name]] = found.get(PARTS[name], 0.0) + seconds
        return found


def time_parts(
    model: Backbone, job: Job, layout: TileLayout, settings: Settings, parts: PipelineModules, codec: str = "h264"
) -> PartTimes:
    """Times every part of a job. Raises VSRError for an input that cannot be read."""
    reading, small = _read(job)
    sample = _Sample(model, job, settings, parts, small)
    plan = layout.settled
    readings = 2 + (settings.align > 0 and settings.steps > 0) + (parts.of_decoder.acting.cfw is not None)
    upscaled = _pixels(job) * (readings if parts.upscale_fn is None else _upscaled_share(job))
    found = {
        "reading": job.frames * readings * reading,
        "upscaler": _grown(sample.enlarge) * upscaled * job.frames,
        "encode": _grown(sample.encode) * _tiled(plan.height, plan.width, VAE_TILE, VAE_OVERLAP) * job.frames,
    }
    if settings.align > 0 and settings.steps > 0 and job.frames > 1:
        found["flow"] = _grown(sample.flow) * _pixels(job) * (job.frames - 1)
    tile = None
    if settings.steps:
        tile = time_tile(model, layout, settings, parts)
        found["UNet"] = sampling_seconds(layout, settings, NoiseRange.of(model), tile)
    found["decode"] = _grown(sample.decode) * _decoded_volume(model, parts, plan)
    if parts.refiner is not None:
        height, width = (_with_margins(side, parts.refiner.reach) for side in job.size)
        found["refiner"] = _grown(sample.refine) * height * width * job.frames
    with tempfile.TemporaryDirectory() as folder:
        found["writing"] = _grown(lambda side: sample.write(side, Path(folder), codec)) * _pixels(job) * job.frames
    return PartTimes(found, tile)


def _pixels(job: Job) -> int:
    """Of a frame of the result."""
    return job.size[0] * job.size[1]


def _read(job: Job) -> tuple[float, Tensor]:
    """Seconds to read a frame, and the first few `(n, 3, h, w)`."""
    frames: list[Tensor] = []
    began = time.perf_counter()
    for frame in job.read():
        if not frames:
            began = time.perf_counter()  # opening is done once
        frames.append(frame.image)
        if len(frames) == 1 + FRAMES:
            break
    return (time.perf_counter() - began) / max(len(frames) - 1, 1), torch.stack(frames)


def _grown(work: Callable[[int], float], sides: Sequence[int] = SIDES, seconds: float = PART) -> float:
    """Seconds a unit of `work(side)`, which returns how many it has done: on the last square whose successor would take
    more than `seconds`."""
    work(sides[0])  # what is first used takes longer
    spent = units = 0.0
    for side in sides:
        began = time.perf_counter()
        units = work(side)
        spent = time.perf_counter() - began
        if 4 * spent > seconds:
            break
    return spent / units


class _Sample:
    """The parts of a job, each on a square of its first frames; every method returns how many units it has done."""

    def __init__(self, model: Backbone, job: Job, settings: Settings, parts: PipelineModules, small: Tensor) -> None:
        self._model, self._job, self._settings, self._parts, self._small = model, job, settings, parts, small

    def _square(self, side: int) -> tuple[Tensor, int]:
        """The middle of the first frames, `side` latents or as many as there are, and the pixels of its result's sides
        (a multiple of a latent's)."""
        pixels = min(side, *(-(-each // CELL) for each in self._job.size)) * CELL
        small = max(1, round(pixels / self._job.scale))
        height, width = self._small.shape[-2:]
        top, left = max((height - small) // 2, 0), max((width - small) // 2, 0)
        return self._small[..., top : top + small, left : left + small], pixels

    def _enlarged(self, side: int) -> Tensor:
        """Frames of a square at the result's size, as a part after the upscaler sees them: `(n, 3, h, w)`."""
        small, pixels = self._square(side)
        return upscale_frames(small, (pixels, pixels))

    def enlarge(self, side: int) -> float:
        """Pixels of the result, kept and read again."""
        small, pixels = self._square(side)
        image = upscale_frames(small[:1], (pixels, pixels), upscale_fn=self._parts.upscale_fn)
        if self._parts.upscale_fn is not None:
            levels = to_levels(image)
            for _ in range(2):
                from_levels(levels)
        return pixels**2

    def encode(self, side: int) -> float:
        """Latent pixels."""
        frame = self._enlarged(side)[0]
        sides = [each // CELL for each in frame.shape[-2:]]
        list(encode_frames(self._model, [frame], *sides))
        return sides[0] * sides[1]

    def flow(self, side: int) -> float:
        """Pixels of a pair of frames."""
        frames = self._enlarged(side)[-2:]
        size = (frames.shape[-2] // CELL, frames.shape[-1] // CELL)
        streamed_flow(iter(frames), len(frames), size, CELL, (), SHARE, lambda _: None, self._parts.flow)
        return frames[0, 0].numel()

    def decode(self, side: int) -> float:
        """Latent pixels over all frames."""
        frames = self._enlarged(side)[-FRAMES:]
        latents = _noise(len(frames), *(side // CELL for side in frames.shape[-2:]))
        levels = None if self._parts.prompts is None else torch.full((len(frames),), 0.5)

        def references() -> Iterator[Frame]:
            return (Frame(frame, None, n) for n, frame in enumerate(frames))

        size = (frames.shape[-2], frames.shape[-1])
        for _ in decoded(self._model, latents, self._parts, levels, references, size, ()):
            pass
        return latents[:, 0].numel()

    def refine(self, side: int) -> float:
        """Pixels over all frames."""
        assert self._parts.refiner is not None, "asked for where there is one"
        # More than a chunk, as chunks overlap.
        count = CHUNK + self._parts.refiner.frames + 1
        frames = [frame for _, frame in zip(range(count), cycle(self._enlarged(side)), strict=False)]
        pairs = ((frame, Frame(frame, None, n)) for n, frame in enumerate(frames))
        for _ in refined(self._parts, pairs, ()):
            pass
        return count * frames[0][0].numel()

    def write(self, side: int, folder: Path, codec: str) -> float:
        """Pixels over all frames, their colours corrected."""
        frames = self._enlarged(side)
        count, _, height, width = frames.shape
        output = folder / f"{side}{ENDINGS.get(codec, '')}"
        info, size = made_info(width, height, count), (height, width)
        with open_writer(output, info, size=size, codec=codec, overwrite=True) as writer:
            for n, frame in enumerate(frames):
                image = correct(self._settings.color, frame[None], frame[None])[0].clamp(0, 1)
                writer.write(Frame(image, None, n))
        return frames[:, 0].numel()


#: What a file of each codec may end in; pictures go into a folder.
ENDINGS = {"h264": ".mp4", "prores": ".mov", "ffv1": ".mkv"}


def _noise(frames: int, height: int, width: int) -> Tensor:
    """Latents that no decoder overflows at, and no other draw of random numbers notices."""
    return 0.1 * torch.randn(frames, 4, height, width, generator=torch.Generator().manual_seed(0))


def _tiled(height: int, width: int, tile: int, overlap: float) -> int:
    """Pixels of a picture as it is gone over, in tiles that overlap."""
    sides = [sum(span.length for span in spans(side, tile, overlap)) for side in (height, width)]
    return sides[0] * sides[1]


def _with_margins(side: int, reach: int) -> int:
    """Of a side in pixels, as the refiner goes over it: every tile with what its layers reach."""
    return sum(part.outer.stop - part.outer.start for part in cores(side, TILE, reach))


def _upscaled_share(job: Job) -> float:
    """How often an upscaler goes over a picture's pixels."""
    height, width = job.info.height, job.info.width
    return _tiled(height, width, dcm.TILE, dcm.OVERLAP) / (height * width)


def _decoded_volume(model: Backbone, parts: PipelineModules, plan: TilePlan) -> int:
    """Latent pixels that the decoder goes over: chunks overlap, and so do tiles where they are blended."""
    scenes = [0, *(window.span.start for a, window in pairwise(plan.windows) if window.scene != a.scene), plan.frames]
    chunk = model.tile.frames
    frames = sum(span.length for a, b in pairwise(scenes) for span in spans(b - a, chunk, VAE_OVERLAP))
    exact = bool(parts.of_decoder.acting.found)
    return frames * (plan.height * plan.width if exact else _tiled(plan.height, plan.width, VAE_TILE, VAE_OVERLAP))


# --- The UNet ---------------------------------------------------------------------------------------------------------


def time_tile(model: Backbone, layout: TileLayout, settings: Settings, parts: PipelineModules) -> TileSeconds:
    """A tile of the layout's largest plan, in the steps that propagate as well."""
    plan = layout.largest
    tile = max((plan.tile_size(n) for n in range(len(plan.windows))), key=lambda size: size.frames)
    windows = 2 if len(plan.windows) > 1 and "tap" in settings.propagation.kinds else 1

    @torch.no_grad()
    def run(size: TileSize) -> dict[Kind, float]:
        with apply_capm(model, parts.prompts, None):
            return _run_tile(model, size, settings, windows)

    return tile_seconds(run, lambda size: tile_flops(model, size), tile, model.factor, UNET)


#: What the calls of `_run_tile` are like: the first window has no neighbour before it.
KINDS: tuple[Kind, Kind] = ("plain", "tap")


def _run_tile(model: Backbone, size: TileSize, settings: Settings, windows: int) -> dict[Kind, float]:
    """One tile in two windows: what the first takes, and with TAP the second, which sees the first."""
    frames = size.frames if windows == 1 else size.frames + max(size.frames // 2, 1)
    plan = plan_tiles(frames, size.height, size.width, size, 0.5, factor=1)
    step = Step(0, "tap" if "tap" in settings.propagation.kinds else "plain")
    run = TileRun(plan, settings.propagation)
    video = _noise(frames, size.height, size.width).to(model.device)
    context = model.context(None)

    def seconds(call: Call) -> float:
        began = time.perf_counter()
        inputs = gather_tiles(plan, call, video)
        with model.serving(run, call):
            out = model.denoise(inputs, 1.0, inputs, context, call.frames)
        out[0, 0, 0, 0].item()  # waits for the device
        return time.perf_counter() - began

    run.begin(step, COND)
    found: dict[Kind, float] = {}
    for kind, call in zip(KINDS, calls(plan, step, COND, 1, synchronous=False), strict=False):
        found[kind] = seconds(call)
    return found


def sampling_seconds(layout: TileLayout, settings: Settings, noise: NoiseRange, tile: TileSeconds) -> float:
    """Of all steps' tile passes, the frames of a shorter window counting as the share that they are."""
    guidance = guide(settings.guidance)
    total = 0.0
    for step, power in zip(run_steps(settings, noise), strengths(settings, noise), strict=True):
        plan = layout.at(step.index)
        frames = sum(window.span.length for window in plan.windows)
        total += guidance.passes(power) * len(plan.spatial) * frames / tile.tile.frames * tile.of(step.kind)
    return total
