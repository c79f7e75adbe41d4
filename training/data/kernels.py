"""Blur kernels of Real-ESRGAN (arXiv 2107.10833, sections 3.1 and 3.4), `(size, size)` float64, each summing to 1."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """What draws a kernel: `size` odd; deviations in pixels, `angle` in radians, `omega` the cutoff in radians."""

    size: int
    sigma_x: float
    sigma_y: float
    angle: float
    beta_gaussian: float
    beta_plateau: float
    omega: float


def _grid(size: int) -> tuple[Tensor, Tensor]:
    axis = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return x, y


def _distance(shape: Shape, round_: bool) -> Tensor:
    """Squared distance from the centre in deviations, along the two turned axes."""
    x, y = _grid(shape.size)
    if round_:
        return (x * x + y * y) / shape.sigma_x**2
    cos, sin = math.cos(shape.angle), math.sin(shape.angle)
    return ((cos * x + sin * y) / shape.sigma_x) ** 2 + ((cos * y - sin * x) / shape.sigma_y) ** 2


def _sinc(shape: Shape) -> Tensor:
    """The circular low-pass filter: `omega J1(omega r) / (2 pi r)`, and its limit at the centre."""
    x, y = _grid(shape.size)
    r = (x * x + y * y).sqrt()
    ring = shape.omega * torch.special.bessel_j1(shape.omega * r) / (2 * math.pi * r.clamp(min=1e-9))
    return torch.where(r > 0, ring, torch.full_like(r, shape.omega**2 / (4 * math.pi)))


KERNELS: dict[str, Callable[[Shape], Tensor]] = {
    "iso": lambda s: torch.exp(-0.5 * _distance(s, True)),
    "aniso": lambda s: torch.exp(-0.5 * _distance(s, False)),
    "generalized_iso": lambda s: torch.exp(-0.5 * _distance(s, True) ** s.beta_gaussian),
    "generalized_aniso": lambda s: torch.exp(-0.5 * _distance(s, False) ** s.beta_gaussian),
    "plateau_iso": lambda s: 1 / (_distance(s, True) ** s.beta_plateau + 1),
    "plateau_aniso": lambda s: 1 / (_distance(s, False) ** s.beta_plateau + 1),
    "sinc": _sinc,
}
"""Kernels by the names of RealBasicVSR's configuration, not yet normalised. The round ones read `sigma_x` alone."""


def kernel(name: str, shape: Shape) -> Tensor:
    """The kernel called `name`, summing to 1."""
    weights = KERNELS[name](shape)
    return weights / weights.sum()
