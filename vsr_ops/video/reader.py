"""Read videos, folders of pictures and single pictures, one frame at a time, as often as needed.

Frames come upright (rotation and mirroring are baked into the pixels, so that every output shows them alike,
whatever it can say about rotation), RGB in [0, 1] by the file's own YUV matrix and range, with their own
timestamps. High dynamic range stays in its transfer curve. Interlaced frames are taken as they are.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from torch import Tensor

from ..errors import VideoError
from . import container, pictures, yuv

FULL_RANGE = 2
"""H.273 codes as FFmpeg numbers them: 1 is limited (16..235), 2 is full (0..255)."""

_TURNS = {
    (1, 0, 0, 1): (False, 0),
    (0, 1, -1, 0): (False, 90),
    (-1, 0, 0, -1): (False, 180),
    (0, -1, 1, 0): (False, 270),
    (-1, 0, 0, 1): (True, 0),
    (0, -1, -1, 0): (True, 90),
    (1, 0, 0, -1): (True, 180),
    (0, 1, 1, 0): (True, 270),
}
"""(a, b, c, d) of a display matrix (ISO/IEC 14496-12, 6.2.2): (mirror left to right, then turn clockwise)."""


@dataclass(frozen=True)
class VideoInfo:
    """What `probe` found.

    `kind` is "video", "folder" or "picture" ("made": no file, see `made_info`). `width` and `height` are
    pixels as shown. `frames` counts the frames that decode, `times` holds their timestamps and `end` the end
    of the last, all in `time_base`. `steady`: `times` are `rate` apart (to a tick); where not, `rate` is the
    mean. `rotation` (degrees clockwise, after mirroring left to right if `mirrored`) is what `read_frames`
    does to stored pictures. `color_range`, `colorspace`, `primaries`, `transfer` are H.273 codes, the first
    two with the usual guess in place of "unspecified" (`yuv.guess_matrix`; full range for RGB and grey).
    `aspect` is the width of a pixel over its height. `audio` names the codec of each sound stream.
    """

    path: Path
    kind: str
    width: int
    height: int
    frames: int
    rate: Fraction
    time_base: Fraction
    times: tuple[int, ...] = field(repr=False)
    end: int
    steady: bool = True
    rotation: int = 0
    mirrored: bool = False
    color_range: int = FULL_RANGE
    colorspace: int = yuv.RGB_MATRIX
    primaries: int = yuv.UNSPECIFIED
    transfer: int = yuv.UNSPECIFIED
    aspect: Fraction = Fraction(1)
    alpha: bool = False
    grey: bool = False
    bits: int = 8
    codec: str = ""
    audio: tuple[str, ...] = ()


@dataclass(frozen=True)
class Frame:
    """One picture: RGB (3, h, w) and alpha (1, h, w) or None, float32 in [0, 1]; `pts` in time base units."""

    image: Tensor
    alpha: Tensor | None
    pts: int


def probe(path: str | Path) -> VideoInfo:
    """Look at a video, a folder of PNG/JPEG pictures (in counting order), or one picture.

    A video is decoded once from end to end (faster by far than anything done to it later): headers do not
    know the number of frames in every container, and damage shows before any work is spent. Pictures run at
    24 frames per second. Raises VideoError.
    """
    return _looked_at(Path(path), _probe_video)


def glance(path: str | Path) -> VideoInfo:
    """As `probe`, in an instant: of a video the first frame alone is decoded, its length is what the header says and
    its frames are evenly spaced. For estimates. Raises VideoError."""
    return _looked_at(Path(path), _glance_at_video)


def _looked_at(path: Path, video: Callable[[Path], VideoInfo]) -> VideoInfo:
    try:
        if not path.exists():
            raise VideoError(f"'{path}' does not exist; give a video, a picture or a folder of pictures")
        if path.is_dir():
            return _probe_pictures(path, pictures.list_pictures(path))
        return _probe_pictures(path, [path]) if pictures.is_picture(path) else video(path)
    except OSError as error:
        raise VideoError(f"'{path}' cannot be read ({error.strerror}); check its permissions") from error


def made_info(width: int, height: int, frames: int, rate: Fraction | int = 24, *, alpha: bool = False) -> VideoInfo:
    """The info of frames that come from no file, for `open_writer`; frame i has pts i."""
    rate = Fraction(rate)
    times = tuple(range(frames))
    return VideoInfo(Path(), "made", width, height, frames, rate, 1 / rate, times, frames, alpha=alpha)


def read_frames(info: VideoInfo, start: int = 0, stop: int | None = None) -> Iterator[Frame]:
    """Frames start..stop-1 (None: to the last) of what was probed, one at a time; may be called again.

    A range is reached by decoding up to it, which unlike seeking is exact in every container. Raises
    VideoError for an empty range or one outside the video, and when the input has changed since.
    """
    stop = info.frames if stop is None else stop
    if not 0 <= start < stop <= info.frames:
        raise VideoError(
            f"frames {start}:{stop} are not in '{info.path}', which has {info.frames}; expected"
            f" 0 <= first < last <= {info.frames}"
        )
    return (_video_frames if info.kind == "video" else _picture_frames)(info, start, stop)


def _video_frames(info: VideoInfo, start: int, stop: int) -> Iterator[Frame]:
    index = 0
    for index, (frame, _) in enumerate(container.decode(info.path), start=1):
        if index > start:
            full, centred = info.color_range == FULL_RANGE, info.codec == "mjpeg"
            image, alpha = yuv.to_rgb(frame, info.colorspace, full, centred)
            image = pictures.upright(image, info.mirrored, info.rotation)
            alpha = None if alpha is None else pictures.upright(alpha, info.mirrored, info.rotation)
            yield Frame(image, alpha, info.times[index - 1])
        if index == stop:
            return
    raise VideoError(f"'{info.path}' had {info.frames} frames and now has {index}; leave the input alone")


def _picture_frames(info: VideoInfo, start: int, stop: int) -> Iterator[Frame]:
    paths = pictures.list_pictures(info.path) if info.kind == "folder" else [info.path]
    if len(paths) != info.frames:
        raise VideoError(f"'{info.path}' had {info.frames} pictures and now has {len(paths)}; leave it alone")
    for index in range(start, stop):
        picture = pictures.read_header(paths[index])
        _require_size(picture, info.width, info.height, paths[0])
        image, alpha = pictures.load_picture(picture)
        yield Frame(image, alpha, info.times[index])


def _require_size(picture: pictures.Picture, width: int, height: int, first: Path) -> None:
    if (picture.width, picture.height) != (width, height):
        raise VideoError(
            f"'{picture.path}' is {picture.width}x{picture.height} but '{first.name}' is {width}x{height};"
            " expected pictures of one size in a folder: put them in separate folders"
        )


def _probe_pictures(path: Path, paths: list[Path]) -> VideoInfo:
    found = [pictures.check_picture(each) for each in paths]
    for picture in found:
        _require_size(picture, found[0].width, found[0].height, paths[0])
    rate, count = Fraction(24), len(found)
    return VideoInfo(
        path,
        "folder" if path.is_dir() else "picture",
        found[0].width,
        found[0].height,
        count,
        rate,
        1 / rate,
        tuple(range(count)),
        count,
        rotation=found[0].rotation,
        mirrored=found[0].mirrored,
        alpha=any(picture.alpha for picture in found),
        grey=all(picture.grey for picture in found),
        bits=max(picture.bits for picture in found),
        codec=paths[0].suffix.lower().lstrip("."),
    )


def _probe_video(path: Path) -> VideoInfo:
    times: list[int | None] = []
    first: VideoFrame | None = None
    length = 0
    for frame, duration in container.decode(path):
        first = first or frame
        length = duration
        times.append(frame.pts)
    return _video_info(path, first, times, length)


def _glance_at_video(path: Path) -> VideoInfo:
    source = container.open_input(path)
    with source:
        frames = container.promised_frames(source, container.picture_stream(source, path))
    if frames == 0:
        return _probe_video(path)
    first, length = next(container.decode(path), (None, 0))
    return _video_info(path, first, [None] * frames, length)


def _video_info(path: Path, first: VideoFrame | None, times: list[int | None], length: int) -> VideoInfo:
    if first is None:
        raise VideoError(f"'{path}' has no frames that can be decoded; expected one or more: export it again")
    if first.interlaced_frame:
        warnings.warn(
            f"'{path}' is interlaced; its combed frames are taken as they are: deinterlace it first",
            stacklevel=3,
        )
    source = container.open_input(path)
    with source:
        stream = container.picture_stream(source, path)
        timing = _timing(stream, times, length)
        audio = tuple(each.codec_context.name for each in container.audio_streams(source))
        if stream.metadata.get("alpha_mode") == "1" and not yuv.has_alpha(first.format):
            warnings.warn(
                f"'{path}' has alpha that FFmpeg's {stream.codec_context.name} decoder leaves out",
                stacklevel=3,
            )
        codec, aspect = stream.codec_context, stream.sample_aspect_ratio or Fraction(1)
    mirrored, rotation = _turn(path, first)
    upright = rotation % 180 == 0
    return VideoInfo(
        path,
        "video",
        *((first.width, first.height) if upright else (first.height, first.width)),
        len(times),
        *timing,
        rotation=rotation,
        mirrored=mirrored,
        color_range=_color_range(first),
        colorspace=_colorspace(path, first),
        # Frames know better, but older PyAV does not show these two on them.
        primaries=int(getattr(first, "color_primaries", codec.color_primaries)),
        transfer=int(getattr(first, "color_trc", codec.color_trc)),
        aspect=aspect if upright else 1 / aspect,
        alpha=yuv.has_alpha(first.format),
        grey=yuv.is_grey(first.format),
        bits=yuv.bit_depth(first.format),
        codec=codec.name,
        audio=audio,
    )


def _timing(
    stream: VideoStream, times: list[int | None], length: int
) -> tuple[Fraction, Fraction, tuple[int, ...], int, bool]:
    """(rate, time base, times, end, steady) from the timestamps as decoded and the last frame's duration.

    Files without usable timestamps (raw streams) run at the rate that the header guesses.
    """
    declared = [r for r in (stream.average_rate, stream.base_rate, stream.guessed_rate) if r]
    base = stream.time_base
    known = [t for t in times if t is not None]
    if base is None or len(known) < len(times) or any(b <= a for a, b in pairwise(known)):
        rate = declared[0] if declared else Fraction(25)
        return rate, 1 / rate, tuple(range(len(times))), len(times), True
    for rate in declared:
        # Containers round times to ticks (a millisecond in Matroska), the first and each other one.
        if all(abs(t - known[0] - i / (rate * base)) <= 1 for i, t in enumerate(known)):
            return rate, base, tuple(known), known[0] + max(1, round(len(known) / (rate * base))), True
    if not length:
        length = max(1, round((known[-1] - known[0]) / max(1, len(known) - 1)))
    end = known[-1] + length
    mean = len(known) / ((end - known[0]) * base)
    return mean.limit_denominator(100_000), base, tuple(known), end, False


def _turn(path: Path, frame: VideoFrame) -> tuple[bool, int]:
    """(mirrored, degrees clockwise) from the frame's display matrix."""
    side_data = cast(Any, frame.side_data).get("DISPLAYMATRIX")
    if side_data is None:
        return False, 0
    # Nine numbers of 32 bits, three rows; a, b, c and d have 16 bits after the point.
    a, b, _, c, d = (value / 65536 for value in struct.unpack("=9i", bytes(side_data))[:5])
    key = (round(a), round(b), round(c), round(d))
    if key not in _TURNS or max(abs(x - y) for x, y in zip((a, b, c, d), key, strict=True)) > 0.01:
        raise VideoError(
            f"'{path}' is shown turned by {frame.rotation} degrees; expected a multiple of 90: turn it first"
        )
    return _TURNS[key]


def _color_range(frame: VideoFrame) -> int:
    if yuv.is_rgb(frame.format) or frame.format.name.startswith("yuvj"):
        return FULL_RANGE
    return int(frame.color_range) or (FULL_RANGE if yuv.is_grey(frame.format) else 1)


def _colorspace(path: Path, frame: VideoFrame) -> int:
    if yuv.is_rgb(frame.format):
        return yuv.RGB_MATRIX
    code = int(frame.colorspace)
    # 3 is reserved: no matrix either.
    if code in (yuv.UNSPECIFIED, 3):
        return yuv.guess_matrix(frame.width, frame.height)
    if yuv.is_grey(frame.format) or code in yuv.MATRICES:
        return code if code in yuv.MATRICES else yuv.guess_matrix(frame.width, frame.height)
    raise VideoError(f"'{path}' uses YUV matrix {code} (H.273); expected one of {sorted(yuv.MATRICES)}: make it BT.709")
