"""Writing: alpha, pictures, what stands under the final name, and what is refused early."""

from __future__ import annotations

import math
import re
import sys
import warnings
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.support.video_files import picture, steady, write
from vsr_ops.errors import VideoError
from vsr_ops.video import Frame, check_output, made_info, open_writer, probe, read_frames


@pytest.mark.parametrize(
    ("codec", "name", "error"),
    [
        ("png", "out", 0.51 / 65535),
        ("png8", "out", 0.51 / 255),
        ("ffv1", "out.mkv", 0.51 / 65535),
        ("prores", "out.mov", 2 / 255),
    ],
)
def test_alpha_goes_through_where_the_output_has_it(tmp_path: Path, codec: str, name: str, error: float) -> None:
    info = made_info(32, 24, 2, alpha=True)
    alpha = torch.linspace(0, 1, 32).expand(1, 24, 32)
    with open_writer(tmp_path / name, info, size=(24, 32), codec=codec) as writer:
        for index in range(2):
            writer.write(Frame(picture(index, 24, 32), alpha, index))
    again = probe(tmp_path / name)
    assert again.alpha and again.frames == 2
    for index, frame in enumerate(read_frames(again)):
        assert frame.alpha is not None
        assert (frame.alpha - alpha).abs().max() < error
        assert (frame.image - picture(index, 24, 32)).abs().max() < error


@pytest.mark.parametrize(("codec", "name"), [("h264", "out.mp4"), ("jpeg", "out")])
def test_alpha_that_cannot_be_kept_is_dropped_with_a_warning(tmp_path: Path, codec: str, name: str) -> None:
    info = made_info(32, 24, 1, alpha=True)
    with pytest.warns(UserWarning, match=f"codec {codec} holds no alpha"):
        writer = open_writer(tmp_path / name, info, size=(24, 32), codec=codec)
    with writer:
        writer.write(Frame(picture(0, 24, 32), torch.zeros(1, 24, 32), 0))
    frame = next(iter(read_frames(probe(tmp_path / name))))
    assert frame.alpha is None
    assert (frame.image.mean((1, 2)) - picture(0, 24, 32).mean((1, 2))).abs().max() < 2 / 255


def test_one_picture_in_one_picture_out(tmp_path: Path) -> None:
    Image.new("RGB", (8, 6), (10, 200, 30)).save(tmp_path / "in.png")
    info = probe(tmp_path / "in.png")
    assert (info.kind, info.frames) == ("picture", 1)
    frame = next(iter(read_frames(info)))
    for codec, name in (("png", "a.png"), ("png8", "b.png"), ("jpeg", "c.jpg")):
        with open_writer(tmp_path / name, info, size=(6, 8), codec=codec) as writer:
            writer.write(frame)
        out = next(iter(read_frames(probe(tmp_path / name)))).image
        assert (out - frame.image).abs().max() < (3 / 255 if codec == "jpeg" else 1e-6)
    with (
        pytest.raises(VideoError, match="one picture"),
        open_writer(tmp_path / "d.png", info, size=(6, 8), codec="png") as writer,
    ):
        writer.write(frame)
        writer.write(replace(frame, pts=1))
    assert not (tmp_path / "d.png").exists()


def test_overwriting_a_folder_replaces_its_frames_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    write(folder, made_info(8, 6, 5), "png8")
    (folder / "keep.txt").write_text("mine")
    with pytest.raises(VideoError, match="already exists"):
        check_output(folder, codec="png8")
    before = (folder / "frame_000001.png").read_bytes()
    check_output(folder, overwrite=True, codec="png8", frames=5)
    with open_writer(folder, made_info(8, 6, 5), size=(6, 8), codec="png8", overwrite=True) as writer:
        for index in range(5):
            writer.write(Frame(picture(index, 6, 8) / 2, None, index))
    frames = [f"frame_00000{index}.png" for index in range(5)]
    assert sorted(p.name for p in folder.iterdir()) == [*frames, "keep.txt"]
    assert (folder / "frame_000001.png").read_bytes() != before and (folder / "keep.txt").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_frames_of_a_longer_run_are_not_deleted_but_refused(tmp_path: Path) -> None:
    """Nothing says whose they are, so they stay; beside a shorter video they would be its end, so none is written."""
    folder = tmp_path / "out"
    write(folder, made_info(8, 6, 5), "png8")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(VideoError, match=r"holds 'frame_000002\.png' and 2 more .*two videos would mix; empty"):
        check_output(folder, overwrite=True, codec="png8", frames=2)
    with (
        pytest.raises(VideoError, match=r"the finished result stays in .*two videos would mix") as caught,
        open_writer(folder, made_info(8, 6, 2), size=(6, 8), codec="png8", overwrite=True) as writer,
    ):
        for index in range(2):
            writer.write(Frame(picture(index, 6, 8), None, index))
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before
    (kept,) = folder.glob(".*.part-*")
    assert str(kept) in str(caught.value) and len(list(kept.iterdir())) == 2


def _nothing_left(folder: Path) -> bool:
    return not list(folder.iterdir())


@pytest.mark.parametrize("trouble", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize(
    ("codec", "name"), [("h264", "out.mp4"), ("ffv1", "out.mkv"), ("png", "out"), ("jpeg", "out.jpg")]
)
def test_any_exception_leaves_nothing_behind(
    tmp_path: Path, codec: str, name: str, trouble: type[BaseException]
) -> None:
    with (
        pytest.raises(trouble),
        open_writer(tmp_path / name, made_info(64, 48, 3), size=(48, 64), codec=codec) as writer,
    ):
        writer.write(Frame(picture(0, 48, 64), None, 0))
        # The part and the lock, both hidden.
        assert sorted(p.name.split(".")[1] for p in tmp_path.iterdir()) == ["out", "out"]
        assert not (tmp_path / name).exists() and len(list(tmp_path.glob(".*"))) == 2
        raise trouble
    assert _nothing_left(tmp_path)


def test_a_failed_run_leaves_the_older_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    write(path, made_info(64, 48, 2))
    before = path.read_bytes()
    with (
        pytest.raises(RuntimeError),
        open_writer(path, made_info(64, 48, 3), size=(48, 64), overwrite=True) as writer,
    ):
        writer.write(Frame(picture(0, 48, 64), None, 0))
        raise RuntimeError
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX's")
@pytest.mark.parametrize(
    ("codec", "name"), [("h264", "out.mp4"), ("ffv1", "out.mkv"), ("png", "out"), ("png8", "out.png")]
)
def test_a_full_disk_is_an_error_in_one_line_and_leaves_nothing(tmp_path: Path, codec: str, name: str) -> None:
    import resource

    generator = torch.Generator().manual_seed(0)
    frames = [Frame(torch.rand(3, 64, 64, generator=generator), None, i) for i in range(16)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, hard))
    try:
        with (
            pytest.raises(VideoError, match="disk is full") as caught,
            open_writer(tmp_path / name, made_info(64, 64, 16), size=(64, 64), codec=codec) as writer,
        ):
            for frame in frames:
                writer.write(frame)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert _nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("name", "codec", "words"),
    [
        ("missing/out.mp4", "h264", "does not exist"),
        ("out.webm", "h264", r"needs \.mp4, \.mov, \.mkv, \.m4v"),
        ("out.png", "h264", "or codec png or png8"),
        ("out", "h264", "needs"),
        ("out.mp4", "prores", r"needs \.mov"),
        ("out.mp4", "png", "or a folder"),
        ("out.jpg", "png", "or a folder"),
        ("out.mp4", "h265", "unknown codec 'h265'; expected one of h264, prores"),
        ("there.mp4", "h264", "already exists"),
        ("folder", "png", "already exists"),
        ("folder.mp4", "h264", "is a folder"),
        ("file", "png", "is a file"),
    ],
)
def test_outputs_that_cannot_work_are_refused_early(tmp_path: Path, name: str, codec: str, words: str) -> None:
    (tmp_path / "there.mp4").touch()
    (tmp_path / "file").touch()
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.txt").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(VideoError, match=words):
        check_output(tmp_path / name, codec=codec)
    assert sorted(tmp_path.rglob("*")) == before


def test_outputs_that_can_work_pass_and_leave_no_trace(tmp_path: Path) -> None:
    (tmp_path / "there.mp4").write_text("old")
    (tmp_path / "empty").mkdir()
    for name, codec in (
        ("a.mp4", "h264"),
        ("a.MKV", "ffv1"),
        ("v1.5", "png"),
        ("empty", "jpeg"),
        ("a.JPEG", "jpeg"),
    ):
        check_output(tmp_path / name, codec=codec)
    check_output(tmp_path / "there.mp4", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "there.mp4"]
    assert (tmp_path / "there.mp4").read_text() == "old"
    with pytest.raises(VideoError, match="12 frames"):
        check_output(tmp_path / "a.png", codec="png", frames=12)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that not even root can write to")
def test_a_folder_that_cannot_be_written_to_is_refused_early() -> None:
    with pytest.raises(VideoError, match=r"folder '/proc' cannot be written to"):
        check_output("/proc/out.mp4")


def test_the_input_is_never_written_over(tmp_path: Path) -> None:
    path = steady(tmp_path / "in.mp4", 2)
    with pytest.raises(VideoError, match="is the input itself"):
        open_writer(tmp_path / "." / "in.mp4", probe(path), size=(48, 64), overwrite=True)


def test_frames_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    cases = [
        (Frame(torch.zeros(3, 48, 65), None, 5), "expected (3, 48, 64)"),
        (Frame(torch.zeros(1, 48, 64), None, 5), "expected (3, 48, 64)"),
        (Frame(torch.zeros(3, 48, 64), torch.zeros(3, 48, 64), 5), "expected (1, 48, 64)"),
        (Frame(torch.full((3, 48, 64), math.nan), None, 5), "not finite"),
        (Frame(torch.zeros(3, 48, 64), None, 0), "write frames in order"),
    ]
    for frame, words in cases:
        with (
            pytest.raises(VideoError, match=re.escape(words)),
            open_writer(tmp_path / "out.mp4", made_info(64, 48, 9), size=(48, 64)) as writer,
        ):
            writer.write(Frame(picture(0, 48, 64), None, 0))
            writer.write(frame)
        assert _nothing_left(tmp_path)
    with (
        pytest.raises(VideoError, match="no frame was written"),
        open_writer(tmp_path / "out.mp4", made_info(64, 48, 9), size=(48, 64)),
    ):
        pass
    assert _nothing_left(tmp_path)


def test_any_float_type_is_written_and_values_outside_are_clipped(tmp_path: Path) -> None:
    image = (picture(0, 24, 32) * 1.6 - 0.3).to(torch.bfloat16)
    with open_writer(tmp_path / "out.mkv", made_info(32, 24, 1), size=(24, 32), codec="ffv1") as writer:
        writer.write(Frame(image, None, 0))
    out = next(iter(read_frames(probe(tmp_path / "out.mkv")))).image
    assert (out - image.float().clamp(0, 1)).abs().max() < 1e-4


def test_a_finished_file_is_never_lost_to_a_name_taken_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    with (
        pytest.raises(VideoError, match=r"finished result stays in .*\.out\.part-[0-9a-f]+\.mp4"),
        open_writer(path, made_info(64, 48, 2), size=(48, 64)) as writer,
    ):
        for index in range(2):
            writer.write(Frame(picture(index, 48, 64), None, index))
        path.write_text("someone else's")
    assert path.read_text() == "someone else's"
    (kept,) = tmp_path.glob(".out.part-*.mp4")
    assert probe(kept).frames == 2


def test_frames_are_read_and_written_one_at_a_time(tmp_path: Path) -> None:
    info = probe(steady(tmp_path / "in.mp4", 30))
    living: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0
    with open_writer(tmp_path / "out.mp4", info, size=(48, 64)) as writer:
        for frame in read_frames(info):
            living.add(frame.image)
            most = max(most, len(living))
            writer.write(frame)
    assert most <= 3


def test_quiet_runs_warn_of_nothing(tmp_path: Path) -> None:
    info = probe(steady(tmp_path / "in.mp4", 3, sound="aac"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(tmp_path / "out.mkv", info)
