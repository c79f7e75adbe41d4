"""Write frames to a video, a folder of pictures or one picture; nothing half-written keeps the final name.

Sound is carried over packet by packet, cut to the frames written (to a packet's length, about 20 ms).
Subtitles, chapters and title texts are not carried over.
"""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import torch
from av.codec.codec import Codec as AvCodec
from av.codec.codec import UnknownCodecError
from av.error import FFmpegError
from torch import Tensor

from ..errors import VideoError
from ..system.outputs import claimed, give_name, new_part, refuse_inputs, refuse_taken, remove_part
from . import container, pictures
from .reader import Frame, VideoInfo
from .sinks import CODECS, FORMATS, OutputFormat, PictureSink, VideoSink, picture_name

_FOREIGN_SUFFIXES = (".webm", ".avi", ".gif", ".ts", ".mpg", ".wmv", ".flv")
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_output(
    path: str | Path,
    overwrite: bool = False,
    codec: str = "h264",
    info: VideoInfo | None = None,
    frames: int | None = None,
    inputs: Iterable[Path] = (),
) -> None:
    """Raise VideoError now for what would stop the writing later, and leave nothing behind.

    Looks at the codec's name and encoder, the path's ending, the folder (there, writable), what stands at the
    path already, whether another run writes there, and with `frames` whether a single picture is to hold several,
    or a folder pictures of another video. With `info`, refuses to write onto the input or into a folder that holds
    it, and warns of what the output cannot hold (some sound, alpha, pixels that are not square). `inputs` are other
    files that are read, such as weights.
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
    refuse_inputs(path, [*_sources(info), *inputs])
    if _is_single(path, way) and frames is not None and frames > 1:
        raise VideoError(f"'{path}' is one picture but {frames} frames are to be written; give a folder")
    _check_place(path, overwrite, way, frames)
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
    held: bool = False,
) -> Writer:
    """A context manager to write frames of `size` = (height, width) with `info`'s timing, colours and sound.

    `rate` sets the frame rate where `info` is of pictures or made; a video keeps its own. The `pts` of the
    frames say which of the source's frames they are, and so which sound goes with them. `held`: the caller holds
    the output (`outputs.claimed`) since before its own `check_output`, and nothing is looked at again before the
    end. Raises VideoError as `check_output` does.
    """
    if not held:
        check_output(path, overwrite, codec, info)
    if min(size) < 1:
        raise VideoError(f"cannot write frames of {size[1]}x{size[0]} pixels; expected at least 1x1")
    if rate is not None and info.kind == "video":
        raise VideoError(f"rate {rate} given for the video '{info.path}', which keeps its own: leave it out")
    if rate is not None and rate <= 0:
        raise VideoError(f"rate {rate} is not above 0; expected frames per second such as 24")
    return Writer(Path(path), info, size, codec, overwrite, info.rate if rate is None else Fraction(rate), held)


class Writer:
    """Writes under a hidden name that is new (".name.part-1a2b3c4d.mp4") and renames when whole; see `open_writer`.

    Leaving the `with` block normally finishes the file. Leaving it by any exception removes what was written. From
    the start of the block to its end no other run can write the same output.
    """

    def __init__(
        self,
        path: Path,
        info: VideoInfo,
        size: tuple[int, int],
        codec: str,
        overwrite: bool,
        rate: Fraction,
        held: bool = False,
    ) -> None:
        self._path, self._info, self._size, self._overwrite = path, info, size, overwrite
        self._codec, self._rate, self._held = codec, rate, held
        self._part = path
        self._claim = ExitStack()
        self._sink: VideoSink | PictureSink | None = None
        self._written = 0
        self._last = -1

    def __enter__(self) -> Writer:
        with ExitStack() as claim:
            if not self._held:
                claim.enter_context(claimed(self._path))
            try:
                self._open()
            except (OSError, FFmpegError, ValueError) as error:
                raise self._failure(error) from error
            self._claim = claim.pop_all()
        return self

    def _open(self) -> None:
        way = CODECS[self._codec]
        single = _is_single(self._path, way)
        self._part = new_part(self._path, folder=not (way.encoder or single))
        try:
            if way.encoder:
                self._sink = VideoSink(self._part, self._info, self._size, way, self._rate)
            else:
                self._sink = PictureSink(self._part, self._codec, way.suffixes[0], single, self._path)
        except BaseException:
            remove_part(self._part)
            raise

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
        with self._claim:
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
        # Infinity and NaN reach the sum, which takes a tenth of the time; a sum alone may overflow.
        if not bool(channels.sum().isfinite()) and not bool(torch.isfinite(channels).all()):
            raise VideoError(f"frame {self._written} has {name} that is not finite; expected [0, 1]")

    def _abandon(self, sink: VideoSink | PictureSink) -> None:
        try:
            sink.drop()
        finally:
            remove_part(self._part)

    def _keep(self) -> None:
        """Give the finished work its name. It is whole, so nothing that goes wrong here deletes it."""
        try:
            refuse_taken(self._path, self._overwrite)
            if self._part.is_dir() and self._path.is_dir():
                _merge(self._part, self._path, self._overwrite)
            else:
                give_name(self._part, self._path, self._overwrite)
        except (OSError, VideoError) as error:
            raise VideoError(f"the finished result stays in '{self._part}': {error}") from error

    def _failure(self, error: Exception) -> VideoError:
        if isinstance(error, OSError) and error.errno in _FULL_DISK:
            return VideoError(f"'{self._path}' cannot be written: the disk is full ({error.strerror}); free some space")
        reason = getattr(error, "strerror", None) or error
        return VideoError(f"'{self._path}' cannot be written ({reason}); expected a path that takes a file")


def _way(codec: str) -> OutputFormat:
    if codec not in CODECS:
        raise VideoError(f"unknown codec '{codec}'; expected one of {', '.join(CODECS)}")
    return CODECS[codec]


def _is_single(path: Path, way: OutputFormat) -> bool:
    return not way.encoder and path.suffix.lower() in way.suffixes


def _check_name(path: Path, codec: str, way: OutputFormat) -> None:
    suffix = path.suffix.lower()
    known = {s for each in CODECS.values() for s in each.suffixes} | set(_FOREIGN_SUFFIXES)
    endings = ", ".join(way.suffixes)
    if way.encoder and suffix not in way.suffixes:
        fitting = [name for name, each in CODECS.items() if suffix in each.suffixes]
        advice = f", or codec {' or '.join(fitting)}" if fitting else ""
        raise VideoError(f"'{path}' ends in '{suffix}' but codec {codec} needs {endings}: use that{advice}")
    if not way.encoder and suffix in known and suffix not in way.suffixes:
        raise VideoError(f"'{path}' ends in '{suffix}' but codec {codec} needs {endings} or a folder")


def _check_place(path: Path, overwrite: bool, way: OutputFormat, frames: int | None) -> None:
    folder = path.parent
    if not folder.is_dir():
        raise VideoError(f"folder '{folder}' does not exist; make it first, or choose another output")
    as_folder = not way.encoder and not _is_single(path, way)
    if os.path.lexists(path) and path.is_dir() != as_folder:
        there, wanted = ("folder", "file") if path.is_dir() else ("file", "folder")
        raise VideoError(f"'{path}' is a {there} but the output is a {wanted}; choose another name")
    refuse_taken(path, overwrite)
    if path.is_dir() and frames is not None:
        _refuse_mixing(path, [picture_name(index, way.suffixes[0]) for index in range(frames)])
    with claimed(path):
        try:
            # Asked of the disk itself: rights on paper miss read-only disks and odd file systems.
            remove_part(new_part(path))
        except OSError as error:
            place = path if path.is_dir() else folder
            raise VideoError(
                f"folder '{place}' cannot be written to ({error.strerror}); choose another output"
            ) from error


def _sources(info: VideoInfo | None) -> Iterator[Path]:
    """The files that the frames come from."""
    if info is not None and info.kind != "made":
        yield info.path
        if info.kind == "folder":
            yield from pictures.list_pictures(info.path)


def _warn_of_losses(path: Path, codec: str, way: OutputFormat, info: VideoInfo) -> None:
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


def _refuse_mixing(folder: Path, names: Iterable[str]) -> None:
    """Raises VideoError for a folder with pictures that would stand among those to come and not be replaced."""
    ours = set(names)
    others = sorted(
        entry.name
        for entry in folder.iterdir()
        if pictures.is_picture(entry)
        and not entry.name.startswith(".")
        and (entry.name not in ours or (entry.is_dir() and not entry.is_symlink()))
    )
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise VideoError(
            f"'{folder}' holds '{others[0]}'{more} beside the {len(ours)} pictures to be written, and none but those is"
            " ever replaced: two videos would mix; empty the folder or choose another"
        )


def _merge(part: Path, folder: Path, overwrite: bool) -> None:
    """Move the new pictures into a folder that exists; with `overwrite` in place of those of their names."""
    names = sorted(entry.name for entry in part.iterdir() if pictures.is_picture(entry))
    _refuse_mixing(folder, names)
    for name in names:
        try:
            give_name(part / name, folder / name, overwrite)
        except OSError as error:
            raise VideoError(f"{error}; the pictures before '{name}' are in '{folder}' already") from error
    with suppress(OSError):
        part.rmdir()
