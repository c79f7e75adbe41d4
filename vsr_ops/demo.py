"""The demo: a clip whose truth is known, upscaled and compared with it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .clip import FRAMES_PER_SCENE, HEIGHT, RATE, SCALE, SCENES, WIDTH, ground_truth, load_frames, shrunk, write_video
from .job import Job
from .metrics import color_drift, measure, table
from .parts import Parts
from .pipeline import Progress, Settings, silent, upscale
from .resize import quantize8, resize_bicubic
from .svd import Backbone
from .video import Frame, made_info, open_writer, probe


def side_by_side(frames: list[Tensor]) -> Tensor:
    """Pictures of one size next to each other with a white line between, `(n, 3, h, w')`."""
    line = torch.ones(*frames[0].shape[:3], 4)
    parts = [part for frame in frames for part in (line, frame)][1:]
    return torch.cat(parts, dim=-1)


def run_demo(
    model: Backbone, folder: Path, settings: Settings, progress: Progress = silent, parts: Parts | None = None
) -> str:
    """Writes input, result and comparisons into `folder`; returns the table of results against bicubic."""
    folder.mkdir(parents=True, exist_ok=True)
    truth, cuts = ground_truth()
    source, output = folder / "input.mp4", folder / "result.mp4"
    write_video(source, shrunk(truth))
    info = probe(source)
    job = Job(info, 0, info.frames, SCALE)
    upscale(model, job, output, settings, overwrite=True, cuts=cuts, progress=progress, parts=parts)
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
