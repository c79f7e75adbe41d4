"""Media containers: open one, decode its picture stream and notice damage, carry its sound over unchanged."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, cast

import av
from av.audio.stream import AudioStream
from av.container.input import InputContainer
from av.container.output import OutputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.stream import Disposition, Stream
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from ..errors import VideoError

_REPAIR = "copy or download it again, or keep what is there with ffmpeg -i IN -c copy OUT"
_ONE_TO_ONE = ("h264", "hevc")
"""Codecs whose every packet is a frame to show, unless interlaced."""

_MISSING_SECONDS = 1.0
"""Headers are off by less than this in sound Matroska files."""


def open_input(path: Path) -> InputContainer:
    """Open a media file for reading. Raises VideoError where FFmpeg makes nothing of it."""
    if path.stat().st_size == 0:
        raise VideoError(f"'{path}' is empty (0 bytes); expected a video: copy or export it again")
    try:
        # Local files only, also for playlists that name others.
        return av.open(f"file:{path}", options={"protocol_whitelist": "file"})
    except PermissionError as error:
        raise VideoError(f"'{path}' may not be read ({error.strerror}); change its permissions") from error
    except (FFmpegError, UnicodeError) as error:
        raise VideoError(
            f"'{path}' cannot be opened as a video ({_reason(error)}); expected a whole video file such as"
            " mp4, mov, mkv or webm: check that it is one and was copied to its end"
        ) from error


def picture_stream(container: InputContainer, path: Path) -> VideoStream:
    """The video stream that players choose. Raises VideoError when there is none, or no decoder for it."""
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        kinds = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
        raise VideoError(f"'{path}' has no video stream (it holds: {kinds}); give a file with pictures")
    best = container.streams.best("video")
    stream = next((s for s in streams if best is not None and s.index == best.index), streams[0])
    if stream.codec_context is None:  # pyright: ignore[reportUnnecessaryComparison]
        raise VideoError(f"'{path}' uses a video codec that this FFmpeg cannot decode; convert it to H.264")
    return stream


def promised_frames(container: InputContainer, stream: VideoStream) -> int:
    """How many frames the header says there are, or its length and rate; 0 where it says neither."""
    if stream.frames:
        return stream.frames
    rate = stream.average_rate or stream.guessed_rate
    if stream.duration is not None and stream.time_base is not None:
        length = stream.duration * stream.time_base
    else:
        length = Fraction(container.duration or 0, av.time_base)
    return round(length * rate) if rate else 0


def audio_streams(container: InputContainer) -> list[AudioStream]:
    """The sound streams whose codec FFmpeg knows."""
    return [s for s in container.streams.audio if s.codec_context is not None]  # pyright: ignore[reportUnnecessaryComparison]


def decode(path: Path) -> Iterator[tuple[VideoFrame, int]]:
    """Every frame of a file's picture stream in the order shown, with its duration in ticks (0: unknown).

    Nothing is kept: the file is opened here and closed when the iterator is dropped. Raises VideoError when
    a packet is damaged, the frame size changes, or (mp4, mov and Matroska) the file ends before its own
    headers say. Other containers have no such promise: they give what comes before the cut. Damage that a
    decoder papers over inside a frame does not show; frames that it drops are warned of.
    """
    container = open_input(path)
    with container:
        _require_whole(path, container.format.name)
        stream = picture_stream(container, path)
        stream.thread_type = "AUTO"
        durations: dict[int | None, int] = {}
        first: VideoFrame | None = None
        count, end = 0, Fraction(0)
        try:
            for packet in container.demux():
                end = max(end, _end(packet))
                if packet.stream.index != stream.index:
                    continue
                if not packet.is_discard:
                    durations[packet.pts] = packet.duration or 0
                for frame in _decode_packet(path, cast("Packet[VideoStream]", packet), count):
                    first = first or frame
                    _require_size(path, count, frame, first)
                    count += 1
                    yield frame, durations.pop(frame.pts, 0)
        except FFmpegError as error:
            raise _damaged(path, count, _reason(error)) from error
        if "matroska" in container.format.name and container.duration is not None:
            _require_end(path, end, Fraction(container.duration, av.time_base))
        if first is not None and stream.codec_context.name in _ONE_TO_ONE and not first.interlaced_frame:
            _warn_of_lost(path, first, durations)


class AudioCopy:
    """Carries the sound packets of one file into another, unchanged, as far as the pictures have come.

    Packets that begin inside the pictures' time are taken; where the pictures begin with the source's first
    frame, so is all sound before them, and where they end with its last, all sound after.
    """

    def __init__(self, path: Path, output: OutputContainer) -> None:
        """Add a stream to `output` for every sound stream of `path` that it can hold."""
        self._path = path
        self._container = open_input(path)
        fitting = [s for s in audio_streams(self._container) if fits(s, output.format.name)]
        self._routes = {s.index: copy_stream(output, s) for s in fitting}
        self._packets = self._container.demux(tuple(fitting)) if fitting else iter(())
        self._waiting: Packet[AudioStream] | None = None
        self._output = output

    def copy(self, origin: Fraction, until: Fraction | None, everything_before: bool) -> None:
        """Write the packets that begin before `until` seconds (None: all), shifted so that `origin` is 0.

        Sound that cannot be read or stored ends there with a warning: the pictures are worth more. Raises
        OSError when the disk does.
        """
        try:
            self._copy(origin, until, everything_before)
        except OSError:
            raise
        except FFmpegError as error:
            self._packets = iter(())
            warnings.warn(f"the sound of '{self._path}' ends early: {_reason(error)}", stacklevel=2)

    def _copy(self, origin: Fraction, until: Fraction | None, everything_before: bool) -> None:
        while (packet := self._waiting or next(self._packets, None)) is not None:
            self._waiting = None
            # The packet that ends a stream carries no data.
            if packet.pts is None or packet.dts is None:
                continue
            begin = packet.pts * packet.time_base
            if until is not None and begin >= until:
                self._waiting = packet
                return
            if begin < origin and not everything_before:
                continue
            shift = round(origin / packet.time_base)
            packet.pts -= shift
            packet.dts -= shift
            packet.stream = self._routes[packet.stream_index]
            mux(self._output, packet)

    def close(self) -> None:
        """Let go of the source."""
        self._container.close()


def copy_stream(output: OutputContainer, stream: AudioStream) -> AudioStream:
    """A stream of `output` that takes the packets of `stream` as they are."""
    # PyAV leaves parts of this method's type open.
    return cast(Any, output).add_stream_from_template(stream)


def mux(output: OutputContainer, packet: Packet[Any]) -> None:
    """Hand one packet to a container."""
    cast(Any, output).mux(packet)


def fits(stream: AudioStream, format_name: str) -> bool:
    """Whether a container format can hold this sound stream: found by writing a header to memory."""
    try:
        trial = av.open(io.BytesIO(), "w", format=format_name)
        with trial:
            copy_stream(trial, stream)
            trial.start_encoding()
    except (FFmpegError, ValueError):
        return False
    return True


def _decode_packet(path: Path, packet: Packet[VideoStream], count: int) -> list[VideoFrame]:
    if packet.is_corrupt:
        raise _damaged(path, count, "a packet is cut off")
    frames = packet.decode()
    if any(frame.is_corrupt for frame in frames):
        raise _damaged(path, count, "its data is corrupt")
    return frames


def _require_size(path: Path, index: int, frame: VideoFrame, first: VideoFrame) -> None:
    if (frame.width, frame.height) != (first.width, first.height):
        raise VideoError(
            f"'{path}' changes size at frame {index}, from {first.width}x{first.height} to"
            f" {frame.width}x{frame.height}; expected one size: split or convert it"
        )


def _require_end(path: Path, end: Fraction, promised: Fraction) -> None:
    """Matroska steps over damage in silence; the time that goes missing gives it away."""
    if promised - end > _MISSING_SECONDS:
        raise VideoError(
            f"'{path}' holds {float(end):.2f} s of the {float(promised):.2f} s that its header says;"
            f" a part is damaged or missing: {_REPAIR}"
        )


def _warn_of_lost(path: Path, first: VideoFrame, unshown: dict[int | None, int]) -> None:
    """What comes before the first frame shown lacks its reference and is left out rightly."""
    start = first.pts or 0
    lost = sum(pts is not None and pts > start for pts in unshown)
    if lost:
        warnings.warn(
            f"{lost} packets of '{path}' gave no picture: it may be damaged and have lost frames",
            stacklevel=2,
        )


def _end(packet: Packet[Stream]) -> Fraction:
    if packet.pts is None:
        return Fraction(0)
    return (packet.pts + (packet.duration or 0)) * packet.time_base


def _reason(error: Exception) -> str:
    """FFmpeg's own words, without the file name that the message has anyway."""
    return str(getattr(error, "strerror", None) or error).strip().lower()


def _damaged(path: Path, index: int, reason: str) -> VideoError:
    return VideoError(f"'{path}' is damaged near frame {index} ({reason}); expected whole video data: {_REPAIR}")


def _require_whole(path: Path, format_name: str) -> None:
    """Raise VideoError when mp4, mov or Matroska headers promise more bytes than the file has."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if "matroska" in format_name:
            promised = _ebml_end(file)
        elif "mp4" in format_name:
            promised = _box_end(file, size)
        else:
            return
    if promised > size:
        raise VideoError(f"'{path}' is cut off: it has {size} bytes of the {promised} that its header says: {_REPAIR}")


def _box_end(file: BinaryIO, size: int) -> int:
    """The end of the last box of media data or its index (ISO/IEC 14496-12, 4.2), 0 where it runs on."""
    position = end = 0
    while position + 8 <= size:
        file.seek(position)
        header = file.read(16)
        length, kind = int.from_bytes(header[:4], "big"), header[4:8]
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        # 0 means to the end of the file; anything else below a header's length is padding after the last box.
        if length < 8:
            break
        position += length
        if kind in (b"mdat", b"moov", b"moof"):
            end = position
    return end


def _ebml_end(file: BinaryIO) -> int:
    """The end of the segment (RFC 8794, 4 and 6; RFC 9559, 5.1), 0 where a live recorder left it open."""
    head = file.read(4096)
    if head[:4] != b"\x1a\x45\xdf\xa3":
        return 0
    length, position = _vint(head, 4)
    position += length
    if head[position : position + 4] != b"\x18\x53\x80\x67":
        return 0
    first = position + 4
    length, position = _vint(head, first)
    open_ended = length == 2 ** (7 * (position - first)) - 1
    return 0 if open_ended else position + length


def _vint(data: bytes, position: int) -> tuple[int, int]:
    """An EBML number of variable length and where it ends."""
    width = 9 - data[position].bit_length()
    value = int.from_bytes(data[position : position + width], "big")
    return value & (2 ** (7 * width) - 1), position + width
