"""The demo: a clip whose truth is known, upscaled and compared with it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..backbones.svd import Backbone
from ..image.resize import quantize8, resize_bicubic
from ..metrics.table import color_drift, measure, table
from ..pipeline.job import Job
from ..pipeline.parts import PipelineModules
from ..pipeline.sampler import Settings
from ..pipeline.upscale import Progress, silent, upscale
from ..system.outputs import held_folder, refuse_inputs, refuse_taken
from ..video import Frame, made_info, open_writer, probe
from .demo_clip import (
    FRAMES_PER_SCENE,
    HEIGHT,
    RATE,
    SCALE,
    SCENES,
    WIDTH,
    ground_truth,
    load_frames,
    shrunk,
    write_video,
)

FILES = ("input.mp4", "result.mp4", "side_by_side.mp4", "side_by_side.png")
"""What `run_demo` leaves in its folder."""


def side_by_side(frames: list[Tensor]) -> Tensor:
    """Pictures of one size next to each other with a white line between, `(n, 3, h, w')`."""
    line = torch.ones(*frames[0].shape[:3], 4)
    parts = [part for frame in frames for part in (line, frame)][1:]
    return torch.cat(parts, dim=-1)


def check_demo(folder: Path, overwrite: bool = False, inputs: Iterable[Path] = ()) -> None:
    """Raises VideoError where `run_demo` would refuse `folder`, or where it holds one of the `inputs`."""
    refuse_inputs(folder, inputs)
    for name in FILES:
        refuse_taken(folder / name, overwrite)


def run_demo(
    model: Backbone,
    folder: Path,
    settings: Settings,
    progress: Progress = silent,
    parts: PipelineModules | None = None,
    overwrite: bool = False,
) -> str:
    """Writes input, result and comparisons into `folder`; returns the table of results against bicubic.

    Raises VSRError, without `overwrite` also where one of them is there.
    """
    check_demo(folder, overwrite)
    with held_folder(folder):
        return _demo(model, folder, settings, progress, parts, overwrite)


def _demo(
    model: Backbone,
    folder: Path,
    settings: Settings,
    progress: Progress,
    parts: PipelineModules | None,
    overwrite: bool,
) -> str:
    truth, cuts = ground_truth()
    source, output, video, still = (folder / name for name in FILES)
    write_video(source, shrunk(truth), overwrite)
    info = probe(source)
    job = Job(info, 0, info.frames, SCALE)
    upscale(model, job, output, settings, overwrite=overwrite, cuts=cuts, progress=progress, parts=parts)
    bicubic = quantize8(resize_bicubic(load_frames(source), (HEIGHT, WIDTH)))
    result = quantize8(load_frames(output))
    compared = side_by_side([bicubic, result, truth])
    write_video(video, compared, overwrite)
    picks = [FRAMES_PER_SCENE // 2 + i * FRAMES_PER_SCENE for i in range(len(SCENES))]
    picture = torch.cat([compared[pick] for pick in picks], dim=-2)
    made = made_info(picture.shape[-1], picture.shape[-2], 1, RATE)
    size = (picture.shape[-2], picture.shape[-1])
    with open_writer(still, made, size=size, codec="png8", overwrite=overwrite) as writer:
        writer.write(Frame(picture, None, 0))
    rows = {
        name: {**measure(video, truth, ["psnr_y", "ssim_y"]), "color_drift": float(color_drift(video, truth).max())}
        for name, video in {"bicubic": bicubic, "coherent-vsr": result}.items()
    }
    return table(rows)
