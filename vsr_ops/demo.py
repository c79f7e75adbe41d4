"""The demo: photographs moved by a camera path, shrunk, really compressed, upscaled and compared with the truth.

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

from vsr_ops.metrics import color_drift, measure, table
from vsr_ops.pipeline import Job, Progress, Settings, silent, upscale
from vsr_ops.resize import quantize8, resize_bicubic
from vsr_ops.svd import SVD
from vsr_ops.video import Frame, made_info, open_writer, probe, read_frames

HEIGHT, WIDTH, SCALE, RATE = 256, 384, 4, Fraction(12)
FRAMES_PER_SCENE = 12
SCENES = ("coffee", "chelsea")


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


def write_video(path: Path, frames: Tensor) -> None:
    """Writes `(n, 3, h, w)` as H.264, over what is there."""
    count, _, height, width = frames.shape
    info = made_info(width, height, count, RATE)
    with open_writer(path, info, size=(height, width), overwrite=True) as writer:
        for index, frame in enumerate(frames):
            writer.write(Frame(frame, None, index))


def load_frames(path: Path) -> Tensor:
    """All frames of a short video."""
    return torch.stack([frame.image for frame in read_frames(probe(path))])


def side_by_side(frames: list[Tensor]) -> Tensor:
    """Pictures of one size next to each other with a white line between, `(n, 3, h, w')`."""
    line = torch.ones(*frames[0].shape[:3], 4)
    parts = [part for frame in frames for part in (line, frame)][1:]
    return torch.cat(parts, dim=-1)


def run_demo(model: SVD, folder: Path, settings: Settings, progress: Progress = silent) -> str:
    """Writes input, result and comparisons into `folder`; returns the table of results against bicubic."""
    folder.mkdir(parents=True, exist_ok=True)
    truth, cuts = ground_truth()
    small = quantize8(resize_bicubic(truth, (HEIGHT // SCALE, WIDTH // SCALE)))
    source, output = folder / "input.mp4", folder / "result.mp4"
    write_video(source, small)
    info = probe(source)
    upscale(model, Job(info, 0, info.frames, SCALE), output, settings, overwrite=True, cuts=cuts, progress=progress)
    bicubic = quantize8(resize_bicubic(load_frames(source), (HEIGHT, WIDTH)))
    result = quantize8(load_frames(output))
    compared = side_by_side([bicubic, result, truth])
    write_video(folder / "side_by_side.mp4", compared)
    picks = [FRAMES_PER_SCENE // 2 + i * FRAMES_PER_SCENE for i in range(len(SCENES))]
    picture = torch.cat([compared[pick] for pick in picks], dim=-2)
    made = made_info(picture.shape[-1], picture.shape[-2], 1, RATE)
    with open_writer(
        folder / "side_by_side.png", made, size=(picture.shape[-2], picture.shape[-1]), codec="png8", overwrite=True
    ) as writer:
        writer.write(Frame(picture, None, 0))
    rows = {
        name: {**measure(video, truth, ["psnr_y", "ssim_y"]), "color_drift": float(color_drift(video, truth).max())}
        for name, video in {"bicubic": bicubic, "coherent-vsr": result}.items()
    }
    return table(rows)
