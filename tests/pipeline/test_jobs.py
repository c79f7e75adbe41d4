"""Jobs, and whole runs of them on a real small SVD: sizes, frames, progress, what is left after a failure."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

from vsr_ops.errors import SettingError, VideoError
from vsr_ops.pipeline.job import Job
from vsr_ops.pipeline.sampler import SVD_NOISE, Settings, make_layout
from vsr_ops.pipeline.upscale import upscale
from vsr_ops.sampling.tiling import TileSize
from vsr_ops.video import VideoInfo, made_info, probe, read_frames

if TYPE_CHECKING:
    from vsr_ops.backbones.svd import SVD


@pytest.mark.parametrize("scale", [0.0, -4.0, math.nan, 17.0])
def test_a_job_of_no_scale_is_refused(scale: float) -> None:
    with pytest.raises(SettingError, match=f"scale is {scale}: expected"):
        Job(made_info(16, 16, 3), 0, 3, scale)


def test_jobs_of_any_size_fit_the_unet() -> None:
    for width, height, scale, factor in product((1, 7, 64, 161), (1, 9, 90), (0.5, 1.0, 2.7, 4.0), (4, 8)):
        job = Job(made_info(width, height, 3), 0, 3, scale)
        rows, cols = job.latent_size(factor)
        out_height, out_width = job.size
        assert rows % factor == 0 and cols % factor == 0
        assert 0 <= rows * 8 - out_height < 8 * factor and 0 <= cols * 8 - out_width < 8 * factor
        plan = make_layout(job, Settings(), TileSize(2 * factor, 2 * factor, 2), factor, SVD_NOISE, (1,)).settled
        assert (plan.frames, plan.height, plan.width, len(plan.windows)) == (3, rows, cols, 2)


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (2, 1), (-1, 2), (0, 4), (3, 4)])
def test_frames_outside_the_video_are_refused(start: int, stop: int) -> None:
    with pytest.raises(SettingError, match=f"{start}:{stop}"):
        Job(made_info(8, 8, 3), start, stop, 2.0)


def pictures(folder: Path, count: int, height: int, width: int) -> VideoInfo:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8)).save(folder / f"{i:03d}.png")
    return probe(folder)


@pytest.mark.parametrize(("count", "height", "width"), [(1, 9, 7), (3, 5, 21)])
def test_odd_and_short_clips_come_out_at_their_size(
    tiny: SVD, tmp_path: Path, count: int, height: int, width: int
) -> None:
    info = pictures(tmp_path / "in", count, height, width)
    heard: list[tuple[str, int, int]] = []
    job = Job(info, 0, count, 3.0)
    upscale(
        tiny,
        job,
        tmp_path / "out",
        Settings(steps=1, guidance="none"),
        codec="png",
        cuts=(),
        progress=lambda stage, done, total: heard.append((stage, done, total)),
    )
    result = probe(tmp_path / "out")
    assert (result.height, result.width, result.frames) == (3 * height, 3 * width, count)
    assert result.alpha and result.rate == Fraction(24)
    frames = list(read_frames(result))
    assert all(torch.isfinite(frame.image).all() for frame in frames)
    for stage in ("encode", "sample", "decode"):
        counts = [(done, total) for name, done, total in heard if name == stage and done > 0]
        assert counts == [(i + 1, len(counts)) for i in range(len(counts))] and counts


def test_a_run_that_fails_leaves_nothing_under_the_final_name(tiny: SVD, tmp_path: Path) -> None:
    info = pictures(tmp_path / "in", 1, 8, 8)
    output = tmp_path / "out.mp4"

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "decode":
            raise KeyboardInterrupt

    settings = Settings(steps=1, guidance="none")
    with pytest.raises(KeyboardInterrupt):
        upscale(tiny, Job(info, 0, 1, 4.0), output, settings, cuts=(), progress=stop)
    assert not output.exists()
    output.write_bytes(b"mine")
    with pytest.raises(VideoError, match=r"out\.mp4"):
        upscale(tiny, Job(info, 0, 1, 4.0), output, settings, cuts=())
    assert output.read_bytes() == b"mine"
