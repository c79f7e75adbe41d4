"""A clip at a glance: its header, and stretches of it in place of all."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.video_files import NTSC, write
from vsr_ops.errors import VideoError
from vsr_ops.video import Frame, VideoInfo, glance, made_info, open_writer, probe
from vsr_ops.video.sampled import MOST, STRETCH, SampledCuts, sample_cuts
from vsr_ops.video.scenes import find_cuts


def scene(seed: int, count: int) -> list[Tensor]:
    """A pan over a smooth random picture."""
    coarse = torch.rand(1, 3, 4, 40, generator=torch.Generator().manual_seed(seed))
    wide = torch.nn.functional.interpolate(coarse, size=(48, 480), mode="bicubic").clamp(0, 1)[0]
    return [wide[:, :, i : i + 64] for i in range(count)]


def written(path: Path, frames: list[Tensor], rate: Fraction | int = 24) -> VideoInfo:
    made = made_info(64, 48, len(frames), rate)
    with open_writer(path, made, size=(48, 64), codec="h264" if path.suffix == ".mp4" else "ffv1") as writer:
        for index, frame in enumerate(frames):
            writer.write(Frame(frame, None, index))
    return glance(path)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
@pytest.mark.parametrize("rate", [24, NTSC])
def test_a_glance_is_a_probe_of_what_headers_say(tmp_path: Path, name: str, rate: Fraction | int) -> None:
    found = written(tmp_path / name, scene(0, 30), rate)
    known = probe(tmp_path / name)
    assert abs(found.frames - known.frames) <= (name == "a.mkv")
    assert (found.width, found.height, found.kind, found.codec) == (known.width, known.height, known.kind, known.codec)
    assert float(found.rate) == pytest.approx(float(known.rate), rel=1e-3)
    assert (found.colorspace, found.color_range, found.bits) == (known.colorspace, known.color_range, known.bits)


def test_pictures_are_all_looked_at(tmp_path: Path) -> None:
    write(tmp_path / "in", made_info(24, 16, 3), "png")
    assert glance(tmp_path / "in") == probe(tmp_path / "in")
    with pytest.raises(VideoError, match="does not exist"):
        glance(tmp_path / "nothing.mp4")


def test_a_short_clip_is_looked_at_whole(tmp_path: Path) -> None:
    frames = scene(1, 12) + scene(2, 20)
    found = sample_cuts(written(tmp_path / "a.mp4", frames), 0, 32)
    assert found == SampledCuts((12,), 1, 32, 31, 32) and found.describe() == "2, all 32 frames looked at"
    assert found.cuts == find_cuts(frames)


@pytest.fixture(scope="module", params=[200, 10])
def long(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[VideoInfo, int]:
    """200 frames in one scene, or in scenes of ten frames, and how many cuts there are."""
    length: int = request.param
    frames = [frame for seed in range(200 // length) for frame in scene(seed, length)]
    return written(tmp_path_factory.mktemp("long") / "a.mp4", frames), 200 // length - 1


def test_a_long_clip_is_told_from_stretches(long: tuple[VideoInfo, int]) -> None:
    """About as many cuts are assumed as there are, evenly spaced."""
    info, cuts = long
    found = sample_cuts(info, 0, 200, seconds=60)
    assert found.looked == MOST * STRETCH and found.pairs == MOST * (STRETCH - 1)
    assert cuts / 2 <= len(found.cuts) <= 2 * cuts
    gaps = {b - a for a, b in zip((0, *found.cuts), (*found.cuts, 200), strict=True)}
    assert max(gaps) - min(gaps) <= 1
    sure = "95 % sure of under 1 in 28" if cuts == 0 else "--cuts auto looks at all"
    assert f"{len(found.cuts) + 1} assumed" in found.describe() and sure in found.describe()


def test_there_is_no_more_time_than_was_given(long: tuple[VideoInfo, int]) -> None:
    assert sample_cuts(long[0], 0, 200, seconds=0).looked <= 2 * STRETCH
