"""CAPM's halves for UNet and VAE together: they learn from the result of a short sampling, while all else stays.

Apart, EDM's loss asks the UNet's half for the mean of what may be, and the VAE's learns on latents that know nothing of
the other. Here the gradient of the finished video reaches both, as it reached the lite model under them.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from training.data.degradation import h264, shrink
from training.loop.draws import uniform
from training.loop.recipe import Recipe
from training.loop.state import weights_of
from training.loop.task import Batch
from training.tasks import joint
from training.tasks.capm import CAPMLossSettings, check_crfs, disagreement, drawn_crf, watched
from training.tasks.joint import SCALE, Joint
from vsr_ops.errors import SettingError
from vsr_ops.modules.capm import SVD_UNET, SVD_VAE, attached, decoder_widths
from vsr_ops.modules.capm_file import CAPMs, load_capms, write_capms
from vsr_ops.modules.compression import COARSEST
from vsr_ops.vae.layout import output_widths


@dataclass(frozen=True)
class JointCAPMModelSettings(joint.JointModelSettings):
    """`capm`: the CAPM that goes on, a file, "lite", or a run; both its halves learn."""

    capm: str = "lite"


@dataclass(frozen=True)
class JointCAPMDataSettings(joint.JointDataSettings):
    """A `clean_share` stays clean, the others go through H.264 at any CRF from `finest` to `coarsest`."""

    clean_share: float = 0.1
    finest: int = 15
    coarsest: int = 35


@dataclass(frozen=True)
class JointCAPMLossSettings(joint.JointLossSettings):
    """`untold` is the share of clips whose compression level is not told, `agree` weighs how far d lies from what the
    level would have put in its place."""

    untold: float = CAPMLossSettings.untold
    agree: float = 0.1


class JointCAPM(Joint):
    """Task "capm_whole". A sample is Joint's, its clip's level, and what CAPM is told of it (NaN: nothing)."""

    shapes, clips, losses = JointCAPMModelSettings, JointCAPMDataSettings, JointCAPMLossSettings
    shape: JointCAPMModelSettings
    data: JointCAPMDataSettings
    weights: JointCAPMLossSettings

    def __init__(self, recipe: Recipe, data: Path, out: Path) -> None:
        super().__init__(recipe, data, out)
        if not self.shape.capm:
            raise SettingError("model.capm is empty: expected a CAPM with both halves (--set model.capm=lite)")
        check_crfs(self.data.finest, self.data.coarsest)

    def build(self) -> nn.Module:
        parts = cast(nn.ModuleDict, super().build())
        halves = load_capms(weights_of(self.shape.capm)).halves()
        if set(halves) != {"unet", "vae"}:
            raise SettingError(f"model.capm is {self.shape.capm}, which has {', '.join(halves)}: expected unet and vae")
        halves["unet"].check_fits(SVD_UNET, decoder_widths(cast(Any, parts["unet"]).config["block_out_channels"]))
        halves["vae"].check_fits(SVD_VAE, output_widths(parts))
        parts["capms"] = nn.ModuleDict(halves).requires_grad_(True)
        return parts

    def trains(self, name: str) -> bool:
        return name.startswith("capms.")

    def _low(self, truth: Tensor, rng: torch.Generator) -> Batch:
        data, small = self.data, shrink(truth, SCALE)
        crf = drawn_crf(rng, data.clean_share, data.finest, data.coarsest)
        level = torch.tensor((crf or 0) / COARSEST)
        told = uniform(rng, 0, 1) >= self.weights.untold
        return {
            "lr": small if crf is None else h264(small, crf),
            "level": level,
            "hint": level if told else torch.full_like(level, torch.nan),
        }

    @contextmanager
    def _beside(self, model: nn.Module, clip: Batch) -> Generator[None, None, None]:
        parts, hint = cast(Any, model), clip["hint"].expand(len(clip["truth"]))
        capms = parts["capms"]
        with attached(capms["unet"], parts["unet"], hint), attached(capms["vae"], parts["decoder"], hint):
            yield

    def _loss_of(self, model: nn.Module, clip: Batch) -> tuple[Tensor, dict[str, float]]:
        parts, level = cast(Any, model), clip["level"].expand(len(clip["truth"]))
        unet, vae = parts["capms"]["unet"], parts["capms"]["vae"]
        with watched(unet, parts["unet"]) as of_unet, watched(vae, parts["decoder"]) as of_vae:
            loss, numbers = super()._loss_of(model, clip)
        agree = torch.cat([disagreement(unet, of_unet, level), disagreement(vae, of_vae, level)]).mean()
        return loss + self.weights.agree * agree, {**numbers, "agree": float(agree.detach())}

    def export(self, model: nn.Module, path: Path, trained_on: str) -> None:
        write_capms(path, CAPMs(**cast(Any, model)["capms"]), trained_on)
