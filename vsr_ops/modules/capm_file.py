"""CAPM on disk: the halves for a UNet's and for a VAE's decoder, in one file of the pack's own kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..weights import bundled
from .capm import CAPM, CAPMShape
from .halves import read_halves, write_halves

KIND = "capm"
#: The weights that come with the pack, made for its lite SVD: both halves.
LITE_CAPM = bundled("capm_lite")
#: Those made for its lite Stable Diffusion with its control.
LITE_CAPM_SD = bundled("capm_sd_lite")
#: What the pack itself has, by the names that `load_capms` takes.
BUNDLED = {"lite": LITE_CAPM, "sd_lite": LITE_CAPM_SD}


@dataclass(frozen=True)
class CAPMs:
    """The halves of a file: for the decoders of a UNet and of a VAE."""

    unet: CAPM | None = None
    vae: CAPM | None = None

    def halves(self) -> dict[str, CAPM]:
        """Those that are there, by name."""
        return {name: half for name, half in (("unet", self.unet), ("vae", self.vae)) if half is not None}


def load_capms(path: Path | str, device: torch.device | str = "cpu") -> CAPMs:
    """The CAPMs at `path`, or of a name in BUNDLED, float32; what they fit says `check_fits`. Raises CheckpointError
    for a file that is missing, damaged or of another kind, or holds no half."""
    return CAPMs(**read_halves(BUNDLED.get(str(path), Path(path)), KIND, "CAPM", _built, device))


def write_capms(path: Path, capms: CAPMs, trained_on: str) -> None:
    """Writes a file that `load_capms` reads, float16. Raises CheckpointError."""
    write_halves(path, KIND, capms.halves(), trained_on)


def _built(config: Mapping[str, Any]) -> CAPM:
    shape = CAPMShape(**config)
    return CAPM(replace(shape, widths={str(name): int(width) for name, width in shape.widths.items()}))
