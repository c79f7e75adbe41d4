"""CAPM for a Stable Diffusion's UNet, which is frozen, as its control is: the loss of what that predicts on frames of
known compression, with the upscaled LR video's latents as the control's hint (SDATC, section III-C)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from training.loop.draws import uniform
from training.loop.recipe import Recipe, from_table
from training.loop.state import weights_of
from training.loop.task import Batch
from training.tasks import control
from training.tasks.capm import CAPMLossSettings, capm_shape, disagreement, one_batch, parts_of, settling, watched
from training.tasks.control import ControlTask, by_frame, controlled, first_frames, sampled_by
from training.tasks.sd import decoded_rows
from vsr_ops.errors import SettingError
from vsr_ops.modules.capm import CAPM, SD_UNET, CAPMShape, attached, decoder_widths
from vsr_ops.modules.capm_file import CAPMs, load_capms, write_capms
from vsr_ops.modules.compression import rank_correlation


@dataclass(frozen=True)
class CAPMSDModelSettings(control.ControlModelSettings):
    """`start`, `vae` and `control` ("lite", a file or a run) stay as they are. `capm`: a file, "lite", or a run, whose
    VAE half joins what is written; the run goes on from its half for an SD's UNet, and where there is none makes a new
    one of the other settings."""

    control: str = "lite"
    capm: str = ""
    components: int = CAPMShape.components
    code: int = CAPMShape.code
    prompt: int = CAPMShape.prompt
    size: int = CAPMShape.size
    weighing: str = CAPMShape.weighing


@dataclass(frozen=True)
class CAPMSDLossSettings(control.ControlLossSettings):
    """As the control's `drop`; `untold` is the share of samples whose compression level is not told, `agree` weighs how
    far d lies from what the level would have put in its place."""

    untold: float = CAPMLossSettings.untold
    agree: float = CAPMLossSettings.agree


class CAPMSDTask(ControlTask):
    """Task "capm_sd". A sample is the control's, its clip's level, and what CAPM is told of that (NaN: nothing)."""

    shape: CAPMSDModelSettings
    weights: CAPMSDLossSettings

    def __init__(self, recipe: Recipe, data: Path, out: Path) -> None:
        shape = from_table(CAPMSDModelSettings, recipe.model, "model")
        weights = from_table(CAPMSDLossSettings, recipe.loss, "loss")
        super().__init__(
            replace(
                recipe, model=_of(control.ControlModelSettings, shape), loss=_of(control.ControlLossSettings, weights)
            ),
            data,
            out,
        )
        self.shape, self.weights = shape, weights
        if shape.decoder:
            raise SettingError("model.decoder is true: this task trains CAPM alone; train the decoder with the control")
        if not shape.control:
            raise SettingError(
                "model.control is empty: expected the control that stays as it is (--set model.control=lite): without"
                " it the SD sees no LR video"
            )
        if min(shape.components, shape.code, shape.prompt, shape.size) < 1:
            raise SettingError(f"the CAPM of {shape}: expected at least 1 of each; correct [model]")
        if not 0 <= weights.untold <= 1:
            raise SettingError(f"loss.untold is {weights.untold}: expected a share from 0 to 1")
        self._first: Batch | None = None

    def prepare(self, device: torch.device) -> None:
        super().prepare(device)
        self._first = one_batch(self.sample)

    def build(self) -> nn.Module:
        parts = cast(nn.ModuleDict, super().build())
        unet, _ = control.parts_of(parts)
        widths = decoder_widths(cast(Any, unet).config["block_out_channels"])
        shape, capm = self.shape, self._before().unet
        if capm is None or capm.shape.backbone != SD_UNET:
            capm = CAPM(capm_shape(SD_UNET, widths, shape))
            if self._first is not None:
                with settling(capm, unet):
                    super().loss(parts, self._first)
        capm.check_fits(SD_UNET, widths)
        parts["capm"] = capm
        return parts

    def _before(self) -> CAPMs:
        return load_capms(weights_of(self.shape.capm)) if self.shape.capm else CAPMs()

    def trains(self, name: str) -> bool:
        return name.startswith("capm.")

    def sample(self, rng: torch.Generator) -> Batch:
        state = rng.get_state()
        level = self._latents.draw(rng)["level"]
        rng.set_state(state)
        sample = super().sample(rng)
        told = uniform(rng, 0, 1) >= self.weights.untold
        return {**sample, "level": level, "told": level if told else torch.full_like(level, torch.nan)}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        unet, capm = parts_of(model)
        frames = by_frame(batch)
        level = frames["level"]
        with watched(capm, unet) as features, attached(capm, unet, frames["told"]):
            found, _ = super().loss(model, batch)
        kept = frames["hint"].flatten(1).any(1)  # without LR latents there is nothing to read
        agree = (disagreement(capm, features, level) * kept).mean()
        readings = torch.stack([capm.reading(name, value) for name, value in features.items()]).mean(0)
        return found + self.weights.agree * agree, {
            "found": float(found.detach()),
            "agree": float(agree.detach()),
            "rank": rank_correlation(readings, level),
        }

    def picture(self, model: nn.Module, batch: Batch) -> Tensor:
        """Two places, sampled from one noise with the control alone, and with CAPM told the level."""
        unet, capm = parts_of(model)
        frames = first_frames(batch)
        clean, hint, noise, level = (frames[key] for key in ("clean", "hint", "noise", "level"))
        found: dict[str, Tensor] = {}
        predict: Callable[[Tensor, Tensor], Tensor] = partial(controlled, model, hint)
        for name, beside in (("control", nullcontext()), ("CAPM", attached(capm, unet, level))):
            with beside:
                found[name] = sampled_by(predict, noise, self._prediction)
        return decoded_rows(self.coder(torch.device("cpu")), {"LR": hint, **found, "truth": clean})

    def export(self, model: nn.Module, path: Path, trained_on: str) -> None:
        write_capms(path, CAPMs(parts_of(model)[1], self._before().vae), trained_on)


def _of(kind: type, values: object) -> dict[str, object]:
    """Those settings that are `kind`'s as well."""
    return {field.name: getattr(values, field.name) for field in fields(kind)}
