"""A low-resolution video at the result's size, frame by frame: by a resize alone, by a model that sees one picture, or
by one on top of it that sees time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..image.resize import resize
from ..image.upscale import upscale_frames
from .dcm import UpscaleFn
from .video_upscaler import SCALE, VideoUpscaler, check_strength, sharpened


@dataclass(frozen=True)
class Enlarging:
    """What enlarges a video: `upscale_fn`, a model that sees one picture (None: a resize alone); on top of it `video`
    with its `strength`, 0 to 2; `method`, a name in RESIZE, does the rest. Raises SettingError."""

    upscale_fn: UpscaleFn | None = None
    video: VideoUpscaler | None = None
    strength: float = 1.0
    method: str = "bicubic"

    def __post_init__(self) -> None:
        check_strength(self.strength)

    @property
    def is_learnt(self) -> bool:
        """Whether a network does it: then a frame is worth keeping."""
        return self.upscale_fn is not None or self.sees_time

    @property
    def sees_time(self) -> bool:
        """Whether a frame's neighbours matter."""
        return self._acting is not None

    @property
    def _acting(self) -> VideoUpscaler | None:
        return self.video if self.strength else None

    def __call__(self, frames: Iterable[Tensor], size: tuple[int, int], cuts: Sequence[int] = ()) -> Iterator[Tensor]:
        """Frames `(3, h, w)` in [0, 1] at exactly `size` = (height, width), clamped, in their order and precision. No
        frame sees past a cut; one that sees time waits for a few that follow. Raises SettingError."""
        if self._acting is None:
            return (self._alone(frame, size) for frame in frames)
        pairs = ((frame, self._alone(frame, _times(frame))) for frame in frames)
        larger = sharpened(self._acting, pairs, cuts, self.strength)
        return (resize(self.method, frame[None], size)[0].clamp(0, 1) for frame in larger)

    def _alone(self, frame: Tensor, size: tuple[int, int]) -> Tensor:
        return upscale_frames(frame[None], size, self.method, self.upscale_fn)[0]


def _times(frame: Tensor) -> tuple[int, int]:
    """The size that a video upscaler takes a frame at."""
    height, width = frame.shape[-2:]
    return SCALE * height, SCALE * width
