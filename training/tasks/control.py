"""A control for a Stable Diffusion, which is frozen: the loss of what that predicts, v or the noise, with the upscaled
LR video's latents as the hint (SDATC, section III-B)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from training.data.latents import LatentsTask
from training.loop.draws import integer, uniform
from training.loop.recipe import Recipe, from_table
from training.loop.state import weights_of
from training.loop.task import Batch
from training.tasks.sd import (
    FrameLatents,
    SDDataSettings,
    decoded_rows,
    noised,
    nothing,
    read_start_sd,
    sampled,
    unet_of,
    velocity,
)
from training.tasks.svd import read_start
from vsr_ops.backbones.sd import TIMESTEPS, build_sd, model_sigmas
from vsr_ops.backbones.svd import Backbone, build_svd
from vsr_ops.errors import SettingError
from vsr_ops.modules.control import Control, load_control, write_control


@dataclass(frozen=True)
class ControlModelSettings:
    """`start`: the SD that stays as it is ("lite", a file or a run); `vae`: the SVD whose VAE its latents are of
    ("lite", a file or a run), empty: the SD's own. `control`: the control to go on from ("lite", a file or a run),
    empty: a copy of the SD's encoder."""

    start: str = "lite"
    vae: str = ""
    control: str = ""


@dataclass(frozen=True)
class ControlLossSettings:
    """`drop`: the share of samples whose hint is zero, as guidance's unconditional branch has it."""

    drop: float = 0.1


class ControlTask(LatentsTask):
    """Task "control". A sample is one frame's latents, its hint, a timestep and noise."""

    def __init__(self, recipe: Recipe, data: Path, out: Path) -> None:
        self.shape = from_table(ControlModelSettings, recipe.model, "model")
        self.weights = from_table(ControlLossSettings, recipe.loss, "loss")
        settings = from_table(SDDataSettings, recipe.data, "data")
        if not self.shape.start:
            raise SettingError("model.start is empty: expected the SD that stays as it is (--set model.start=runs/sd)")
        if not 0 <= self.weights.drop <= 1:
            raise SettingError(f"loss.drop is {self.weights.drop}: expected a share from 0 to 1")
        super().__init__(data, out, FrameLatents, settings)
        self._prediction = "v_prediction"

    def make_coder(self) -> Backbone:
        cpu, shape = torch.device("cpu"), self.shape
        if shape.vae:
            return build_svd(read_start(shape.vae), cpu, torch.float32)
        return build_sd(read_start_sd(shape.start), cpu, torch.float32)

    def build(self) -> nn.Module:
        weights = read_start_sd(self.shape.start)
        self._prediction, unet = weights.prediction, unet_of(weights)
        if self.shape.control:
            control = load_control(weights_of(self.shape.control))
            control.check_fits(list(unet.config["block_out_channels"]), unet.config["cross_attention_dim"])
        else:
            control = Control.of(unet)
        return nn.ModuleDict({"unet": cast(nn.Module, unet), "control": control})

    def trains(self, name: str) -> bool:
        return name.startswith("control.")

    def sample(self, rng: torch.Generator) -> Batch:
        frame = self._latents.draw(rng)
        kept = float(uniform(rng, 0, 1) >= self.weights.drop)
        timestep = torch.tensor(integer(rng, TIMESTEPS))
        noise = torch.randn(frame["clean"].shape, generator=rng)
        return {"clean": frame["clean"], "hint": frame["hint"] * kept, "timestep": timestep, "noise": noise}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        scaled, target = noised(batch["clean"], batch["noise"], batch["timestep"])
        found = controlled(model, batch["hint"], scaled, batch["timestep"])
        if self._prediction == "epsilon":
            target = batch["noise"]
        return (found - target).square().mean(), {}

    def picture(self, model: nn.Module, batch: Batch) -> Tensor:
        """Two places, sampled from one noise without and with the control."""
        two = {key: value[:2] for key, value in batch.items()}
        columns = {
            "LR": two["hint"],
            "without": self._sampled(partial(velocity, parts_of(model)[0]), two["noise"]),
            "control": self._sampled(partial(controlled, model, two["hint"]), two["noise"]),
            "truth": two["clean"],
        }
        return decoded_rows(self.coder(torch.device("cpu")), columns)

    def _sampled(self, predict: Callable[[Tensor, Tensor], Tensor], noise: Tensor) -> Tensor:
        if self._prediction == "v_prediction":
            return sampled(predict, noise)
        return sampled(lambda scaled, timestep: as_velocity(predict(scaled, timestep), scaled, timestep), noise)

    def export(self, model: nn.Module, path: Path, trained_on: str) -> None:
        write_control(path, parts_of(model)[1], trained_on)


def parts_of(model: nn.Module) -> tuple[nn.Module, Control]:
    """(UNet, control)."""
    both = cast(Any, model)
    return both["unet"], both["control"]


def as_velocity(noise: Tensor, scaled: Tensor, timestep: Tensor) -> Tensor:
    """The v of latents, as the UNet takes them, whose noise is said: `sqrt(s^2 + 1) eps - s x`."""
    wide = model_sigmas().to(scaled)[timestep].view(-1, 1, 1, 1)
    return (wide**2 + 1).sqrt() * noise - wide * scaled


def controlled(model: nn.Module, hint: Tensor, scaled: Tensor, timestep: Tensor) -> Tensor:
    """What the UNet predicts with the control, all as the UNet takes it."""
    unet, control = parts_of(model)
    skips, middle = control(scaled, timestep, nothing(unet, scaled), hint)
    return velocity(
        unet, scaled, timestep, down_block_additional_residuals=tuple(skips), mid_block_additional_residual=middle
    )
