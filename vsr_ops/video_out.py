"""Write frames to a video, a folder of pictures or one picture; nothing half-written keeps the final name.

Sound is carried over packet by packet, cut to the frames written (to a packet's length, about 20 ms).
Subtitles, chapters and title texts are not carried over.
"""

from __future__ import annotations

import errno
import shutil
import warnings
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import torch
from av.codec.codec import Codec as AvCodec
from av.codec.codec import UnknownCodecError
from av.error import FFmpegError
from torch import Tensor

from . import container, pictures
from .errors import VideoError
from .video_in import Frame, VideoInfo
from .video_sink import CODECS, FORMATS, Codec, PictureSink, VideoSink

_FOREIGN_SUFFIXES = (".webm", ".avi", ".gif", ".ts", ".mpg", ".wmv", ".flv")
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_output(
    path: str | Path,
    overwrite: bool = False,
    codec: str = "h264",
    info: VideoInfo | None = None,
    frames: int | None = None,
) -> None:
    """Raise VideoError now for what would stop the writing later, and leave nothing behind.

    Looks at the codec's name and encoder, the path's ending, the folder (there, writable), what stands at the
    path already, and with `frames` whether a single picture is to hold several. With `info`, refuses to write
    onto the input and warns of what the output cannot hold (some sound, alpha, pixels that are not square).
    """
    path = Path(path)
    way = _way(codec)
    _check_name(path, codec, way)
    if way.encoder:
        try:
            AvCodec(way.encoder, "w")
        except UnknownCodecError as error:
            raise VideoError(
                f"this FFmpeg has no encoder {way.encoder} for codec {codec}; install PyAV's own wheels"
            ) from error
    if info is not None and info.kind != "made" and _same_place(path, info.path):
        raise VideoError(f"'{path}' is the input itself; expected another name for the output")
    if _is_single(path, way) and frames is not None and frames > 1:
        raise VideoError(f"'{path}' is one picture but {frames} frames are to be written; give a folder")
    _check_place(path, overwrite, way)
    if info is not None:
        _warn_of_losses(path, codec, way, info)


def open_writer(
    path: str | Path,
    info: VideoInfo,
    *,
    size: tuple[int, int],
    codec: str = "h264",
    overwrite: bool = False,
    rate: Fraction | int | None = None,
) -> Writer:
    """A context manager to write frames of `size` = (height, width) with `info`'s timing, colours and sound.

    `rate` sets the frame rate where `info` is of pictures or made; a video keeps its own. The `pts` of the
    frames say which of the source's frames they are, and so which sound goes with them. Raises VideoError as
    `check_output` does.
    """
    check_output(path, overwrite, codec, info)
    if min(size) < 1:
        raise VideoError(f"cannot write frames of {size[1]}x{size[0]} pixels; expected at least 1x1")
    if rate is not None and info.kind == "video":
        raise VideoError(f"rate {rate} given for the video '{info.path}', which keeps its own: leave it out")
    if rate is not None and rate <= 0:
        raise VideoError(f"rate {rate} is not above 0; expected frames per second such as 24")
    return Writer(Path(path), info, size, codec, overwrite, info.rate if rate is None else Fraction(rate))


class Writer:
    """Writes beside the final name (".name.part.mp4") and renames when whole; see `open_writer`.

    Leaving the `with` block normally finishes the file. Leaving it by any exception removes what was written.
    """

    def __init__(
        self, path: Path, info: VideoInfo, size: tuple[int, int], codec: str, overwrite: bool, rate: Fraction
    ) -> None:
        self._path, self._info, self._size, self._overwrite = path, info, size, overwrite
        self._codec, self._rate = codec, rate
        self._part = _part_of(path)
        self._sink: VideoSink | PictureSink | None = None
        self._written = 0
        self._last = -1

    def __enter__(self) -> Writer:
        way = CODECS[self._codec]
        _remove(self._part)
        try:
            if way.encoder:
                self._sink = VideoSink(self._part, self._info, self._size, way, self._rate)
            else:
                single = _is_single(self._path, way)
                self._sink = PictureSink(self._part, self._codec, way.suffixes[0], single, self._path)
        except (OSError, FFmpegError, ValueError) as error:
            _remove(self._part)
            raise self._failure(error) from error
        return self

    def write(self, frame: Frame) -> None:
        """Add one frame. Raises VideoError for one that does not fit, and when the disk is full or fails."""
        if self._sink is None:
            raise VideoError(f"'{self._path}' is not open; write inside the with block")
        self._require_fit(frame.image, 3, "RGB")
        if frame.alpha is not None:
            self._require_fit(frame.alpha, 1, "alpha")
        if self._written and frame.pts <= self._last:
            raise VideoError(f"frame {self._written} has time {frame.pts} after {self._last}; write frames in order")
        # Encoding works on the CPU, in float32 whatever the sampler used.
        image = frame.image.detach().float().cpu()
        alpha = None if frame.alpha is None else frame.alpha.detach().float().cpu()
        try:
            self._sink.write(Frame(image, alpha, frame.pts))
        except (OSError, FFmpegError) as error:
            raise self._failure(error) from error
        self._written += 1
        self._last = frame.pts

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sink, self._sink = self._sink, None
        if sink is None:
            return
        if kind is not None:
            self._abandon(sink)
            return
        try:
            if not self._written:
                raise VideoError(f"no frame was written to '{self._path}'; expected at least one")
            sink.finish()
        except (OSError, FFmpegError) as failure:
            self._abandon(sink)
            raise self._failure(failure) from failure
        except BaseException:
            self._abandon(sink)
            raise
        self._keep()

    def _require_fit(self, channels: Tensor, count: int, name: str) -> None:
        wanted, found = (count, *self._size), tuple(channels.shape)
        if found != wanted:
            raise VideoError(f"frame {self._written} has {name} of shape {found}; expected {wanted}")
        if not bool(torch.isfinite(channels).all()):
            raise VideoError(f"frame {self._written} has {name} that is not finite; expected [0, 1]")

    def _abandon(self, sink: VideoSink | PictureSink) -> None:
        try:
            sink.drop()
        finally:
            _remove(self._part)

    def _keep(self) -> None:
        """Give the finished work its name. It is whole, so nothing that goes wrong here deletes it."""
        try:
            _check_free(self._path, self._overwrite)
            if self._part.is_dir() and self._path.is_dir():
                _merge(self._part, self._path)
            else:
                self._part.replace(self._path)
        except (OSError, VideoError) as error:
            raise VideoError(f"the finished result stays in '{self._part}': {error}") from error

    def _failure(self, error: Exception) -> VideoError:
        if isinstance(error, OSError) and error.errno in _FULL_DISK:
            return VideoError(f"'{self._path}' cannot be written: the disk is full ({error.strerror}); free some space")
        reason = getattr(error, "strerror", None) or error
        return VideoError(f"'{self._path}' cannot be written ({reason}); expected a path that takes a file")


def _way(codec: str) -> Codec:
    if codec not in CODECS:
        raise VideoError(f"unknown codec '{codec}'; expected one of {', '.join(CODECS)}")
    return CODECS[codec]


def _is_single(path: Path, way: Codec) -> bool:
    return not way.encoder and path.suffix.lower() in way.suffixes


def _check_name(path: Path, codec: str, way: Codec) -> None:
    suffix = path.suffix.lower()
    known = {s for each in CODECS.values() for s in each.suffixes} | set(_FOREIGN_SUFFIXES)
    endings = ", ".join(way.suffixes)
    if way.encoder and suffix not in way.suffixes:
        fitting = [name for name, each in CODECS.items() if suffix in each.suffixes]
        advice = f", or codec {' or '.join(fitting)}" if fitting else ""
        raise VideoError(f"'{path}' ends in '{suffix}' but codec {codec} needs {endings}: use that{advice}")
    if not way.encoder and suffix in known and suffix not in way.suffixes:
        raise VideoError(f"'{path}' ends in '{suffix}' but codec {codec} needs {endings} or a folder")


def _check_place(path: Path, overwrite: bool, way: Codec) -> None:
    folder = path.parent
    if not folder.is_dir():
        raise VideoError(f"folder '{folder}' does not exist; make it first, or choose another output")
    as_folder = not way.encoder and not _is_single(path, way)
    if path.exists() and path.is_dir() != as_folder:
        there, wanted = ("folder", "file") if path.is_dir() else ("file", "folder")
        raise VideoError(f"'{path}' is a {there} but the output is a {wanted}; choose another name")
    _check_free(path, overwrite)
    trial = folder / f"{_part_of(path).name}.try"
    try:
        # Asked of the disk itself: rights on paper miss read-only disks and odd file systems.
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise VideoError(f"folder '{folder}' cannot be written to ({error.strerror}); choose another output") from error


def _check_free(path: Path, overwrite: bool) -> None:
    if overwrite or not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    raise VideoError(f"'{path}' already exists; choose another name or allow overwriting (--overwrite)")


def _same_place(path: Path, source: Path) -> bool:
    return path.resolve() == source.resolve()


def _warn_of_losses(path: Path, codec: str, way: Codec, info: VideoInfo) -> None:
    losses: list[str] = []
    if info.alpha and not way.alpha:
        losses.append(f"codec {codec} holds no alpha: it is dropped (prores, ffv1 and png keep it)")
    if info.aspect != 1 and not way.aspect:
        losses.append(f"codec {codec} cannot say that pixels are {info.aspect} as wide as high")
    if info.audio and not way.encoder:
        losses.append("pictures hold no sound: it is dropped")
    if info.audio and way.encoder:
        suffix = path.suffix.lower()
        source = container.open_input(info.path)
        with source:
            for stream in container.audio_streams(source):
                if not container.fits(stream, FORMATS[suffix]):
                    name = stream.codec_context.name
                    losses.append(f"{suffix} cannot hold sound of codec {name}: it is dropped (.mkv may keep it)")
    for loss in losses:
        warnings.warn(f"'{path}': {loss}", stacklevel=3)


def _part_of(path: Path) -> Path:
    return path.with_name(f".{path.stem}.part{path.suffix}")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _merge(part: Path, folder: Path) -> None:
    """Move the new pictures into a folder that exists, in place of frames from before; other files stay."""
    for old in folder.glob("frame_[0-9][0-9][0-9][0-9][0-9][0-9].*"):
        if pictures.is_picture(old):
            old.unlink()
    for new in sorted(part.iterdir()):
        new.replace(folder / new.name)
    part.rmdir()
