"""The photographs and videos of a run: read once, on first use, and told apart from another folder's."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from training.data.data import Source, load_sources, random_clip, uniform
from training.data.degradation import DEGRADATIONS, degrade, degrade_by
from vsr_ops.errors import SettingError


class Folder:
    """What `load_sources` finds below `path`. Raises SettingError where there is no such folder, VideoError where there
    is nothing to train on, or too much that cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._loaded: tuple[Sequence[Source], Sequence[Source]] | None = None

    def load(self) -> tuple[Sequence[Source], Sequence[Source]]:
        """(photographs, videos)."""
        if self._loaded is None and self.path.suffix == ".safetensors":
            self._loaded = [], []  # a shard of samples, which stands in a folder's place
        if self._loaded is None:
            if not self.path.is_dir():
                raise SettingError(f"--data {self.path}: no such folder; expected one of photographs and videos")
            self._loaded = load_sources(self.path)
        return self._loaded

    @property
    def summary(self) -> str:
        """How many there are, and a digest of their names and shapes."""
        photos, videos = self.load()
        listed = sorted(f"{source.name} {tuple(source.pixels.shape)}" for source in [*photos, *videos])
        digest = hashlib.sha256("\n".join(listed).encode()).hexdigest()[:8]
        return f"{len(photos)} photographs and {len(videos)} videos ({digest})"

    def clip(self, frames: int, size: int, rng: torch.Generator, video_share: float) -> Tensor:
        """One clean clip `(frames, 3, size, size)` in [0, 1]. Raises SettingError when nothing is large enough."""
        return random_clip(*self.load(), frames, size, rng, video_share)


def degraded(name: str, clip: Tensor, rng: torch.Generator, scale: int, clean_share: float) -> Tensor:
    """The low-resolution input of a clean clip; a `clean_share` of clips is only made smaller."""
    if name == "lite":
        return degrade(clip, rng, scale, clean_share)
    return degrade_by("clean" if uniform(rng, 0, 1) < clean_share else name, clip, rng, scale)


def check_degradation(name: str) -> None:
    """Raises SettingError for a name that is not in DEGRADATIONS."""
    if name not in DEGRADATIONS:
        raise SettingError(f"data.degradation is '{name}': expected one of {', '.join(DEGRADATIONS)}")
