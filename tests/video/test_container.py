"""Bad, cut and damaged files cost one clear line; containers say what they hold."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.video_files import steady, write
from vsr_ops.errors import VideoError
from vsr_ops.video import Frame, container, made_info, open_writer, probe, read_frames


def _bad_inputs() -> Iterator[tuple[str, Callable[[Path], Path], str]]:
    def text(folder: Path) -> Path:
        (folder / "text.mp4").write_text("once upon a time\n" * 200)
        return folder / "text.mp4"

    def empty(folder: Path) -> Path:
        (folder / "empty.mp4").touch()
        return folder / "empty.mp4"

    def sound_only(folder: Path) -> Path:
        with av.open(str(folder / "song.mp4"), "w") as output:
            stream = output.add_stream("aac", rate=48000)
            tone = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
            tone.rate = 48000
            output.mux(stream.encode(tone))
            output.mux(stream.encode(None))
        return folder / "song.mp4"

    def no_frames(folder: Path) -> Path:
        with av.open(str(folder / "none.mkv"), "w") as output:
            stream = output.add_stream("ffv1", rate=25)
            stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
            output.start_encoding()
        return folder / "none.mkv"

    def no_pictures(folder: Path) -> Path:
        (folder / "pics").mkdir()
        return folder / "pics"

    def fake_picture(folder: Path) -> Path:
        (folder / "fake.png").write_text("hello")
        return folder / "fake.png"

    def cut_picture(suffix: str) -> Callable[[Path], Path]:
        def make(folder: Path) -> Path:
            path = folder / f"cut{suffix}"
            noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).save(path)
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            return path

        return make

    yield "missing", lambda folder: folder / "nothing.mp4", "does not exist"
    yield "text", text, "cannot be opened as a video"
    yield "empty", empty, "is empty"
    yield "sound only", sound_only, "has no video stream"
    yield "no frames", no_frames, "no frames|cannot be opened|damaged"
    yield "empty folder", no_pictures, "holds no pictures"
    yield "fake picture", fake_picture, "not a picture"
    yield "cut png", cut_picture(".png"), "damaged picture"
    yield "cut jpeg", cut_picture(".jpg"), "damaged picture"


@pytest.mark.parametrize(
    ("make", "words"), [case[1:] for case in _bad_inputs()], ids=[case[0] for case in _bad_inputs()]
)
def test_bad_input_costs_one_clear_line(tmp_path: Path, make: Callable[[Path], Path], words: str) -> None:
    path = make(tmp_path)
    with pytest.raises(VideoError, match=words) as caught:
        probe(path)
    assert "\n" not in str(caught.value) and path.name in str(caught.value)


def _index_first(path: Path, target: Path) -> Path:
    """The same mp4 with its index before its data, as files for the web have it."""
    with av.open(str(path)) as source, av.open(str(target), "w", options={"movflags": "faststart"}) as output:
        video = source.streams.video[0]
        route = output.add_stream_from_template(video)
        for packet in source.demux(video):
            if packet.dts is not None:
                packet.stream = route
                output.mux(packet)
    return target


@pytest.mark.parametrize("kind", ["mp4", "mp4 for the web", "mkv", "webm"])
@pytest.mark.parametrize("share", [0.5, 0.97])
def test_a_file_that_ends_early_is_refused(tmp_path: Path, kind: str, share: float) -> None:
    whole = steady(tmp_path / f"whole.{kind.split()[0].replace('webm', 'mkv')}", 40, size=(96, 128))
    if kind == "mp4 for the web":
        whole = _index_first(whole, tmp_path / "web.mp4")
    if kind == "webm":
        whole = steady(
            tmp_path / "whole.webm", 10, encoder="libvpx" if "libvpx" in av.codecs_available else "libvpx-vp9"
        )
    assert probe(whole).frames in (10, 40)
    cut = tmp_path / f"cut{whole.suffix}"
    data = whole.read_bytes()
    cut.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(VideoError, match=r"cut off|cannot be opened"):
        probe(cut)


@pytest.mark.parametrize("packet", [2, 6])
def test_damage_inside_a_file_is_refused(tmp_path: Path, packet: int) -> None:
    path, data, starts = _noise(tmp_path)
    data[starts[packet] - 300 : starts[packet] + 300] = bytes(600)
    path.write_bytes(data)
    with pytest.raises(VideoError, match="damaged near frame"):
        probe(path)


def test_frames_that_damage_swallows_do_not_go_unsaid(tmp_path: Path) -> None:
    path, data, starts = _noise(tmp_path)
    data[starts[-1] : starts[-1] + 8] = bytes(8)
    path.write_bytes(data)
    # Releases of FFmpeg differ in whether they notice.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((UserWarning, VideoError), match=r"gave no picture|damaged near frame"):
            probe(path)


def _noise(folder: Path) -> tuple[Path, bytearray, list[int]]:
    """A video that hardly compresses, its bytes, and where its packets begin."""
    path = folder / "noise.mp4"
    generator = torch.Generator().manual_seed(0)
    with open_writer(path, made_info(64, 48, 12), size=(48, 64)) as writer:
        for index in range(12):
            writer.write(Frame(torch.rand(3, 48, 64, generator=generator), None, index))
    assert probe(path).frames == 12
    with av.open(str(path)) as source:
        starts = [packet.pos for packet in source.demux(video=0) if packet.size]
    return path, bytearray(path.read_bytes()), starts


def test_trailing_bytes_and_odd_names_do_no_harm(tmp_path: Path) -> None:
    path = steady(tmp_path / "a:b %03d é.mp4", 3)
    with path.open("ab") as file:
        file.write(b"\xff" * 64)
    assert probe(path).frames == 3
    out = tmp_path / "out:put %d ü.mp4"
    write(out, probe(path))
    assert probe(out).frames == 3


def test_an_input_that_changes_between_readings_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "in.mp4"
    info = probe(steady(path, 6))
    steady(path, 4)
    with pytest.raises(VideoError, match="had 6 frames and now has 4"):
        list(read_frames(info))


def test_containers_say_what_sound_they_hold(tmp_path: Path) -> None:
    path = steady(tmp_path / "in.mkv", 2, sound="aac")
    with container.open_input(path) as source:
        (stream,) = container.audio_streams(source)
        assert container.fits(stream, "mp4") and container.fits(stream, "matroska")
        assert not container.fits(stream, "webm")
