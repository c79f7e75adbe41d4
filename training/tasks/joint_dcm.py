"""The whole lite model with its DCM, which SDATC trains end to end with the diffusion that it leads (section III-B)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from training.loop.state import DCM_WEIGHTS, weights_of
from training.loop.task import Batch
from training.losses.losses import charbonnier, psnr
from training.tasks.dcm import KIND
from training.tasks.joint import Joint, JointLossSettings
from vsr_ops.checkpoints.module_file import read_module, write_module
from vsr_ops.modules.dcm import LITE_DCM, read_dcm


@dataclass(frozen=True)
class JointDCMLossSettings(JointLossSettings):
    """`guide`: Charbonnier's of the DCM's own video, without which it may leave pictures behind."""

    guide: float = 0.5


class JointWithDCM(Joint):
    """Task "whole_dcm": as "whole", and `model.dcm`, one of this pack's files, learns too."""

    losses = JointDCMLossSettings

    def prepare(self, device: torch.device) -> None:
        self._folder.load()

    def build(self) -> nn.Module:
        parts = cast(nn.ModuleDict, super().build())
        parts["dcm"] = read_own_dcm(self.shape.dcm)
        return parts.requires_grad_(True)

    def _guide(self, model: nn.Module, lr: Tensor) -> Tensor:
        return cast(Any, model)["dcm"](lr).float().clamp(0, 1)

    def _loss_of(self, model: nn.Module, clip: Batch) -> tuple[Tensor, dict[str, float]]:
        loss, numbers = super()._loss_of(model, clip)
        guide = self._guide(model, clip["lr"])
        weights = cast(JointDCMLossSettings, self.weights)
        numbers = {**numbers, "guide": psnr(guide, clip["truth"])}
        return loss + weights.guide * charbonnier(guide, clip["truth"]), numbers

    @property
    def _upscaler(self) -> str:
        return DCM_WEIGHTS

    def export(self, model: nn.Module, path: Path, trained_on: str) -> None:
        """The SVD, its refiner, and the DCM beside them as DCM_WEIGHTS."""
        super().export(model, path, trained_on)
        write_own_dcm(path.with_name(DCM_WEIGHTS), self.shape.dcm, cast(Any, model)["dcm"], trained_on)


def read_own_dcm(name: str) -> nn.Module:
    """The network of a DCM that may go on learning: one of this pack's files, "lite", or a run. Raises CheckpointError,
    for a foreign upscaler's file too, as it could not be written again."""
    read_module(_file(name), KIND)
    return read_dcm(_file(name)).model


def write_own_dcm(path: Path, name: str, network: nn.Module, trained_on: str) -> None:
    """Writes what `read_own_dcm` gave of `name`, trained on. Raises CheckpointError."""
    write_module(path, KIND, read_module(_file(name), KIND).config, network.state_dict(), trained_on)


def _file(name: str) -> Path:
    return LITE_DCM if name == "lite" else Path(weights_of(name))
