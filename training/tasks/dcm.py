"""DCM, SDATC's upscaler (section III-B): Charbonnier and frequency loss, real H.264 in its input."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from training.data.patches import Patches, PatchSettings
from training.loop.curve import rows_of
from training.loop.recipe import Recipe, from_table
from training.loop.state import weights_of
from training.loop.task import Batch
from training.losses.losses import charbonnier, frequency, luma_deviation, psnr
from training.tasks.upscalers import upscaler_of
from vsr_ops.checkpoints.module_file import fill, write_module
from vsr_ops.image.resize import resize_bicubic
from vsr_ops.modules.dcm import read_dcm

KIND = "dcm"


@dataclass(frozen=True)
class DCMLossSettings:
    """Weights of the Charbonnier loss of `epsilon`, of the frequency loss, and of `luma_deviation`."""

    charbonnier: float = 1.0
    frequency: float = 0.05
    luma: float = 0.0
    epsilon: float = 1e-3


class DCM:
    """Task "dcm". A sample is `crops` patches: lr `(crops, 3, p, p)`, truth `(crops, 3, 4p, 4p)`."""

    def __init__(self, recipe: Recipe, data: Path, out: Path) -> None:
        self.upscaler, self.start = upscaler_of(recipe.model)
        self.weights = from_table(DCMLossSettings, recipe.loss, "loss")
        self._patches = Patches(data, from_table(PatchSettings, recipe.data, "data"))

    @property
    def data_summary(self) -> str:
        return self._patches.folder.summary

    def prepare(self, device: torch.device) -> None:
        self._patches.folder.load()

    def build(self) -> nn.Module:
        model = self.upscaler.build(self._patches.settings.patch)
        if self.start:
            start = weights_of(self.start)
            learnt = dict(read_dcm(start).model.state_dict())
            fill(Path(start), model, KIND, self.upscaler.continued(learnt, model.state_dict()))
        return model

    def trains(self, name: str) -> bool:
        return True

    def sample(self, rng: torch.Generator) -> Batch:
        lr, truth = self._patches.draw(rng)
        return {"lr": lr, "truth": truth}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        lr, truth = (rearrange(batch[key], "b n c h w -> (b n) c h w") for key in ("lr", "truth"))
        result = model(lr).float()
        weights = self.weights
        loss = weights.charbonnier * charbonnier(result, truth, weights.epsilon)
        if weights.frequency:
            loss = loss + weights.frequency * frequency(result, truth)
        if weights.luma:
            loss = loss + weights.luma * luma_deviation(result, truth)
        return loss, {"psnr": psnr(result, truth)}

    def picture(self, model: nn.Module, batch: Batch) -> Tensor:
        lr, truth = batch["lr"][:, 0], batch["truth"][:, 0]
        bicubic = resize_bicubic(lr, (truth.shape[-2], truth.shape[-1]))
        return rows_of([("bicubic", bicubic), ("DCM", model(lr)), ("truth", truth)])

    def export(self, model: nn.Module, path: Path, trained_on: str) -> None:
        """float16 weights under the architecture's own names."""
        arguments, state = self.upscaler.stored(model)
        write_module(path, KIND, arguments, state, trained_on)
