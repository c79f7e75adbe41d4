"""What tasks share whose clips a DCM enlarges that does not learn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from training.data.folder import Folder
from training.loop.state import weights_of
from vsr_ops.modules.dcm import UpscaleFn, load_dcm


class Enlarging:
    """Clips of a folder, and the DCM, a file or a run, that enlarges them once they are degraded."""

    def __init__(self, folder: Folder, dcm: str) -> None:
        self._folder, self._dcm = folder, dcm
        self._upscale_fn: UpscaleFn | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the DCM: processes that draw samples need none."""
        return {**self.__dict__, "_upscale_fn": None}

    @property
    def data_summary(self) -> str:
        return self._folder.summary

    def prepare(self, device: torch.device) -> None:
        self._folder.load()
        self._upscale_fn = load_dcm(weights_of(self._dcm), device)

    def enlarged(self, lr: Tensor) -> Tensor:
        """Frames `(n, 3, h, w)` four times larger, in [0, 1]."""
        assert self._upscale_fn is not None, "prepare comes first"
        return self._upscale_fn(lr).clamp(0, 1)
