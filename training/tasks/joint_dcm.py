"""The whole lite model with its DCM, which SDATC trains end to end with the diffusion that it leads (section III-B)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from training.loop.state import weights_of
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
        parts["dcm"] = read_dcm(weights_of(self.shape.dcm)).model
        return parts.requires_grad_(True)

    def _guide(self, model: nn.Module, lr: Tensor) -> Tensor:
        return cast(Any, model)["dcm"](lr).float().clamp(0, 1)

    def _loss_of(self, model: nn.Module, clip: Batch) -> tuple[Tensor, dict[str, float]]:
        loss, numbers = super()._loss_of(model, clip)
        guide = self._guide(model, clip["lr"])
        weights = cast(JointDCMLossSettings, self.weights)
        numbers = {**numbers, "guide": psnr(guide, clip["truth"])}
        return loss + weights.guide * charbonnier(guide, clip["truth"]), numbers

    def export(self, model: nn.Module, path: Path, trained_on: str) -> None:
        """The SVD, its refiner, and the DCM beside them as `dcm.safetensors`."""
        super().export(model, path, trained_on)
        start = weights_of(self.shape.dcm)
        stored = read_module(LITE_DCM if str(start) == "lite" else Path(start), KIND)
        state = cast(Any, model)["dcm"].state_dict()
        write_module(path.with_name("dcm.safetensors"), KIND, stored.config, state, trained_on)
