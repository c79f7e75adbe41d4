"""What stands beside a VAE's decoder, as one record."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..modules.capm import CAPM
from ..modules.capm_hints import check_strength
from ..modules.cfw import CFW, check_w
from ..modules.stam import STAM
from .layout import backbone_of, level_widths, output_widths, residual_widths


@dataclass(frozen=True)
class DecoderModules:
    """SDATC's modules of the decoder: `cfw`, which sees a reference, with its share `w`; `stam`, by which frames see
    each other; `capm`, which adapts to the compression, with its `strength`. None, w 0 and strength 0 are off, exactly.

    Raises SettingError for a `w` outside [0, 1] and a `strength` outside [0, 2].
    """

    cfw: CFW | None = None
    w: float = 0.75
    stam: STAM | None = None
    capm: CAPM | None = None
    strength: float = 1.0

    def __post_init__(self) -> None:
        check_w(self.w)
        check_strength(self.strength)

    @property
    def acting(self) -> DecoderModules:
        """Without those that are off."""
        return replace(self, cfw=self.cfw if self.w else None, capm=self.capm if self.strength else None)

    @property
    def found(self) -> list[nn.Module]:
        """Those that there are."""
        return [module for module in (self.cfw, self.stam, self.capm) if module is not None]

    def check_fits(self, vae: Any) -> None:
        """Raises SettingError for a module that acts and was made for another VAE."""
        acting = self.acting
        if acting.cfw is not None:
            acting.cfw.check_fits(backbone_of(vae), level_widths(vae))
        if acting.stam is not None:
            acting.stam.check_fits(backbone_of(vae), residual_widths(vae))
        if acting.capm is not None:
            acting.capm.check_fits(f"{backbone_of(vae)}-vae", output_widths(vae))
