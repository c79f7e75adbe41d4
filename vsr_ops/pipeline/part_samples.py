"""The parts of a job, each run for a moment on a piece of the clip: the very parts, as the job will run them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from ..backbones.svd import Backbone
from ..flow.field import streamed_flow
from ..image.color import correct
from ..image.upscale import upscale_frames
from ..modules.refiner import CHUNK
from ..sampling.align import SHARE
from ..sampling.calls import Call, calls, gather_tiles
from ..sampling.guidance import COND
from ..sampling.layouts import TileLayout
from ..sampling.propagation import TileRun
from ..sampling.schedule import Kind, Step
from ..sampling.tiling import TileSize, plan_tiles
from ..vae.encode import stream_encode
from ..vae.latents import CELL
from ..video import Frame, made_info, open_writer
from .job import Job, from_levels, to_levels
from .parts import PipelineModules, apply_capm, apply_sateco, decoded, refined
from .sampler import Settings

#: The first frames of a clip that parts are tried on, beside the one before them.
FRAMES = 2
#: What a file of each codec may end in; pictures go into a folder.
ENDINGS = {"h264": ".mp4", "prores": ".mov", "ffv1": ".mkv"}
#: What the calls of a TAP step are like: the first window has no neighbour before it.
KINDS: tuple[Kind, Kind] = ("plain", "tap")


@dataclass(frozen=True)
class Work:
    """All that a job is made of: what is upscaled, by what, in which tiles, with which settings. `clock` has the
    seconds that parts are timed by."""

    model: Backbone
    job: Job
    layout: TileLayout
    settings: Settings
    parts: PipelineModules
    codec: str = "h264"
    clock: Callable[[], float] = time.perf_counter


class Samples:
    """The parts around the UNet, each on a square of the job's first frames `small` `(n, 3, h, w)`, `side` latents of
    the result a side; every method returns how many units it has done."""

    def __init__(self, work: Work, small: Tensor) -> None:
        self._work, self._small = work, small

    def _square(self, side: int) -> tuple[Tensor, int]:
        """The middle of the first frames, `side` latents or as many as there are, and the pixels of its result's sides
        (a multiple of a latent's)."""
        pixels = min(side, *(-(-each // CELL) for each in self._work.job.size)) * CELL
        small = max(1, round(pixels / self._work.job.scale))
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
        enlarging = self._work.parts.enlarging
        # One that sees time takes its neighbours with it.
        frames = small if enlarging.sees_time else small[:1]
        for image in enlarging(iter(frames), (pixels, pixels)):
            if enlarging.is_learnt:
                levels = to_levels(image)
                for _ in range(2):
                    from_levels(levels)
        return len(frames) * pixels**2

    def encode(self, side: int) -> float:
        """Latent pixels."""
        frame = self._enlarged(side)[0]
        sides = [each // CELL for each in frame.shape[-2:]]
        list(stream_encode(self._work.model.vae, [frame], sides[0], sides[1]))
        return sides[0] * sides[1]

    def flow(self, side: int) -> float:
        """Pixels of a pair of frames."""
        frames = self._enlarged(side)[-2:]
        size = (frames.shape[-2] // CELL, frames.shape[-1] // CELL)
        streamed_flow(iter(frames), len(frames), size, CELL, (), SHARE, lambda _: None, self._work.parts.flow)
        return frames[0, 0].numel()

    def decode(self, side: int) -> float:
        """Latent pixels over all frames."""
        frames = self._enlarged(side)[-FRAMES:]
        latents = _noise(len(frames), *(side // CELL for side in frames.shape[-2:]))
        levels = None if self._work.parts.prompts is None else torch.full((len(frames),), 0.5)

        def references() -> Iterator[Frame]:
            return (Frame(frame, None, n) for n, frame in enumerate(frames))

        size = (frames.shape[-2], frames.shape[-1])
        for _ in decoded(self._work.model, latents, self._work.parts, levels, references, size, ()):
            pass
        return latents[:, 0].numel()

    def refine(self, side: int) -> float:
        """Pixels over all frames."""
        # Frames wait for those after them: more than a chunk.
        count = 2 * CHUNK + 1
        frames = [frame for _, frame in zip(range(count), cycle(self._enlarged(side)), strict=False)]
        pairs = ((frame, Frame(frame, None, n)) for n, frame in enumerate(frames))
        for _ in refined(self._work.parts, pairs, ()):
            pass
        return count * frames[0][0].numel()

    def write(self, side: int, folder: Path) -> float:
        """Pixels over all frames, their colours corrected."""
        frames = self._enlarged(side)
        count, _, height, width = frames.shape
        output = folder / f"{side}{ENDINGS.get(self._work.codec, '')}"
        info, size = made_info(width, height, count), (height, width)
        with open_writer(output, info, size=size, codec=self._work.codec, overwrite=True) as writer:
            for n, frame in enumerate(frames):
                image = correct(self._work.settings.color, frame[None], frame[None])[0].clamp(0, 1)
                writer.write(Frame(image, None, n))
        return frames[:, 0].numel()


def _noise(frames: int, height: int, width: int) -> Tensor:
    """Latents that no decoder overflows at, and no other draw of random numbers notices."""
    return 0.1 * torch.randn(frames, 4, height, width, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def run_tile(work: Work, size: TileSize, windows: int, together: int = 1) -> dict[Kind, float]:
    """Seconds of a tile of a `size` in the UNet, of `together` in one call: of the first window, and where there are
    two and TAP acts, of the second, which sees the first."""
    settings, model = work.settings, work.model
    frames = size.frames if windows == 1 else size.frames + max(size.frames // 2, 1)
    plan = plan_tiles(frames, size.height, size.width, size, 0.5, factor=1)
    step = Step(0, "tap" if "tap" in settings.propagation.kinds else "plain")
    run = TileRun(plan, settings.propagation)
    video = _noise(frames, size.height, size.width).to(model.device)
    context = model.context(None)

    def seconds(call: Call) -> float:
        call = replace(call, tiles=call.tiles * together)
        began = work.clock()
        inputs = gather_tiles(plan, call, video)
        with model.serving(run, call):
            out = model.denoise(inputs, 1.0, inputs, context, call.frames)
        out[0, 0, 0, 0].item()  # waits for the device
        return (work.clock() - began) / together

    run.begin(step, COND)
    with apply_capm(model, work.parts.prompts, None), apply_sateco(model, work.parts.sateco, video):
        return dict(zip(KINDS, map(seconds, calls(plan, step, COND, 1, synchronous=False)), strict=False))
