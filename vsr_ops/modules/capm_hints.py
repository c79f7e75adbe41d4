"""What CAPM is told: a compression level a frame, and how strongly it acts."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import SettingError
from .compression import level_of

STRONGEST = 2.0


def check_strength(strength: float) -> None:
    """Raises SettingError for a `strength` outside [0, 2]."""
    if not 0 <= strength <= STRONGEST:
        raise SettingError(f"strength is {strength}: expected 0 (off) to {STRONGEST:g}; 1 is what was trained")


def check_hint(hint: Tensor) -> None:
    """Raises SettingError for compression levels outside [0, 1]; NaN stands for one that is not known."""
    if not hint.numel():
        raise SettingError("hint is empty: expected a compression level a frame; estimate it on the video")
    known = hint[~hint.isnan()]
    if hint.ndim != 1 or bool(((known < 0) | (known > 1)).any()):
        raise SettingError(
            f"hint has the shape {tuple(hint.shape)} and values to {float(hint.nan_to_num().abs().amax()):g}:"
            " expected one compression level from 0 (clean) to 1 (CRF 51) a frame; divide a CRF by 51"
        )


def spread(hint: Tensor, count: int) -> Tensor:
    """A hint for `count` features, of as many frames or of several videos with the same frames. Raises SettingError."""
    if count % hint.shape[0]:
        raise SettingError(
            f"hint has {hint.shape[0]} compression levels for {count} frames: expected one a frame; estimate them on"
            " the video that is upscaled"
        )
    return hint.repeat(count // hint.shape[0])


def levels_or_crf(levels: Tensor | None, crf: float) -> Tensor | None:
    """Levels as they are; for a `crf` from 0 on its level, one for every frame `()`. Raises SettingError."""
    if crf >= 0:
        return torch.tensor(level_of(crf))
    if levels is not None:
        check_hint(levels)
    return levels
