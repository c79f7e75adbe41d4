"""Losses of the trainer: nothing is lost by an equal picture, and more damage costs more."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from training.losses.losses import flicker, followed_change, information, luma_deviation, motion_of
from training.losses.perceptual import haar_loss, neg_loss
from vsr_ops.metrics.perceptual import haarpsi

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


def moving(shift: int, frames: int = 3) -> Tensor:
    """A textured picture that moves `shift` pixels a frame, `(frames, 3, 96, 96)`."""
    rng = torch.Generator().manual_seed(3)
    wide = F.interpolate(torch.rand(1, 3, 30, 60, generator=rng), size=(96, 192), mode="bicubic").clamp(0, 1)
    return torch.cat([wide[..., 40 + shift * k : 136 + shift * k] for k in range(frames)])


def test_an_error_that_moves_with_its_object_costs_less_than_one_that_stays() -> None:
    truth, stain = moving(3), 0.1 * (moving(3) - 0.5)
    motion = motion_of(truth)
    follows = float(followed_change(truth + stain, truth, motion))
    stays = float(followed_change(truth + stain[:1], truth, motion))
    assert float(followed_change(truth, truth, motion)) == 0
    assert follows < 0.1 * stays


def test_flicker_counts_only_where_nothing_moves() -> None:
    still, flickering = moving(0), torch.tensor([0.0, 0.02, 0.0]).view(3, 1, 1, 1)
    assert float(flicker(still + flickering, motion_of(still))) == pytest.approx(0.02, rel=1e-3)
    assert float(flicker(still, motion_of(still))) == 0
    assert float(flicker(moving(5) + flickering, motion_of(moving(5)))) < 0.002


def test_luma_deviation_is_the_root_of_the_luma_error_of_each_picture(truth: Tensor) -> None:
    errors = torch.tensor([0.02, 0.06]).view(2, 1, 1, 1)
    assert float(luma_deviation(truth + errors, truth)) == pytest.approx(0.04, abs=2e-4)
    tint = torch.tensor([0.1, -0.1 * 0.299 / 0.587, 0.0]).view(3, 1, 1)
    assert float(luma_deviation(truth + tint, truth)) < 0.0033
