"""Parts of the clips kept out of training, made ready for sampling, and what was sampled made into pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from training.data.held_out import SCALE, Clip, shrunk, truths
from training.report.sdatc import filmed
from vsr_ops.backbones.svd import Backbone
from vsr_ops.image.resize import quantize8
from vsr_ops.modules.refiner import refine_frames
from vsr_ops.pipeline.parts import PipelineModules
from vsr_ops.pipeline.sampler import Settings, sample
from vsr_ops.sampling.layouts import TileLayout, lay_out
from vsr_ops.vae.encode import stream_encode
from vsr_ops.vae.latents import CELL, decode_frames

NAMES = ("car-shadow", "kite-surf", "tea-gardens")


@dataclass(frozen=True)
class Ready:
    """A clip, its frames at the result's size `(n, 3, h, w)`, and their unscaled latents."""

    clip: Clip
    upscaled: Tensor
    lr: Tensor


def parts_of_clips(
    root: Path, names: Sequence[str], frames: int, size: tuple[int, int], crf: int | None, videos: Sequence[Path] = ()
) -> list[Clip]:
    """The middle `size` (height, width) of held-out clips and of video files, and a quarter of it in H.264 at `crf`
    (None: clean)."""
    height, width = size
    clips = {name: truth for name, truth in truths(root, frames, large=False).items() if name in names}
    clips |= {path.stem: filmed(path, frames) for path in videos}
    found: dict[str, Tensor] = {}
    for name, truth in clips.items():
        top, left = (truth.shape[-2] - height) // 2, (truth.shape[-1] - width) // 2
        found[name] = truth[..., top : top + height, left : left + width].contiguous()
    return shrunk(found, crf)


@torch.no_grad()
def ready(model: Backbone, parts: PipelineModules, clip: Clip) -> Ready:
    """Enlarged and encoded, as the pipeline does."""
    count, _, height, width = clip.small.shape
    size = height * SCALE, width * SCALE
    upscaled = torch.stack(list(parts.enlarging(clip.small, size)))
    lr = torch.stack(list(stream_encode(model.vae, iter(upscaled), size[0] // CELL, size[1] // CELL)))
    assert lr.shape[0] == count
    return Ready(clip, upscaled, lr)


def layout_of(model: Backbone, video: Ready, settings: Settings) -> TileLayout:
    """The tiles of a clip."""
    frames, _, height, width = video.lr.shape
    return lay_out(settings.layout, frames, height, width, settings.tile or model.tile, settings.overlap)


def sampled(model: Backbone, video: Ready, settings: Settings, calls: list[int] | None = None) -> Tensor:
    """Scaled latents of the result; `calls` gets how many tiles went through the UNet."""
    passes = [] if calls is None else calls
    return sample(
        model,
        video.lr,
        layout_of(model, video, settings),
        settings,
        model.context(None),
        tick=lambda call: passes.append(len(call.tiles)),
    )


@torch.no_grad()
def pictures(model: Backbone, parts: PipelineModules, video: Ready, latents: Tensor) -> Tensor:
    """The frames of scaled latents, refined beside the enlarged ones, in 8-bit levels."""
    frames = decode_frames(model, latents / model.scaling_factor, model.tile.frames)
    pairs = ((frame.clamp(0, 1), reference) for frame, reference in zip(frames, video.upscaled, strict=True))
    made = pairs if parts.refiner is None else refine_frames(parts.refiner, pairs, parts.refiner_w)
    found = [frame if isinstance(frame, Tensor) else frame[0] for frame in made]
    return quantize8(torch.stack(found).clamp(0, 1))
