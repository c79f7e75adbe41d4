"""The measure of SDATC's table VI: LDL's artifact loss."""

from __future__ import annotations

import pytest
import torch

from training.report.sdatc import WINDOW, perception_sensitive
from vsr_ops.errors import SettingError


def video(seed: int, height: int = 24, width: int = 20) -> torch.Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed))


def test_no_error_and_an_even_one_are_no_artifact() -> None:
    truth = 0.5 * video(1)
    assert torch.equal(perception_sensitive(truth, truth), torch.zeros(2))
    assert float(perception_sensitive(truth + 0.1, truth).max()) < 1e-6


def test_it_is_the_sum_written_out() -> None:
    truth, result = video(2), video(2)
    result[..., 7:17, 7:13] = video(1)[..., 7:17, 7:13]  # off the border, where windows are made up
    for frame in range(2):
        error = (truth[frame] - result[frame]).abs().sum(0)
        weighted = 0.0
        for y in range(7, 17):
            for x in range(7, 13):
                pad = WINDOW // 2
                patch = error[y - pad : y + pad + 1, x - pad : x + pad + 1]
                weighted += float(error.var() ** 0.2 * patch.var() * error[y, x])
        expected = 1000 * weighted / truth[frame].numel()
        assert float(perception_sensitive(result, truth)[frame]) == pytest.approx(expected, rel=1e-4)


def test_noise_in_a_patch_costs_more_than_as_much_spread_evenly() -> None:
    truth = torch.full((1, 3, 32, 32), 0.5)
    noise = 0.2 * (torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(3)) - 0.5)
    patch, even = truth.clone(), truth.clone()
    patch[..., 8:16, 8:16] += noise
    even += noise.abs().mean() / 16
    assert perception_sensitive(patch, truth) > 100 * perception_sensitive(even, truth)


def test_sizes_that_differ_are_refused() -> None:
    with pytest.raises(SettingError):
        perception_sensitive(video(1), video(1, 16))
