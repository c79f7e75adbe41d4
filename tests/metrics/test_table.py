"""The table of metrics, and those of pixels against scikit-image and published constants."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.color import rgb2ycbcr
from skimage.data import astronaut
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from vsr_ops.errors import SettingError
from vsr_ops.image.resize import quantize8, resize_bicubic
from vsr_ops.metrics.table import (
    METRICS,
    QUICK,
    chosen,
    color_drift,
    luma,
    measure,
    missing,
    psnr,
    psnr_y,
    ssim_y,
    table,
)


@pytest.fixture(scope="module")
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    """Two frames of a photograph and two results of unequal quality, 8 bit."""
    picture = torch.from_numpy(astronaut()).permute(2, 0, 1).float() / 255
    truth = torch.stack([picture[:, 20:140, 150:310], picture[:, 200:320, 30:190]])
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    return quantize8(truth + noise * torch.tensor([0.02, 0.1]).view(2, 1, 1, 1)), truth


def pixels(x: torch.Tensor) -> np.ndarray:
    """One frame as (h, w, 3), float64."""
    return x.permute(1, 2, 0).double().numpy()


def test_luma_equals_scikit_image(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    for frame in pair[1]:
        ours = luma(frame[None].double())[0, 0].numpy() * 255
        assert np.abs(ours - rgb2ycbcr(pixels(frame))[..., 0]).max() < 1e-9


def test_luma_of_black_and_white() -> None:
    y = luma(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 2, 2)) * 255
    assert torch.allclose(y.amax((1, 2, 3)), torch.tensor([16.0, 235.0]), atol=1e-4)


def test_psnr_equals_scikit_image(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    result, truth = pair
    expected = [peak_signal_noise_ratio(pixels(t), pixels(r), data_range=1) for r, t in zip(*pair, strict=True)]
    assert np.abs(psnr(result, truth).numpy() - expected).max() < 1e-4


@pytest.mark.parametrize("border", [0, 4])
def test_psnr_y_equals_scikit_image(pair: tuple[torch.Tensor, torch.Tensor], border: int) -> None:
    result, truth = pair
    inside = slice(border, -border or None)
    for ours, r, t in zip(psnr_y(result, truth, border), result, truth, strict=True):
        y_result, y_truth = (rgb2ycbcr(pixels(x))[inside, inside, 0] for x in (r, t))
        assert abs(float(ours) - peak_signal_noise_ratio(y_truth, y_result, data_range=255)) < 1e-4


@pytest.mark.parametrize("border", [0, 4])
def test_ssim_y_equals_scikit_image(pair: tuple[torch.Tensor, torch.Tensor], border: int) -> None:
    result, truth = pair
    inside = slice(border, -border or None)
    for ours, r, t in zip(ssim_y(result, truth, border), result, truth, strict=True):
        y_result, y_truth = (rgb2ycbcr(pixels(x))[inside, inside, 0] for x in (r, t))
        expected = structural_similarity(
            y_truth,
            y_result,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
        )
        assert abs(float(ours) - expected) < 1e-4


def test_bicubic_x4_is_the_baseline_others_measure(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Shrunk and enlarged by Pillow, scored by scikit-image. Pillow treats the picture's edge otherwise: left out."""
    truth = pair[1]
    height, width = truth.shape[-2:]
    small = quantize8(resize_bicubic(truth, (height // 4, width // 4)))
    ours = psnr_y(quantize8(resize_bicubic(small, (height, width))), truth, border=24)
    for value, frame in zip(ours, truth, strict=True):
        picture = Image.fromarray((pixels(frame) * 255).round().astype(np.uint8))
        for size in ((width // 4, height // 4), (width, height)):
            picture = picture.resize(size, Image.Resampling.BICUBIC)
        inside = (slice(24, -24), slice(24, -24), 0)
        theirs, expected = (rgb2ycbcr(x)[inside] for x in (np.asarray(picture), pixels(frame)))
        assert abs(float(value) - peak_signal_noise_ratio(expected, theirs, data_range=255)) < 0.01


def test_one_level_off_everywhere_is_48_13_db() -> None:
    truth = torch.full((1, 3, 16, 16), 100 / 255)
    assert abs(float(psnr(truth + 1 / 255, truth)) - 20 * math.log10(255)) < 1e-3
    # Studio swing spends 219 of 255 levels on the same range, so luma differs by less.
    assert abs(float(psnr_y(truth + 1 / 255, truth)) - 20 * math.log10(255 * 255 / 219)) < 1e-3


def test_equal_clips_score_best(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    truth = pair[1]
    assert measure(truth, truth) == {"psnr_y": math.inf, "ssim_y": 1.0, "psnr": math.inf, "color_drift": 0.0}


def test_metrics_move_the_right_way_under_blur(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    truth = pair[1]
    size = (truth.shape[-2], truth.shape[-1])
    little, much = (
        measure(resize_bicubic(resize_bicubic(truth, (size[0] // n, size[1] // n)), size), truth) for n in (2, 5)
    )
    for name in ("psnr_y", "psnr", "ssim_y"):
        assert little[name] > much[name]


def test_color_drift_is_the_largest_channel_shift_in_levels(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    truth = pair[1]
    shift = torch.tensor([[1.0, -3.0, 2.0], [0.0, 0.5, 0.0]]).view(2, 3, 1, 1) / 255
    assert torch.allclose(color_drift(truth + shift, truth), torch.tensor([3.0, 0.5]).double(), atol=1e-4)
    assert color_drift(truth.flip(-1), truth).max() < 1e-9


@pytest.mark.parametrize("name", QUICK)
def test_one_value_per_frame_and_frames_do_not_mix(name: str, pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    both = METRICS[name](*pair)
    assert both.shape == (2,)
    assert torch.equal(METRICS[name](pair[0][1:], pair[1][1:]), both[1:])


@pytest.mark.parametrize("name", list(METRICS))
@pytest.mark.parametrize("shape", [(2, 3, 120, 156), (1, 3, 120, 160), (2, 1, 120, 160)])
def test_other_sizes_are_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(SettingError, match=r"cannot compare 2x3x120x160 with \d"):
        METRICS[name](torch.rand(2, 3, 120, 160), torch.rand(shape))


def test_the_table_knows_every_metric_by_its_name() -> None:
    assert [metric.name for metric in METRICS.values()] == list(METRICS)
    assert {"vmaf_neg", "haarpsi", "lpips", "tof", "tlp", "warp_error", "flicker", "seam", "dover"} < set(METRICS)
    assert len({metric.label for metric in METRICS.values()}) == len(METRICS)
    assert all(missing(name) == "" for name in QUICK)


def test_names_are_read_from_text_once_each() -> None:
    assert chosen(" vmaf, psnr_y,,vmaf ") == ["vmaf", "psnr_y"]
    with pytest.raises(SettingError, match="no metric was named"):
        chosen(" , ")


@pytest.mark.parametrize(
    ("name", "values", "best", "arrow"),
    [
        ("psnr_y", [28.0, math.nan, 30.0], 30.0, "↑"),
        ("tof", [2.0, 1.0], 1.0, "↓"),
        ("seam", [0.7, 1.2, 2.0], 1.2, "→1"),
    ],
)
def test_the_best_is_the_highest_the_lowest_or_the_nearest(
    name: str, values: list[float], best: float, arrow: str
) -> None:
    assert METRICS[name].best(values) == best and METRICS[name].arrow == arrow
    assert math.isnan(METRICS[name].best([math.nan]))


def test_what_cannot_be_measured_is_named() -> None:
    small = torch.rand(1, 3, 12, 30)
    for border in (6, -1):
        with pytest.raises(SettingError, match=f"border of {border}"):
            psnr_y(small, small, border)
    with pytest.raises(SettingError, match="SSIM got frames of 8x26"):
        ssim_y(small, small, border=2)
    with pytest.raises(SettingError, match="luma got 1x1x12x30"):
        psnr_y(small[:, :1], small[:, :1])
    with pytest.raises(SettingError, match="cannot measure 0x3x12x30"):
        psnr(small[:0], small[:0])


def test_measure_takes_the_mean_of_what_is_asked(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert measure(*pair, names=["ssim_y"]) == {"ssim_y": pytest.approx(float(ssim_y(*pair).mean()), abs=1e-12)}
    with pytest.raises(SettingError, match=r"'ssim'.*psnr_y"):
        measure(*pair, names=["ssim"])


def test_table_is_aligned_with_digits_per_metric() -> None:
    text = table(
        {
            "bicubic": {"psnr_y": 28.4567, "ssim_y": 0.81234},
            "dc-vsr, lite": {"psnr_y": 9.5, "ssim_y": 0.9, "seam": 1.0},
        }
    )
    assert text.splitlines() == [
        "method        psnr_y  ssim_y   seam",
        "bicubic        28.46  0.8123      -",
        "dc-vsr, lite    9.50  0.9000  1.000",
    ]
    assert table({"same": {"psnr": math.inf}}).split() == ["method", "psnr", "same", "inf"]
