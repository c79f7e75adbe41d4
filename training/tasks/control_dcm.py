"""A control, its Stable Diffusion's decoder and the DCM before them, trained end to end (SDATC, section III-B): the
loss of what the UNet predicts reaches the DCM through the frozen VAE's encoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from training.data.folder import Folder, check_degradation, degraded
from training.loop.draws import integer, uniform
from training.loop.recipe import Recipe, from_table
from training.loop.state import DCM_WEIGHTS, upscaler_note
from training.loop.task import Batch
from training.losses.losses import charbonnier, psnr
from training.tasks.control import (
    ControlLossSettings,
    ControlModelSettings,
    build_parts,
    by_frame,
    check_control,
    coder_of,
    control_picture,
    export_parts,
    first_frames,
    learns,
    prediction_loss,
)
from training.tasks.joint_dcm import read_own_dcm, write_own_dcm
from vsr_ops.backbones.sd import TIMESTEPS
from vsr_ops.backbones.svd import Backbone
from vsr_ops.errors import SettingError

SCALE = 4


@dataclass(frozen=True)
class ControlDCMModelSettings(ControlModelSettings):
    """`dcm`: the DCM to go on from, one of this pack's files, "lite", or a run."""

    decoder: bool = True
    dcm: str = "lite"


@dataclass(frozen=True)
class ControlDCMDataSettings:
    """Clips of `frames` frames of `size` x `size` pixels (a multiple of 64), degraded in a way of DEGRADATIONS but for
    a `clean_share`. A sample is one of them, with noise of one level."""

    size: int = 512
    frames: int = 5
    degradation: str = "bitrate"
    clean_share: float = 0.0
    video_share: float = 0.9


@dataclass(frozen=True)
class ControlDCMLossSettings(ControlLossSettings):
    """`guide` weighs Charbonnier's of the DCM's own video, without which it may leave pictures behind."""

    guide: float = 0.5


class ControlWithDCM:
    """Task "control_dcm". A sample is lr `(frames, 3, h/4, w/4)`, truth `(frames, 3, h, w)`, a timestep, noise, and
    whether the hint is kept."""

    def __init__(self, recipe: Recipe, data: Path, out: Path) -> None:
        self.shape = from_table(ControlDCMModelSettings, recipe.model, "model")
        self.data = from_table(ControlDCMDataSettings, recipe.data, "data")
        self.weights = from_table(ControlDCMLossSettings, recipe.loss, "loss")
        check_control(self.shape, self.weights)
        if self.data.size % 64 or self.data.size < 64 or self.data.frames < 1:
            raise SettingError(
                f"data.size is {self.data.size}, data.frames {self.data.frames}: expected a multiple of 64, and at"
                " least one frame"
            )
        check_degradation(self.data.degradation)
        self._folder = Folder(data)
        self._prediction, self._factor = "v_prediction", 1.0
        self._coder: Backbone | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the VAE: processes that draw samples need none."""
        return {**self.__dict__, "_coder": None}

    @property
    def data_summary(self) -> str:
        return self._folder.summary

    def prepare(self, device: torch.device) -> None:
        self._folder.load()

    def build(self) -> nn.Module:
        self._prediction, parts = build_parts(self.shape)
        coder = coder_of(self.shape)
        self._factor = coder.scaling_factor
        vae = cast(Any, coder.vae)
        parts["encoder"] = nn.Sequential(vae.encoder, vae.quant_conv)
        parts["dcm"] = read_own_dcm(self.shape.dcm)
        return parts

    def trains(self, name: str) -> bool:
        return name.startswith("dcm.") or learns(self.shape, name)

    def sample(self, rng: torch.Generator) -> Batch:
        data, cells = self.data, self.data.size // 8
        truth = self._folder.clip(data.frames, data.size, rng, data.video_share)
        return {
            "lr": degraded(data.degradation, truth, rng, SCALE, data.clean_share),
            "truth": truth,
            "timestep": torch.tensor(integer(rng, TIMESTEPS)),
            "noise": torch.randn((data.frames, 4, cells, cells), generator=rng),
            "kept": torch.tensor(float(uniform(rng, 0, 1) >= self.weights.drop)),
        }

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        clips, guide = self._latents(model, batch)
        truth = batch["truth"].flatten(0, 1)
        found = prediction_loss(model, by_frame(clips), self._prediction)
        numbers = {"found": float(found.detach()), "guide": psnr(guide, truth)}
        return found + self.weights.guide * charbonnier(guide, truth), numbers

    def _latents(self, model: nn.Module, batch: Batch) -> tuple[Batch, Tensor]:
        """(a batch as the control's task has it, the DCM's video `(clips * frames, 3, h, w)` in [0, 1])."""
        parts, count = cast(Any, model), len(batch["truth"])
        guide = parts["dcm"](batch["lr"].flatten(0, 1)).float().clamp(0, 1)
        with torch.no_grad():
            clean = self._encoded(model, batch["truth"].flatten(0, 1)).unflatten(0, (count, -1))
        hint = self._encoded(model, guide).unflatten(0, (count, -1)) * batch["kept"].view(-1, 1, 1, 1, 1)
        return {"clean": clean, "hint": hint, "timestep": batch["timestep"], "noise": batch["noise"]}, guide

    def _encoded(self, model: nn.Module, frames: Tensor) -> Tensor:
        """Latents of frames in [0, 1], times the VAE's factor."""
        return cast(Any, model)["encoder"](2 * frames - 1)[:, :4].float() * self._factor

    def picture(self, model: nn.Module, batch: Batch) -> Tensor:
        if self._coder is None:
            self._coder = coder_of(self.shape)
        clips, _ = self._latents(model, batch)
        return control_picture(model, first_frames(clips), self._prediction, self._coder)

    def export(self, model: nn.Module, path: Path, trained_on: str) -> None:
        """The control, the SD beside it, and the DCM that both learnt with as `dcm.safetensors`."""
        notes = upscaler_note(str(path.with_name(DCM_WEIGHTS)))
        export_parts(self.shape, model, path, trained_on, notes)
        write_own_dcm(path.with_name(DCM_WEIGHTS), self.shape.dcm, cast(Any, model)["dcm"], trained_on)
