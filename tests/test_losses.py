"""Losses of the trainer: nothing is lost by an equal picture, and more damage costs more."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from training.losses import information
from training.perceived import haar_loss, neg_loss
from vsr_ops.metrics_perceived import haarpsi

Loss = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(scope="module")
def truth() -> Tensor:
    """Texture of several scales, `(2, 3, 96, 96)` in [0, 1]."""
    rng = torch.Generator().manual_seed(0)
    waves = [F.interpolate(torch.rand(2, 3, n, n, generator=rng), size=96, mode="bicubic") for n in (6, 24, 48)]
    return torch.stack(waves).mean(0).clamp(0, 1)


def blurred(x: Tensor, radius: int) -> Tensor:
    return F.avg_pool2d(F.pad(x, [radius] * 4, mode="replicate"), 2 * radius + 1, 1)


def noisy(x: Tensor, deviation: float) -> Tensor:
    return x + deviation * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("loss", [information, haar_loss, neg_loss])
def test_damage_costs_and_more_costs_more(loss: Loss, truth: Tensor) -> None:
    assert abs(float(loss(truth, truth))) < 1e-3
    for damage, amounts in ((blurred, (1, 2, 4)), (noisy, (0.02, 0.05, 0.1))):
        costs = [float(loss(damage(truth, amount), truth)) for amount in amounts]  # type: ignore[arg-type]
        assert 0.01 < costs[0] < costs[1] < costs[2] <= (2 if loss is neg_loss else 1)


def test_information_is_all_lost_by_grey_and_none_by_brightness_or_contrast(truth: Tensor) -> None:
    assert float(information(torch.full_like(truth, 0.5), truth)) > 0.99
    assert float(information(truth + 0.1, truth)) < 1e-3
    # NEG: a larger contrast earns nothing and costs nothing; a smaller one drowns in the eye's noise.
    assert abs(float(information(1.5 * truth, truth)) - float(information(truth, truth))) < 1e-2
    assert float(information(0.5 * truth, truth)) > 0.05


def test_information_is_about_luma(truth: Tensor) -> None:
    tint = torch.tensor([0.1, -0.1 * 0.299 / 0.587, 0.0]).view(3, 1, 1)
    assert float(information(noisy(truth, 0.05), truth)) > 0.05 > 1e-3 > float(information(truth + tint, truth))


def test_haar_loss_is_what_the_metric_lacks_to_one(truth: Tensor) -> None:
    result = blurred(truth, 2)
    assert float(haar_loss(result, truth)) == pytest.approx(1 - float(haarpsi(result, truth).mean()), abs=1e-5)


def test_haar_loss_is_exact_under_autocast(truth: Tensor) -> None:
    result = blurred(truth, 2)
    with torch.autocast("cpu", torch.bfloat16):
        rough = haar_loss(result, truth)
    assert torch.equal(rough, haar_loss(result, truth))


@pytest.mark.parametrize("loss", [information, haar_loss])
def test_following_the_gradient_sharpens(loss: Loss, truth: Tensor) -> None:
    result = blurred(truth, 2).requires_grad_()
    before = loss(result, truth)
    before.backward()
    assert result.grad is not None and torch.isfinite(result.grad).all()
    step = result.detach() - 1e-3 * result.grad / result.grad.abs().mean()
    assert float(loss(step, truth)) < before.item()
    assert (step - truth).square().mean() < (result.detach() - truth).square().mean()
