"""The main job without a host: a video in, DC-VSR's sampling over tiles, a larger video out.

The enlarged input is read several times (to encode it, and as the reference), from the disk: only its latents are ever
held whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import count, islice
from pathlib import Path

import torch
from torch import Tensor

from ..backbones.svd import Backbone
from ..flow.field import Flow, streamed_flow
from ..flow.raft import Estimator
from ..image.color import correct
from ..sampling.align import SHARE
from ..sampling.calls import Call
from ..sampling.tiling import TilePlan
from ..system.allocator import give_back
from ..system.outputs import claimed
from ..vae.encode import stream_encode
from ..vae.latents import CELL
from ..video import Frame, check_output, open_writer
from .job import Job, UpscaledFrames, scene_cuts
from .parts import PipelineModules, apply_capm, apply_sateco, decoded, refined
from .sampler import NoiseRange, Settings, make_layout, sample, tile_passes

#: (stage, done, total): called after every unit of work; raising stops the run.
Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """Reports nothing."""


def upscale(
    model: Backbone,
    job: Job,
    output: Path,
    settings: Settings,
    codec: str = "h264",
    overwrite: bool = False,
    cuts: Sequence[int] | None = None,
    progress: Progress = silent,
    parts: PipelineModules | None = None,
) -> None:
    """Upscales a job into `output`, keeping frame count, timing and sound. `cuts` None looks for scene cuts.

    Nothing stands under the final name unless the whole run succeeds; from the first frame's encoding on no other run
    can write there. Raises VSRError.
    """
    check_output(output, overwrite, codec, job.info, job.frames)
    parts = parts or PipelineModules()
    parts.check_fits(model)
    cuts = scene_cuts(job) if cuts is None else cuts
    layout = make_layout(job, settings, model.tile, model.factor, NoiseRange.of(model), cuts)
    plan, tiles = layout.settled, _Tiles(tile_passes(layout, settings, NoiseRange.of(model)), progress)
    with claimed(output), closing(UpscaledFrames(job, parts.enlarging, output.parent, cuts)) as upscaled:
        flow = _latent_flow(job, settings, plan, upscaled, cuts, progress, parts.flow)
        lr = torch.empty(job.frames, 4, plan.height, plan.width)
        progress("encode", 0, job.frames)
        for i, z in enumerate(stream_encode(model.vae, (frame.image for frame in upscaled()), plan.height, plan.width)):
            lr[i] = z
            progress("encode", i + 1, job.frames)
        give_back()
        levels = None if parts.prompts is None else parts.prompts.levels(job)
        context = _contexts(model, upscaled, cuts)
        with apply_capm(model, parts.prompts, levels), apply_sateco(model, parts.sateco, lr):
            result = sample(
                model,
                lr,
                layout,
                settings,
                context,
                tick=tiles.begin,
                flow=flow,
                first_frame=job.start,
            )
        tiles.end()
        give_back()
        progress("decode", 0, job.frames)
        pictures = decoded(model, result / model.scaling_factor, parts, levels, upscaled, job.size, cuts)
        pairs = (
            (frame[:, : job.size[0], : job.size[1]].clamp(0, 1), reference)
            for frame, reference in zip(pictures, upscaled(), strict=True)
        )
        with open_writer(output, job.info, size=job.size, codec=codec, overwrite=overwrite, held=True) as writer:
            for i, (frame, reference) in enumerate(refined(parts, pairs, cuts)):
                image = correct(settings.color, frame[None], reference.image[None])[0].clamp(0, 1)
                writer.write(Frame(image, reference.alpha, reference.pts))
                progress("decode", i + 1, job.frames)


class _Tiles:
    """Reports the tile passes that are done."""

    def __init__(self, total: int, progress: Progress) -> None:
        self._begun, self._total, self._progress = 0, total, progress

    def begin(self, call: Call) -> None:
        """Called before each UNet call: all before it are done. One that ran out of memory is begun again in parts."""
        self._progress("sample", min(self._begun, self._total), self._total)
        self._begun += len(call.tiles)

    def end(self) -> None:
        """Called after the last."""
        if self._total:
            self._progress("sample", self._total, self._total)


def _contexts(model: Backbone, upscaled: UpscaledFrames, cuts: Sequence[int]) -> Tensor | None:
    """What the model's image encoder sees in the first frame of each scene, `(scenes, tokens, dim)`; None without an
    encoder."""
    if model.image_encoder is None:
        return None
    firsts = [0, *cuts]
    frames = enumerate(islice(upscaled(), firsts[-1] + 1))
    return torch.cat([model.context(frame.image[None]) for i, frame in frames if i in firsts])


def _latent_flow(
    job: Job,
    settings: Settings,
    plan: TilePlan,
    upscaled: UpscaledFrames,
    cuts: Sequence[int],
    progress: Progress,
    estimate: Estimator,
) -> Flow | None:
    """The flow of the upscaled input at the latents' size, where alignment asks for it."""
    if settings.align == 0 or settings.steps == 0:
        return None
    if job.frames == 1:
        warnings.warn("align: a single frame has no motion to follow, so nothing is aligned", stacklevel=3)
        return None
    pairs, done = job.frames - 1, count(1)
    progress("flow", 0, pairs)
    pictures = (frame.image for frame in upscaled())
    return streamed_flow(
        pictures,
        job.frames,
        (plan.height, plan.width),
        CELL,
        cuts,
        SHARE,
        lambda _: progress("flow", next(done), pairs),
        estimate,
    )
