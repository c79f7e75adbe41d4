"""Losses out of perceptual metrics that another package computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def haar_loss(result: Tensor, truth: Tensor) -> Tensor:
    """1 - HaarPSI (Reisenhofer et al. 2018, by piq) of RGB pictures `(n, 3, h, w)` in [0, 1], both sides at least 16
    pixels: 0 for equal pictures, at most 1. What is out of range is clamped first."""
    import piq  # imports torchvision, which is slow

    haarpsi: Any = piq.haarpsi
    # Its filters lose too much in autocast's precision.
    with torch.autocast(result.device.type, enabled=False):
        return 1 - haarpsi(result.float().clamp(0, 1), truth.float().clamp(0, 1))


def neg_losses(result: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """(1 - ADM, 1 - VIF): what VMAF-NEG's two spatial features lack (vmaf-torch's ADM, and VIF's mean over four scales,
    of the luma 16 to 235) of RGB pictures `(n, 3, h, w)` in [0, 1]; 0 for equal pictures, about 1 at most.

    What is out of range is clamped first; where a feature has no finite gradient, it pulls nowhere.
    """
    from vmaf_torch.adm import ADM
    from vmaf_torch.vif import VIF

    vif: Any = VIF(NEG=True).to(result.device)
    adm: Any = ADM(NEG=True).to(result.device)
    inside = result.float().clamp(0, 1)
    if inside.requires_grad:
        inside.register_hook(lambda gradient: gradient.nan_to_num(0.0, 0.0, 0.0))
    weights = torch.tensor([65.481, 128.553, 24.966], device=result.device).view(3, 1, 1)
    with torch.autocast(result.device.type, enabled=False):
        x, y = (16 + (weights * rgb).sum(1, keepdim=True) for rgb in (inside, truth.float().clamp(0, 1)))
        return (1 - adm.adm_score(y, x)).mean(), (1 - vif.vif_features(y, x)).mean()


def neg_loss(result: Tensor, truth: Tensor) -> Tensor:
    """The sum of `neg_losses`."""
    adm, vif = neg_losses(result, truth)
    return adm + vif
