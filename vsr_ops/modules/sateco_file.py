"""SATeCo on disk: the halves for a UNet's and for a VAE's decoder, in one file of the pack's own kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .halves import read_halves, write_halves
from .sateco import SATeCo, SATeCoShape

KIND = "sateco"


@dataclass(frozen=True)
class SATeCos:
    """The halves of a file: for the decoders of a UNet and of a VAE."""

    unet: SATeCo | None = None
    vae: SATeCo | None = None

    def halves(self) -> dict[str, SATeCo]:
        """Those that are there, by name."""
        return {name: half for name, half in (("unet", self.unet), ("vae", self.vae)) if half is not None}


def load_satecos(path: Path | str, device: torch.device | str = "cpu") -> SATeCos:
    """The halves at `path`, float32; what they fit says `check_fits`. Raises CheckpointError
    for a file that is missing, damaged or of another kind, or holds no half."""
    return SATeCos(**read_halves(Path(path), KIND, "SATeCo", _built, device))


def write_satecos(path: Path, satecos: SATeCos, trained_on: str) -> None:
    """Writes a file that `load_satecos` reads, float16. Raises CheckpointError."""
    write_halves(path, KIND, satecos.halves(), trained_on)


def _built(config: Mapping[str, Any]) -> SATeCo:
    return SATeCo(SATeCoShape(**config))
