"""The ways to write frames: the table of codecs, a video file in the making, pictures in the making."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
from av.error import FFmpegError
from av.packet import Packet
from av.video.format import VideoFormat
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from ..errors import VideoError
from . import container, pictures, yuv
from .reader import FULL_RANGE, Frame, VideoInfo

FORMATS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
"""FFmpeg's name of the container by the path's ending."""

_LIMITED_RANGE = 1
_BT709 = 1


def _h264_pixels(height: int, width: int, alpha: bool) -> str:
    # Subsampled chroma needs even sizes; whole chroma keeps odd ones exact.
    return "yuv444p" if height % 2 or width % 2 else "yuv420p"


def _prores_pixels(height: int, width: int, alpha: bool) -> str:
    return "yuva444p10le" if alpha else "yuv422p10le"


def _ffv1_pixels(height: int, width: int, alpha: bool) -> str:
    return "gbrap16le" if alpha else "gbrp16le"


@dataclass(frozen=True)
class OutputFormat:
    """One way to write, and what it can hold.

    `encoder` is FFmpeg's (empty: pictures); `pixels` picks its pixel format by (height, width, alpha).
    `aspect`: pixels that are not square; `full_range`: YUV that uses all codes.
    """

    suffixes: tuple[str, ...]
    encoder: str = ""
    pixels: Callable[[int, int, bool], str] = _h264_pixels
    options: dict[str, str] = field(default_factory=dict[str, str])
    alpha: bool = False
    aspect: bool = False
    full_range: bool = True


CODECS: dict[str, OutputFormat] = {
    "h264": OutputFormat((".mp4", ".mov", ".mkv", ".m4v"), "libx264", _h264_pixels, {"crf": "16"}, aspect=True),
    "prores": OutputFormat(
        (".mov",), "prores_ks", _prores_pixels, {"vendor": "apl0"}, alpha=True, aspect=True, full_range=False
    ),
    "ffv1": OutputFormat((".mkv",), "ffv1", _ffv1_pixels, {"level": "3", "slicecrc": "1"}, alpha=True),
    "png": OutputFormat((".png",), alpha=True),
    "png8": OutputFormat((".png",), alpha=True),
    "jpeg": OutputFormat((".jpg", ".jpeg")),
}
"""h264: 8 bits, 4:2:0, crf 16; an odd size is kept exactly by 4:4:4, which fewer players know. prores: 422 HQ
of 10 bits, 4444 with alpha; always limited range, since mov cannot say otherwise for it. ffv1: lossless RGB
of 16 bits. png (16 bits), png8, jpeg: one picture where the path ends so, else a folder of numbered ones."""


class VideoSink:
    """A video file in the making."""

    def __init__(self, part: Path, info: VideoInfo, size: tuple[int, int], way: OutputFormat, rate: Fraction) -> None:
        self._info, self._way = info, way
        # A steady video is written on its exact grid, without the rounding of the container it came in.
        self._tick = 1 / rate if info.steady else info.time_base
        self._pixels = way.pixels(*size, info.alpha and way.alpha)
        rgb = info.colorspace == yuv.RGB_MATRIX
        planar_rgb = VideoFormat(self._pixels).is_rgb
        self._matrix = yuv.RGB_MATRIX if planar_rgb else _BT709 if rgb else info.colorspace
        self._full = planar_rgb or (way.full_range and not rgb and info.color_range == FULL_RANGE)
        unsaid = yuv.UNSPECIFIED
        self._primaries = _BT709 if rgb and info.primaries == unsaid else info.primaries
        self._transfer = _BT709 if rgb and info.transfer == unsaid else info.transfer
        self._durations: dict[int, int] = {}
        self._origin: int | None = None
        self._last = 0
        self._audio: container.AudioCopy | None = None
        self._output = av.open(f"file:{part}", "w", format=FORMATS[part.suffix.lower()])
        try:
            # PyAV leaves parts of this method's type open.
            add_stream = cast(Any, self._output).add_stream
            self._stream = cast(VideoStream, add_stream(way.encoder, rate=rate, options=dict(way.options)))
            self._configure(size)
            if info.audio:
                self._audio = container.AudioCopy(info.path, self._output)
            # Encoder and header now: what they object to must not wait for the first packet.
            self._output.start_encoding()
        except BaseException:
            self.drop()
            raise

    def _configure(self, size: tuple[int, int]) -> None:
        stream, context = self._stream, self._stream.codec_context
        stream.height, stream.width = size
        stream.pix_fmt = self._pixels
        context.time_base = self._tick
        if self._way.encoder == "prores_ks":
            context.options = {**context.options, "profile": "4" if "444" in self._pixels else "3"}
        context.color_range = FULL_RANGE if self._full else _LIMITED_RANGE
        context.colorspace = self._matrix
        context.color_primaries = self._primaries
        context.color_trc = self._transfer
        if self._way.aspect:
            context.sample_aspect_ratio = self._info.aspect

    def write(self, frame: Frame) -> None:
        """Encodes the next frame."""
        info = self._info
        if self._origin is None:
            self._origin = frame.pts
        pts = frame.pts - self._origin
        if info.steady:
            pts = round(pts * info.time_base * info.rate)
        picture = yuv.from_rgb(frame.image, frame.alpha, self._pixels, self._matrix, self._full)
        self._tag(picture)
        picture.pts, picture.time_base = pts, self._tick
        self._durations[pts] = 1 if info.steady else self._span(frame.pts)
        self._encode(picture)
        self._last = frame.pts
        if self._audio is not None:
            self._audio.copy(self._seconds(self._origin), self._seconds(frame.pts), self._from_first())

    def finish(self) -> None:
        """Encodes what waits, copies the sound, and closes the file."""
        self._encode(None)
        if self._audio is not None and self._origin is not None:
            whole = self._last == self._info.times[-1]
            end = None if whole else self._seconds(self._last + self._span(self._last))
            self._audio.copy(self._seconds(self._origin), end, self._from_first())
            self._audio.close()
        self._output.close()

    def drop(self) -> None:
        """Closes what is open, whatever state it is in."""
        if self._audio is not None:
            self._audio.close()
        try:
            self._output.close()
        except (OSError, FFmpegError):
            # The file is about to be removed, and what failed has been said.
            return

    def _encode(self, picture: VideoFrame | None) -> None:
        packets: list[Packet[VideoStream]] = cast(Any, self._stream).encode(picture)
        for packet in packets:
            # Without it the last frame would have no length.
            packet.duration = self._durations.pop(packet.pts or 0, 0)
            container.mux(self._output, packet)

    def _tag(self, picture: VideoFrame) -> None:
        picture.colorspace = self._matrix
        picture.color_range = FULL_RANGE if self._full else _LIMITED_RANGE
        # Older PyAV has these on the encoder only.
        if hasattr(picture, "color_primaries"):
            picture.color_primaries = self._primaries
            picture.color_trc = self._transfer

    def _span(self, pts: int) -> int:
        """How long the frame of the source at `pts` is shown, in the source's time base."""
        times = self._info.times
        after = bisect_left(times, pts) + 1
        return (times[after] if after < len(times) else self._info.end) - pts

    def _seconds(self, pts: int) -> Fraction:
        return pts * self._info.time_base

    def _from_first(self) -> bool:
        return self._origin == self._info.times[0]


def picture_name(index: int, suffix: str) -> str:
    """The name of a folder's picture."""
    return f"frame_{index:06d}{suffix}"


class PictureSink:
    """Pictures in the making: one file, or a folder of numbered ones, which is there."""

    def __init__(self, part: Path, codec: str, suffix: str, single: bool, final: Path) -> None:
        self._part, self._save, self._suffix, self._single = part, pictures.SAVERS[codec], suffix, single
        self._final = final
        self._count = 0

    def write(self, frame: Frame) -> None:
        """Writes the next picture."""
        if self._single and self._count:
            raise VideoError(f"'{self._final}' is one picture but more frames came; give a folder instead")
        target = self._part if self._single else self._part / picture_name(self._count, self._suffix)
        self._save(target, frame.image, frame.alpha)
        self._count += 1

    def finish(self) -> None:
        """Every picture is on the disk already."""

    def drop(self) -> None:
        """Nothing is held open."""
