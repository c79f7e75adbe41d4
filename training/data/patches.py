"""Pairs of patches, degraded and clean, for tasks that look at single frames."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from training.data.folder import Folder, check_degradation, degraded
from training.loop.draws import integer
from vsr_ops.errors import SettingError

SCALE = 4


@dataclass(frozen=True)
class PatchSettings:
    """Clips of `frames` frames of `size` x `size` pixels, degraded in a way of DEGRADATIONS but for a `clean_share`; of
    each, `crops` patches of `patch` x `patch` LR pixels."""

    size: int = 192
    frames: int = 4
    patch: int = 32
    crops: int = 4
    degradation: str = "lite"
    clean_share: float = 0.2
    video_share: float = 0.4


class Patches:
    """What `settings` draw from the folder `data`. Raises SettingError."""

    def __init__(self, data: Path, settings: PatchSettings) -> None:
        self.folder, self.settings = Folder(data), settings
        check_degradation(settings.degradation)
        size, patch = settings.size, settings.patch
        if size % 8 or not 1 <= patch <= size // SCALE or min(settings.frames, settings.crops) < 1:
            raise SettingError(
                f"data.size is {size}, data.patch {patch}, data.frames {settings.frames}, data.crops"
                f" {settings.crops}: expected a size in multiples of 8, a patch of at most a quarter of it, at"
                " least one of each"
            )

    def draw(self, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """(lr `(crops, 3, p, p)`, truth `(crops, 3, 4p, 4p)`) in [0, 1], out of one clip."""
        settings = self.settings
        truth = self.folder.clip(settings.frames, settings.size, rng, settings.video_share)
        low = degraded(settings.degradation, truth, rng, SCALE, settings.clean_share)
        pairs = [self._patch(low, truth, rng) for _ in range(settings.crops)]
        return torch.stack([lr for lr, _ in pairs]), torch.stack([hr for _, hr in pairs])

    def _patch(self, low: Tensor, truth: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """The same place of a random frame of both, in one of its eight orientations."""
        room = low.shape[-1] - self.settings.patch + 1
        frame, top, left = integer(rng, low.shape[0]), integer(rng, room), integer(rng, room)
        turns, mirrored = integer(rng, 4), integer(rng, 2)
        pair: list[Tensor] = []
        for clip, scale in ((low, 1), (truth, SCALE)):
            side = self.settings.patch * scale
            crop = clip[frame, :, top * scale : top * scale + side, left * scale : left * scale + side].rot90(
                turns, (1, 2)
            )
            pair.append(crop.flip(-1) if mirrored else crop)
        return pair[0].contiguous(), pair[1].contiguous()
