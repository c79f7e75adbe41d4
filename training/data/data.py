"""Clean ground truth: crops of videos and moving crops of photographs.

Every clip is `(frames, 3, size, size)` float32 RGB in [0, 1], drawn from a `torch.Generator`, so that a seed gives
the same clips again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count

import torch
from torch import Tensor

from training.data.library import HELD_OUT, PICTURES, VIDEOS, Source, halve, load_sources, read_picture, read_video
from training.data.photos import camera_clip, parallax_clip
from training.loop.draws import generator_at, integer, pick, uniform
from vsr_ops.errors import SettingError

__all__ = [
    "HELD_OUT",
    "PICTURES",
    "VIDEOS",
    "Source",
    "camera_clip",
    "clip_at",
    "clips",
    "generator_at",
    "halve",
    "integer",
    "load_sources",
    "parallax_clip",
    "random_clip",
    "read_picture",
    "read_video",
    "uniform",
    "video_clip",
]

PARALLAX_SHARE = 0.3
"""Of the clips made from photographs."""


def video_clip(video: Tensor, frames: int, size: int, rng: torch.Generator) -> Tensor:
    """A crop of consecutive frames of `(n, 3, h, w)` uint8; played backwards half of the time."""
    length, _, height, width = video.shape
    start = integer(rng, length - frames + 1)
    top, left = integer(rng, height - size + 1), integer(rng, width - size + 1)
    clip = video[start : start + frames, :, top : top + size, left : left + size].float() / 255
    return clip.flip(0) if uniform(rng, 0, 1) < 0.5 else clip


def random_clip(
    photos: Sequence[Source], videos: Sequence[Source], frames: int, size: int, rng: torch.Generator, video_share: float
) -> Tensor:
    """One clip, mirrored half of the time; from a video large and long enough with probability `video_share`.

    Raises SettingError when no photograph and no video is large (and long) enough.
    """
    fitting = [v for v in videos if v.pixels.shape[0] >= frames and min(v.pixels.shape[-2:]) >= size]
    large = [p for p in photos if min(p.pixels.shape[-2:]) >= size]
    if not fitting and not large:
        raise SettingError(
            f"no source has {frames} frames of {size}x{size}, nor is a photograph that large:"
            " train on smaller or shorter clips, or add larger sources"
        )
    if fitting and (not large or uniform(rng, 0, 1) < video_share):
        clip = video_clip(pick(rng, fitting).pixels, frames, size, rng)
    elif uniform(rng, 0, 1) < PARALLAX_SHARE:
        clip = parallax_clip(pick(rng, large).pixels[0], pick(rng, large).pixels[0], frames, size, rng)
    else:
        clip = camera_clip(pick(rng, large).pixels[0], frames, size, rng)
    return clip.flip(-1) if uniform(rng, 0, 1) < 0.5 else clip


def clip_at(
    sources: tuple[Sequence[Source], Sequence[Source]],
    frames: int,
    size: int,
    seed: int,
    step: int,
    video_share: float = 0.4,
) -> Tensor:
    """The clip of one training step: `sources` are `load_sources`' photographs and videos."""
    return random_clip(*sources, frames, size, generator_at(seed, step), video_share)


def clips(
    photos: Sequence[Source], videos: Sequence[Source], frames: int, size: int, seed: int, video_share: float = 0.4
) -> Iterator[Tensor]:
    """The endless stream of `clip_at` steps 0, 1, 2 ..."""
    for step in count():
        yield clip_at((photos, videos), frames, size, seed, step, video_share)
