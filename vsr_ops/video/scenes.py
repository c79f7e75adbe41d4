"""Scene cuts, found while the frames stream past. No window, bank or flow may cross one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import SettingError

DEFAULT_THRESHOLD = 27.0
"""PySceneDetect's own default: mean change of hue, saturation and value between two frames, out of 255."""

_LONGEST_SIDE = 256
"""Cuts show at this size; averaging down to it also hides noise and makes the test cheap at 4K."""

_REACH = 2
_STANDS_OUT = 1.5
"""A cut's change is so many times the mean change of the `_REACH` frames on either side. Fast motion, smoke
and gunfire pass the threshold for many frames in a row: cut there, windows would lose all coherence."""


def find_cuts(frames: Iterable[Tensor], threshold: float = DEFAULT_THRESHOLD) -> tuple[int, ...]:
    """Indices of the first frame of each new scene, ascending; never 0, empty when there is one scene.

    `frames` are (3, h, w) RGB in [0, 1], taken one at a time and not kept. The measure is the score of
    PySceneDetect's ContentDetector; a cut reaches `threshold` and stands out from its neighbours, as in that
    package's AdaptiveDetector but up to both ends of the clip. Fades are no cuts; a flash of one frame may be
    two. Raises SettingError for a threshold outside (0, 255] or a frame of another shape.
    """
    if not 0 < threshold <= 255:
        raise SettingError(f"scene threshold {threshold} is outside (0, 255]; use a value such as 27")
    scores = _scores(frames)
    return tuple(i for i in range(1, len(scores)) if _is_cut(scores, i, threshold))


def _scores(frames: Iterable[Tensor]) -> list[float]:
    """How much each frame differs from the one before, 0 to 255; 0 for the first."""
    # A third of a second to import, and only needed here.
    from scenedetect.common import FrameTimecode  # pyright: ignore[reportMissingTypeStubs]
    from scenedetect.detectors import ContentDetector  # pyright: ignore[reportMissingTypeStubs]
    from scenedetect.stats_manager import StatsManager  # pyright: ignore[reportMissingTypeStubs]

    detector = ContentDetector()
    detector.stats_manager = StatsManager()
    scores: list[float] = []
    for index, frame in enumerate(frames):
        if frame.ndim != 3 or frame.shape[0] != 3:
            raise SettingError(f"frame {index} has shape {tuple(frame.shape)}; expected (3, height, width)")
        # The rate only turns indices into times, which are not read.
        moment = FrameTimecode(index, fps=25.0)
        detector.process_frame(moment, _bgr8(frame).numpy())
        (score,) = detector.stats_manager.get_metrics(moment, [ContentDetector.FRAME_SCORE_KEY])
        # The first frame has nothing to be compared with, and no score.
        scores.append(float(score or 0.0))
    return scores


def _is_cut(scores: list[float], index: int, threshold: float) -> bool:
    first, last = max(1, index - _REACH), min(len(scores), index + _REACH + 1)
    around = scores[first:index] + scores[index + 1 : last]
    usual = sum(around) / max(1, len(around))
    return scores[index] >= max(threshold, _STANDS_OUT * usual)


def _bgr8(frame: Tensor) -> Tensor:
    """A small (h, w, 3) BGR picture in 8 bits, as OpenCV wants it."""
    height, width = frame.shape[-2:]
    scale = min(1.0, _LONGEST_SIDE / max(height, width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    small = F.interpolate(frame.detach().float().unsqueeze(0), size=size, mode="area")[0]
    return (small.flip(0).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu()
