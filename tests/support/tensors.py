"""Tensors of a seed, and how far two are apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vsr_ops.sampling.tiling import TilePlan


def relative(a: Tensor, b: Tensor) -> float:
    """The length of `a - b` as a share of the length of `b`, counted in float64."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=generator(seed))


def latents(plan: TilePlan, seed: int = 0) -> Tensor:
    """Noise of a plan's whole video."""
    return randn(plan.frames, 4, plan.height, plan.width, seed=seed)
