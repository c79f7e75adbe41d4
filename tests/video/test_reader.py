"""What comes out is what went in: colour, size, timing, sound, orientation."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from tests.support.video_files import NTSC, picture, raw_video, sound_packets, steady, write
from vsr_ops.errors import VideoError
from vsr_ops.video import CODECS, Frame, check_output, made_info, open_writer, probe, read_frames, yuv


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize(("matrix", "color_range"), [(1, 1), (1, 2), (6, 1), (6, 2), (9, 1)])
def test_a_round_trip_keeps_mean_colour_and_says_its_matrix_and_range(
    tmp_path: Path, suffix: str, matrix: int, color_range: int
) -> None:
    path = tmp_path / f"out{suffix}"
    made = replace(made_info(96, 64, 3), colorspace=matrix, color_range=color_range, primaries=1, transfer=13)
    images = write(path, made)
    info = probe(path)
    assert (info.colorspace, info.color_range, info.primaries, info.transfer) == (matrix, color_range, 1, 13)
    for frame, image in zip(read_frames(info), images, strict=True):
        assert (frame.image.mean((1, 2)) - image.mean((1, 2))).abs().max() < 1 / 255
        assert (frame.image - image).abs().mean() < 2 / 255


@pytest.mark.parametrize("matrix", [1, 6])
def test_reading_a_full_range_file_as_limited_would_show(tmp_path: Path, matrix: int) -> None:
    path = tmp_path / "full.mp4"
    images = write(path, replace(made_info(64, 48, 2), colorspace=matrix, color_range=2))
    wrong = replace(probe(path), color_range=1)
    frame = next(iter(read_frames(wrong)))
    assert (frame.image.mean((1, 2)) - images[0].mean((1, 2))).abs().max() > 4 / 255


@pytest.mark.parametrize(("size", "matrix"), [((48, 64), 6), ((576, 704), 6), ((578, 704), 1), ((16, 1280), 1)])
def test_an_unnamed_matrix_is_guessed_by_size(tmp_path: Path, size: tuple[int, int], matrix: int) -> None:
    info = probe(steady(tmp_path / "x.mkv", 1, size=size))
    assert (info.colorspace, info.color_range) == (matrix, 1)


def test_a_matrix_that_is_not_supported_is_refused(tmp_path: Path) -> None:
    path = steady(tmp_path / "ycgco.mkv", 1, tags=(2, 8, 1, 1))
    with pytest.raises(VideoError, match="YUV matrix 8"):
        probe(path)


def test_ten_bits_are_read_as_ten_bits(tmp_path: Path) -> None:
    path = tmp_path / "ten.mkv"
    ramp = np.tile(np.arange(64, 64 + 512, dtype="<u2"), (16, 1))
    with av.open(str(path), "w") as output:
        stream = output.add_stream("ffv1", rate=24)
        stream.width, stream.height, stream.pix_fmt = 512, 16, "yuv444p10le"
        stream.codec_context.color_range, stream.codec_context.colorspace = 1, 1
        frame = av.VideoFrame(512, 16, "yuv444p10le")
        for plane, rows in zip(frame.planes, (ramp, np.full_like(ramp, 512), np.full_like(ramp, 512)), strict=True):
            plane.update(rows.tobytes())
        frame.pts = 0
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    info = probe(path)
    assert info.bits == 10
    image = next(iter(read_frames(info))).image
    expected = torch.arange(512) / (219 * 4)
    assert (image[:, 0] - expected).abs().max() < 1e-5
    assert len(image[0].unique()) == 512


def test_grey_video_is_grey(tmp_path: Path) -> None:
    info = probe(steady(tmp_path / "grey.mkv", 2, encoder="ffv1", pixels="gray", tags=(2, 2, 2, 2)))
    assert info.grey and not info.alpha
    for index, frame in enumerate(read_frames(info)):
        assert frame.image.shape == (3, 48, 64)
        assert (frame.image - (60 + 10 * index) / 255).abs().max() < 1e-6


@pytest.mark.parametrize("codec", ["prores", "ffv1"])
def test_graders_codecs_keep_fine_steps(tmp_path: Path, codec: str) -> None:
    path = tmp_path / f"out{CODECS[codec].suffixes[0]}"
    images = write(path, made_info(64, 48, 2), codec)
    info = probe(path)
    assert info.bits == {"prores": 10, "ffv1": 16}[codec]
    for frame, image in zip(read_frames(info), images, strict=True):
        limit = {"prores": 1.5 / 255, "ffv1": 0.51 / 65535}[codec]
        # The last of an even number of columns has no chroma to its right.
        assert (frame.image - image)[..., :-1].abs().max() < limit


@pytest.mark.parametrize("size", [(48, 64), (47, 64), (48, 63), (47, 63), (2, 2), (1, 1)])
@pytest.mark.parametrize(("codec", "suffix"), [("h264", ".mp4"), ("prores", ".mov"), ("ffv1", ".mkv")])
def test_sizes_are_kept_exactly(tmp_path: Path, codec: str, suffix: str, size: tuple[int, int]) -> None:
    path = tmp_path / f"out{suffix}"
    images = write(path, made_info(size[1], size[0], 2), codec)
    info = probe(path)
    assert (info.height, info.width, info.frames) == (*size, 2)
    for frame, image in zip(read_frames(info), images, strict=True):
        assert frame.image.shape == image.shape
        # Below a block's size nothing but the size can be asked of a lossy codec.
        assert min(size) < 8 or (frame.image.mean((1, 2)) - image.mean((1, 2))).abs().max() < 2 / 255


@pytest.mark.parametrize("source", [".mp4", ".mkv"])
@pytest.mark.parametrize("target", [".mp4", ".mkv", ".mov"])
@pytest.mark.parametrize("rate", [Fraction(25), NTSC, Fraction(25, 2)])
def test_a_steady_rate_and_its_duration_survive(tmp_path: Path, source: str, target: str, rate: Fraction) -> None:
    first = raw_video(tmp_path / f"in{source}", list(range(10)), 1 / rate, rate)
    info = probe(first)
    path = tmp_path / f"out{target}"
    write(path, info)
    again = probe(path)
    assert info.steady and again.steady
    assert (again.frames, again.rate) == (10, rate)
    assert abs((again.end - again.times[0]) * again.time_base - 10 / rate) <= again.time_base / 2
    with av.open(str(path)) as output:
        assert abs(output.duration / 1e6 - float(10 / rate)) < 0.002


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_variable_rate_survives(tmp_path: Path, suffix: str) -> None:
    times = [0, 40, 50, 130, 131, 200, 300, 330]
    first = raw_video(tmp_path / "in.mkv", times, Fraction(1, 1000), Fraction(25))
    info = probe(first)
    assert not info.steady and list(info.times) == times
    path = tmp_path / f"out{suffix}"
    write(path, info)
    again = probe(path)
    assert [round(t * again.time_base * 1000) for t in again.times] == times
    assert abs(again.rate - info.rate) < 0.02 * info.rate
    length = (info.end - info.times[0]) * info.time_base
    assert abs((again.end - again.times[0]) * again.time_base - length) < Fraction(2, 1000)


def test_every_frame_comes_with_its_own_time_and_ranges_are_exact(tmp_path: Path) -> None:
    path = steady(tmp_path / "in.mp4", 14)
    info = probe(path)
    everything = list(read_frames(info))
    assert [frame.pts for frame in everything] == list(info.times)
    part = list(read_frames(info, 5, 9))
    assert [frame.pts for frame in part] == list(info.times[5:9])
    assert all(torch.equal(a.image, b.image) for a, b in zip(part, everything[5:9], strict=True))
    assert len({round(float(frame.image.mean()), 4) for frame in everything}) == 14


@pytest.mark.parametrize(("start", "stop"), [(0, 7), (-1, 3), (3, 3), (4, 2), (6, None)])
def test_a_range_outside_the_video_is_refused_before_reading(tmp_path: Path, start: int, stop: int | None) -> None:
    info = probe(steady(tmp_path / "in.mp4", 6))
    with pytest.raises(VideoError, match=r"which has 6; expected"):
        read_frames(info, start, stop)


def test_files_may_be_given_up_half_way_and_read_again(tmp_path: Path) -> None:
    info = probe(steady(tmp_path / "in.mp4", 6))
    first = read_frames(info)
    next(first)
    assert len(list(read_frames(info))) == 6
    assert len(list(first)) == 5


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_sound_is_copied_byte_for_byte(tmp_path: Path, suffix: str) -> None:
    source = steady(tmp_path / "in.mp4", 12, sound="aac")
    info = probe(source)
    assert info.audio == ("aac",)
    path = tmp_path / f"out{suffix}"
    write(path, info)
    before, after = sound_packets(source), sound_packets(path)
    assert [data for _, data in after] == [data for _, data in before]
    again = probe(path)
    # Sound and pictures stay where they were to each other.
    shift = float(again.times[0] * again.time_base - info.times[0] * info.time_base)
    assert all(abs(b - a - shift) < 0.0015 for (a, _), (b, _) in zip(before, after, strict=True))


def test_sound_is_cut_to_the_frames_written(tmp_path: Path) -> None:
    source = steady(tmp_path / "in.mkv", 25, sound="aac")
    info = probe(source)
    path = tmp_path / "out.mp4"
    with open_writer(path, info, size=(48, 64)) as writer:
        for frame in read_frames(info, 10, 15):
            writer.write(frame)
    again = probe(path)
    assert (again.frames, again.rate, again.times[0]) == (5, 25, 0)
    begin, end = (float(info.times[i] * info.time_base) for i in (10, 15))
    expected = [data for time, data in sound_packets(source) if begin <= time < end]
    found = sound_packets(path)
    assert len(expected) > 5 and [data for _, data in found] == expected
    assert 0 <= found[0][0] < 1024 / 48000
    with av.open(str(path)) as output:
        assert abs(output.duration / 1e6 - 0.2) < 0.025


def test_sound_that_does_not_fit_is_named_and_the_video_is_written(tmp_path: Path) -> None:
    info = probe(steady(tmp_path / "in.mkv", 4, sound="wavpack"))
    path = tmp_path / "out.mp4"
    with pytest.warns(UserWarning, match=r"\.mp4 cannot hold sound of codec wavpack"):
        write(path, info)
    assert probe(path).audio == () and probe(path).frames == 4
    with pytest.warns(UserWarning, match="wavpack"):
        check_output(tmp_path / "early.mp4", info=info)


def test_several_sound_tracks_go_along(tmp_path: Path) -> None:
    double = steady(tmp_path / "two.mkv", 6, sound="aac", tracks=2)
    info = probe(double)
    assert info.audio == ("aac", "aac")
    write(tmp_path / "out.mp4", info)
    assert probe(tmp_path / "out.mp4").audio == ("aac", "aac")


def test_pixels_that_are_not_square_stay_so(tmp_path: Path) -> None:
    for suffix in (".mp4", ".mkv"):
        path = tmp_path / f"out{suffix}"
        write(path, replace(made_info(64, 48, 2), aspect=Fraction(4, 3)))
        assert probe(path).aspect == Fraction(4, 3)
    with pytest.warns(UserWarning, match="4/3 as wide as high"):
        check_output(tmp_path / "x.mkv", codec="ffv1", info=replace(made_info(64, 48, 2), aspect=Fraction(4, 3)))


def test_pictures_take_another_rate_and_videos_do_not(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    with open_writer(path, made_info(64, 48, 5), size=(48, 64), rate=NTSC) as writer:
        for index in range(5):
            writer.write(Frame(picture(index, 48, 64), None, index))
    assert (probe(path).rate, probe(path).frames) == (NTSC, 5)
    with pytest.raises(VideoError, match="keeps its own"):
        open_writer(tmp_path / "b.mp4", probe(path), size=(48, 64), rate=30)
    with pytest.raises(VideoError, match="not above 0"):
        open_writer(tmp_path / "b.mp4", made_info(64, 48, 5), size=(48, 64), rate=0)


@pytest.mark.skipif(not hasattr(av.VideoStream, "set_display_matrix"), reason="older PyAV cannot write a matrix")
@pytest.mark.parametrize(
    "turn",
    [
        (1, 0, 0, 1),
        (0, 1, -1, 0),
        (-1, 0, 0, -1),
        (0, -1, 1, 0),
        (-1, 0, 0, 1),
        (0, 1, 1, 0),
        (1, 0, 0, -1),
        (0, -1, -1, 0),
    ],
)
def test_frames_come_upright_and_so_does_the_output(tmp_path: Path, turn: tuple[int, int, int, int]) -> None:
    a, b, c, d = turn
    one = 1 << 16
    path = tmp_path / "in.mp4"
    stored = picture(0, 48, 64)
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=25, options={"crf": "4"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv444p"
        stream.codec_context.colorspace, stream.codec_context.color_range = 6, 1
        stream.set_display_matrix([a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30])
        frame = yuv.from_rgb(stored, None, "yuv444p", 6, False)
        frame.pts = 0
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    info = probe(path)
    # ISO/IEC 14496-12: a stored point (x, y) is shown at (a x + c y, b x + d y), here around the centre.
    y, x = torch.meshgrid(torch.arange(48) - 23.5, torch.arange(64) - 31.5, indexing="ij")
    shown_x, shown_y = a * x + c * y, b * x + d * y
    height, width = (48, 64) if a else (64, 48)
    assert (info.height, info.width) == (height, width)
    expected = torch.zeros(3, height, width)
    rows, columns = (shown_y + (height - 1) / 2).long(), (shown_x + (width - 1) / 2).long()
    expected[:, rows, columns] = stored
    image = next(iter(read_frames(info))).image
    assert (image - expected).abs().max() < 6 / 255
    again = tmp_path / "out.mkv"
    with open_writer(again, info, size=(height, width)) as writer:
        writer.write(Frame(image, None, info.times[0]))
    upright = probe(again)
    assert (upright.rotation, upright.mirrored, upright.height, upright.width) == (0, False, height, width)
    assert (next(iter(read_frames(upright))).image - expected).abs().mean() < 3 / 255


@pytest.mark.skipif(not hasattr(av.VideoStream, "set_display_matrix"), reason="older PyAV cannot write a matrix")
def test_a_turn_that_is_no_quarter_is_refused(tmp_path: Path) -> None:
    path = steady(tmp_path / "in.mp4", 1, rotate=lambda stream: stream.set_display_rotation(30))
    with pytest.raises(VideoError, match="multiple of 90"):
        probe(path)
