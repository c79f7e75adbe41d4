"""What stands beside a VAE's decoder, as one record."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..modules.capm import CAPM
from ..modules.capm_hints import check_strength
from ..modules.cfw import CFW, check_w
from ..modules.sateco import FULL, SATeCo, Strengths
from ..modules.stam import STAM
from .layout import backbone_of, level_widths, output_widths, residual_widths


@dataclass(frozen=True)
class DecoderModules:
    """SDATC's modules of the decoder: `cfw`, which sees a reference, with its share `w`; `stam`, by which frames see
    each other; `capm`, which adapts to the compression, with its `strength`; and `sateco`, SATeCo's half that sees a
    reference, with its `strengths`. None, w 0 and strength 0 are off, exactly.

    Raises SettingError for a `w` outside [0, 1] and a `strength` outside [0, 2].
    """

    cfw: CFW | None = None
    w: float = 0.75
    stam: STAM | None = None
    capm: CAPM | None = None
    strength: float = 1.0
    sateco: SATeCo | None = None
    strengths: Strengths = FULL

    def __post_init__(self) -> None:
        check_w(self.w)
        check_strength(self.strength)

    @property
    def acting(self) -> DecoderModules:
        """Without those that are off."""
        cfw, capm = self.cfw if self.w else None, self.capm if self.strength else None
        return replace(self, cfw=cfw, capm=capm, sateco=None if self.strengths.off else self.sateco)

    @property
    def sees_reference(self) -> bool:
        """Whether one that acts sees the upscaled video."""
        return self.acting.cfw is not None or self.acting.sateco is not None

    @property
    def joins_frames(self) -> bool:
        """Whether frames see each other in one that acts."""
        return self.acting.stam is not None or (self.acting.sateco is not None and self.strengths.temporal > 0)

    @property
    def found(self) -> list[nn.Module]:
        """Those that there are."""
        return [module for module in (self.cfw, self.stam, self.capm, self.sateco) if module is not None]

    def check_fits(self, vae: Any) -> None:
        """Raises SettingError for a module that acts and was made for another VAE."""
        acting = self.acting
        if acting.cfw is not None:
            acting.cfw.check_fits(backbone_of(vae), level_widths(vae))
        if acting.stam is not None:
            acting.stam.check_fits(backbone_of(vae), residual_widths(vae))
        if acting.capm is not None:
            acting.capm.check_fits(f"{backbone_of(vae)}-vae", output_widths(vae))
        if acting.sateco is not None:
            # The deepest level runs over whole frames, and the UNet covers its resolution.
            deepest, *others = output_widths(vae)
            del deepest
            acting.sateco.check_fits(f"{backbone_of(vae)}-vae", {name: output_widths(vae)[name] for name in others})
