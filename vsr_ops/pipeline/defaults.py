"""What a model is sampled with where nothing else is asked for: one table, for the command line and the nodes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import SettingError


@dataclass(frozen=True)
class Defaults:
    """`steps` of the model's own schedule; a `guidance` (a name in GUIDANCE); a `color` correction (a name in COLOR),
    unless a refiner has put the colours back; the `upscaler` of the input: "bicubic", "dcm" (the bundled one), "video"
    (the bundled one on top of that) or the name of a file, and whether the model is known to have been `trained_on`
    its pictures; the bundled `refiner`, where it was made for the model; the `layout` of tiles (a name in LAYOUTS); and
    the noise level `start_sigma` on the LR latent that the steps begin at (None: pure noise)."""

    steps: int
    guidance: str
    color: str
    upscaler: str
    trained_on: bool = False
    refiner: str = "none"
    layout: str = "paper"
    start_sigma: float | None = None

    def steps_of(self, sampler: str) -> int:
        """Those that suit the model, or the paper's number where it is the sampler that wants many."""
        return DDPM_STEPS if sampler == "ddpm" else self.steps

    def start_of(self, sampler: str, asked: bool) -> float | None:
        """The noise level that the model's own steps start from; None where others were `asked` for, or a start."""
        return None if asked or sampler == "ddpm" else self.start_sigma

    def guided(self, asked: str, strength: bool) -> str:
        """The guidance asked for; "auto" is the model's own, but a `strength` alone asks for the paper's."""
        return asked if asked != AUTO else PAPER_GUIDANCE if strength else self.guidance

    def stored(self, upscaler: str | None) -> Defaults:
        """With the upscaler that a file says its model was trained on, where it says one (`UPSCALER_KEY`)."""
        return self if upscaler is None else replace(self, upscaler=OWN.get(upscaler, upscaler), trained_on=True)

    def enlarged_by(self, asked: str) -> str:
        """The upscaler asked for; "auto" is the model's own. Raises SettingError where that is a file to be given."""
        name = self.upscaler if asked == AUTO else asked
        if asked == AUTO and name not in OWN.values():
            raise SettingError(
                f"the model was trained on pictures enlarged by {name}, which is not bundled: expected that upscaler;"
                " give its file, or choose bicubic, dcm or video to do without"
            )
        return OWN.get(name, name)

    def objection(self, upscaler: str) -> str | None:
        """What speaks against an upscaler, by its name; nothing where the model was trained on its pictures, or nobody
        knows on whose."""
        name = OWN.get(upscaler, Path(upscaler).name)
        if not self.trained_on or STANDS_ON.get(name, name) == STANDS_ON.get(self.upscaler, self.upscaler):
            return None
        return (
            f"the model was trained on pictures enlarged by {self.upscaler}, and may take the faults of others for the"
            " video's"
        )

    def laid_out(self, asked: str) -> str:
        """The layout of tiles asked for; "auto" is the model's own."""
        return asked if asked != AUTO else self.layout

    def colored(self, asked: str, refined: bool) -> str:
        """The colour correction asked for; "auto" is the model's own, and none after a refiner."""
        return asked if asked != AUTO else "none" if refined else self.color


AUTO = "auto"
#: Names that the pack's own upscalers go by; recipes call the bundled one as its file is called.
OWN = {"bicubic": "bicubic", "dcm": "dcm", "video": "video", "lite": "dcm"}
#: What of the pack's own corrects another's pictures, whose faults the models know.
STANDS_ON = {"video": "dcm"}
PAPER_GUIDANCE = "dssag"
#: SDATC's.
DDPM_STEPS = 50
#: The paper's rho of DSSAG, and SVD's sampler.
RHO, SAMPLER = 0.5, "euler"

#: The bundled models hold so close to the LR latent that one step from it does what four from noise do, and that less
#: overlap shows nowhere (docs/benchmarks.md, "Fewer steps" and "Tile layouts").
LITE_STEPS, LITE_START = 1, 3.0
#: By kind of model: the bundled ones, which learnt from the results of few steps without guidance, DC-VSR's, and others
#: of full size. DC-VSR has 25 steps, DSSAG, bicubic pictures and no colour step; SDATC its DCM and AdaIN. What they
#: restore is coarser than what `detail` keeps.
DEFAULTS = {
    "svd_lite": Defaults(LITE_STEPS, "none", "detail", "dcm", True, "lite", "balanced", LITE_START),
    "sd_lite": Defaults(LITE_STEPS, "none", "detail", "dcm", True, "lite", "paper", LITE_START),
    "dc_vsr": Defaults(25, PAPER_GUIDANCE, "none", "bicubic", trained_on=True),
    "svd": Defaults(25, PAPER_GUIDANCE, "none", "bicubic"),
    "sd": Defaults(25, "none", "adain", "dcm"),
}
