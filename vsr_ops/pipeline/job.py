"""What is upscaled: an input, the frames of it, the sizes that follow, and its frames at the result's size."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import SettingError
from ..image.resize import resize_bicubic
from ..modules.enlarging import Enlarging
from ..units import readable
from ..vae.latents import CELL
from ..video import Frame, VideoInfo, read_frames
from ..video.scenes import find_cuts

#: Steps of an enlarged picture's values between 0 and 1.
LEVELS = 65535


@dataclass(frozen=True)
class Job:
    """An input, the frames [start, stop) of it, and the sizes that follow."""

    info: VideoInfo
    start: int
    stop: int
    scale: float

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 16:
            raise SettingError(f"scale is {self.scale}: expected a number above 0, at most 16")
        if not 0 <= self.start < self.stop <= self.info.frames:
            raise SettingError(
                f"frames {self.start}:{self.stop} of '{self.info.path}': it has {self.info.frames} frames;"
                " expected A < B within them"
            )

    @property
    def frames(self) -> int:
        """How many frames are upscaled."""
        return self.stop - self.start

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the result, in pixels."""
        return max(1, round(self.info.height * self.scale)), max(1, round(self.info.width * self.scale))

    def latent_size(self, factor: int) -> tuple[int, int]:
        """Height and width of the padded latent, multiples of the UNet's factor."""
        cell = CELL * factor
        return (-(-self.size[0] // cell) * factor, -(-self.size[1] // cell) * factor)

    def read(self) -> Iterator[Frame]:
        """The frames of the job as they are."""
        return read_frames(self.info, self.start, self.stop)

    def frame(self, source: Frame, image: Tensor) -> Frame:
        """A frame of the job with an `image` of the result's size; its alpha follows."""
        alpha = source.alpha
        if alpha is not None:
            alpha = resize_bicubic(alpha[None], self.size)[0].clamp(0, 1)
        return Frame(image, alpha, source.pts)


def scene_cuts(job: Job) -> tuple[int, ...]:
    """First frames of new scenes, counted from the job's first frame."""
    return find_cuts(frame.image for frame in job.read())


def to_levels(image: Tensor) -> Tensor:
    """A picture in [0, 1] in 16-bit levels."""
    return (image.float() * LEVELS).round_().to(torch.int32).to(torch.uint16)


def from_levels(levels: Tensor) -> Tensor:
    """What `to_levels` made, float32 in [0, 1]."""
    return levels.float().div_(LEVELS)


class UpscaledFrames:
    """The frames of a job at the result's size, as `enlarging` makes them; clamped, unpadded. No frame sees past a cut.

    Call it for an iterator from the first frame on, as often as needed: each frame is enlarged once. It is kept in
    16-bit levels in a nameless temporary file in `folder` (6 bytes a pixel), not in memory. Where a resize alone
    enlarges, which costs less than reading, or the disk has less than twice the space, nothing is kept.
    """

    def __init__(self, job: Job, enlarging: Enlarging, folder: Path, cuts: Sequence[int] = ()) -> None:
        self._job, self._enlarging, self._cuts, self._kept = job, enlarging, cuts, 0
        self._bytes = 6 * job.size[0] * job.size[1]
        needed = 2 * job.frames * self._bytes
        keeps = enlarging.is_learnt
        if keeps and shutil.disk_usage(folder).free < needed:
            warnings.warn(
                f"{folder}: under {readable(needed)} free to keep enlarged frames, so each is enlarged anew whenever it"
                " is needed",
                stacklevel=2,
            )
            keeps = False
        self._file = tempfile.TemporaryFile(dir=folder) if keeps else None  # noqa: SIM115  (`close` closes it)
        # What fills the file goes on where the last reader stopped, with the neighbours that it has seen.
        self._filling = map(to_levels, self._enlarged())

    def __call__(self) -> Iterator[Frame]:
        images = self._anew() if self._file is None else self._stored(self._file)
        for source, image in zip(self._job.read(), images, strict=True):
            yield self._job.frame(source, image)

    def close(self) -> None:
        """Gives the disk back."""
        if self._file is not None:
            self._file.close()

    def _enlarged(self) -> Iterator[Tensor]:
        return self._enlarging((frame.image for frame in self._job.read()), self._job.size, self._cuts)

    def _anew(self) -> Iterator[Tensor]:
        """All frames, enlarged for one reader."""
        if not self._enlarging.is_learnt:
            return self._enlarged()
        # Rounded where nothing is kept, too: disk space must not change the result.
        return map(from_levels, map(to_levels, self._enlarged()))

    def _stored(self, file: Any) -> Iterator[Tensor]:
        """All frames: those that are kept, then those that are not yet, which are kept now."""
        for number in range(self._job.frames):
            if number == self._kept:
                levels = next(self._filling).contiguous()
                file.seek(number * self._bytes)
                file.write(levels.numpy().data)
                self._kept += 1
            else:
                levels = torch.empty(3, *self._job.size, dtype=torch.uint16)
                file.seek(number * self._bytes)
                file.readinto(levels.numpy().data)
            yield from_levels(levels)
