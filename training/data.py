"""Clean ground truth: moving crops of photographs, and crops of videos after halving their compressed frames.

Every clip is `(frames, 3, size, size)` float32 RGB in [0, 1], drawn from a `torch.Generator`, so that a seed gives
the same clips again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

PICTURES = {".jpg", ".jpeg", ".png"}
VIDEOS = {".mp4", ".mkv", ".webm", ".mov"}

#: Kept out of training, so that validation sees nothing the weights were fitted to.
HELD_OUT = frozenset(
    {"kite-surf", "car-shadow", "roman-colosseum", "motherboard-circuits", "tea-gardens", "budgie-branch"}
)


@dataclass(frozen=True)
class Source:
    """One clip's or photograph's pixels, `(frames, 3, h, w)` uint8; a photograph has one frame."""

    name: str
    pixels: Tensor


def uniform(rng: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * torch.rand((), generator=rng).item()


def integer(rng: torch.Generator, high: int) -> int:
    """A whole number in [0, high)."""
    return int(torch.randint(max(high, 1), (), generator=rng).item())


def read_picture(path: Path) -> Tensor:
    return rearrange(torch.from_numpy(np.array(Image.open(path).convert("RGB"))), "h w c -> c h w")


def halve(pixels: Tensor) -> Tensor:
    """Mean of 2x2 blocks of `(frames, 3, h, w)` uint8: hides the compression damage of the source."""
    return F.avg_pool2d(pixels.float(), 2).round().to(torch.uint8)


def read_video(path: Path, every: int = 1, limit: int = 10**9) -> Tensor:
    """Frames of a video, halved, `(frames, 3, h/2, w/2)` uint8."""
    frames: list[Tensor] = []
    with av.open(str(path)) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index % every == 0:
                pixels = torch.from_numpy(frame.to_ndarray(format="rgb24"))
                frames.append(halve(rearrange(pixels, "h w c -> 1 c h w")))
            if len(frames) >= limit:
                break
    return torch.cat(frames)


def load_sources(root: Path, video_limit: int = 120) -> tuple[list[Source], list[Source]]:
    """(photographs, videos) below `root`, without the held-out ones. Lossless or large pictures stay as they
    are; a folder of numbered JPEG frames is a video and is halved."""
    photos: list[Source] = []
    videos: list[Source] = []
    for folder in sorted({path.parent for path in root.rglob("*") if path.suffix.lower() in PICTURES}):
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)
        if all(path.stem.isdigit() and len(path.stem) == 5 for path in paths):
            if folder.name not in HELD_OUT:
                videos.append(Source(folder.name, halve(torch.stack([read_picture(path) for path in paths]))))
        else:
            photos += [Source(p.stem, read_picture(p)[None]) for p in paths if p.stem not in HELD_OUT]
    for path in sorted(path for path in root.rglob("*") if path.suffix.lower() in VIDEOS):
        if path.parent.name.startswith("train") and path.stem not in HELD_OUT:
            videos.append(Source(path.stem, read_video(path, limit=video_limit)))
    return photos, videos


def camera_clip(photo: Tensor, frames: int, size: int, rng: torch.Generator, speed: float = 3.0) -> Tensor:
    """A camera path (pan up to `speed` pixels a frame, zoom, roll) over one photograph `(3, h, w)` uint8."""
    picture = photo[None].float() / 255
    while min(picture.shape[-2:]) >= 2.5 * size and uniform(rng, 0, 1) < 0.6:
        picture = F.avg_pool2d(picture, 2)
    height, width = picture.shape[-2:]
    steps = torch.linspace(-0.5, 0.5, frames) if frames > 1 else torch.zeros(1)
    pixels = min(uniform(rng, 0.6, 1.0), (min(height, width) - 2) / (1.5 * size))
    scale = pixels * (1 + uniform(rng, -0.012, 0.012) * frames * steps)
    angle = math.radians(uniform(rng, -4, 4)) + math.radians(uniform(rng, -0.4, 0.4)) * frames * steps
    pan = [uniform(rng, -speed, speed) * frames * steps * pixels for _ in range(2)]
    half = 0.75 * size * pixels
    centre = [uniform(rng, half, extent - half) + path for extent, path in zip((width, height), pan, strict=True)]
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    axis = torch.arange(size) - (size - 1) / 2
    v, u = torch.meshgrid(axis, axis, indexing="ij")
    x = centre[0][:, None, None] + cos[:, None, None] * u - sin[:, None, None] * v
    y = centre[1][:, None, None] + sin[:, None, None] * u + cos[:, None, None] * v
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)
    source = picture.expand(frames, -1, -1, -1)
    clip = F.grid_sample(source, grid, "bicubic", padding_mode="reflection", align_corners=False)
    return clip.clamp(0, 1)


def video_clip(video: Tensor, frames: int, size: int, rng: torch.Generator) -> Tensor:
    """A crop of consecutive frames of `(n, 3, h, w)` uint8; played backwards half of the time."""
    count, _, height, width = video.shape
    start = integer(rng, count - frames + 1)
    top, left = integer(rng, height - size + 1), integer(rng, width - size + 1)
    clip = video[start : start + frames, :, top : top + size, left : left + size].float() / 255
    return clip.flip(0) if uniform(rng, 0, 1) < 0.5 else clip


def random_clip(
    photos: Sequence[Source], videos: Sequence[Source], frames: int, size: int, rng: torch.Generator, video_share: float
) -> Tensor:
    """One clip, mirrored half of the time; from a video large and long enough with probability `video_share`."""
    fitting = [v for v in videos if v.pixels.shape[0] >= frames and min(v.pixels.shape[-2:]) >= size]
    if fitting and uniform(rng, 0, 1) < video_share:
        clip = video_clip(fitting[integer(rng, len(fitting))].pixels, frames, size, rng)
    else:
        clip = camera_clip(photos[integer(rng, len(photos))].pixels[0], frames, size, rng)
    return clip.flip(-1) if uniform(rng, 0, 1) < 0.5 else clip


def clips(
    photos: Sequence[Source], videos: Sequence[Source], frames: int, size: int, seed: int, video_share: float = 0.4
) -> Iterator[Tensor]:
    """An endless stream of clips."""
    rng = torch.Generator().manual_seed(seed)
    while True:
        yield random_clip(photos, videos, frames, size, rng, video_share)
