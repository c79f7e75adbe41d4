"""A clip to try things on: photographs moved by a camera path, shrunk, and really compressed.

The photographs come with scikit-image (public domain and CC0), so nothing is downloaded.
"""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..image.resize import quantize8, resize_bicubic
from ..video import Frame, made_info, open_writer, probe, read_frames
from ..video.codec import h264

HEIGHT, WIDTH, SCALE, RATE = 256, 384, 4, Fraction(12)
FRAMES_PER_SCENE = 12
#: x264's constant rate factor, 0 (lossless) to 51: little compressed.
CRF = 16
SCENES = ("coffee", "chelsea")
FRAMES = FRAMES_PER_SCENE * len(SCENES)


def camera_path(photo: Tensor, frames: int, height: int, width: int) -> Tensor:
    """`(frames, 3, height, width)`: a slow pan, zoom and roll over one photograph `(3, h, w)` in [0, 1]."""
    rows, cols = photo.shape[-2:]
    time = torch.linspace(-1, 1, frames)
    zoom = min((rows - 24) / height, (cols - 24) / width, 1.0) * (0.96 + 0.02 * time)
    angle = math.radians(1.0) * time
    x0, y0 = cols / 2 + 8 * time, rows / 2 + 5 * torch.sin(time * 2)
    v, u = torch.meshgrid(torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2, indexing="ij")
    cos, sin = (zoom * torch.cos(angle))[:, None, None], (zoom * torch.sin(angle))[:, None, None]
    x = x0[:, None, None] + cos * u - sin * v
    y = y0[:, None, None] + sin * u + cos * v
    grid = torch.stack([(2 * x + 1) / cols - 1, (2 * y + 1) / rows - 1], dim=-1)
    clip = F.grid_sample(
        photo.expand(frames, -1, -1, -1), grid, "bicubic", padding_mode="reflection", align_corners=False
    )
    return clip.clamp(0, 1)


def ground_truth() -> tuple[Tensor, tuple[int, ...]]:
    """The demo's clean video `(frames, 3, 256, 384)` in 8-bit levels, and its scene cuts."""
    from skimage import data  # a second to import, and only the demo needs it

    pixels = [torch.tensor(getattr(data, name)()) for name in SCENES]
    photos = [rearrange(photo, "h w c -> c h w") / 255 for photo in pixels]
    clips = [camera_path(photo, FRAMES_PER_SCENE, HEIGHT, WIDTH) for photo in photos]
    return quantize8(torch.cat(clips)), tuple(range(FRAMES_PER_SCENE, len(clips) * FRAMES_PER_SCENE, FRAMES_PER_SCENE))


def write_video(path: Path, frames: Tensor, overwrite: bool = False) -> None:
    """Writes `(n, 3, h, w)` as H.264. Raises VideoError, without `overwrite` also where `path` is there."""
    count, _, height, width = frames.shape
    info = made_info(width, height, count, RATE)
    with open_writer(path, info, size=(height, width), overwrite=overwrite) as writer:
        for index, frame in enumerate(frames):
            writer.write(Frame(frame, None, index))


def load_frames(path: Path) -> Tensor:
    """All frames of a short video."""
    return torch.stack([frame.image for frame in read_frames(probe(path))])


def shrunk(truth: Tensor) -> Tensor:
    """The clip four times smaller, in 8-bit levels."""
    return quantize8(resize_bicubic(truth, (HEIGHT // SCALE, WIDTH // SCALE)))


def degraded(crf: int = CRF) -> Tensor:
    """The small clip as H.264 leaves it at a constant rate factor, `(frames, 3, 64, 96)`."""
    return h264(shrunk(ground_truth()[0]), crf)
