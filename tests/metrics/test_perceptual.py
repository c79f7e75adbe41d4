"""VMAF, GMSD, HaarPSI, pyiqa's; and that every metric moves the right way under blur, noise, seams and flicker."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.ndimage import convolve
from skimage.color import rgb2yiq
from skimage.data import chelsea
from torch import Tensor

from vsr_ops.cli.demo_clip import camera_path
from vsr_ops.errors import SettingError
from vsr_ops.image.resize import quantize8, resize_bicubic
from vsr_ops.metrics import perceptual
from vsr_ops.metrics.perceptual import gmsd, haarpsi, tlp, vmaf, vmaf_neg
from vsr_ops.metrics.seams import Borders
from vsr_ops.metrics.table import METRICS, luma, missing, seams

HEIGHT, WIDTH = 96, 160
BORDERS = Borders((48,), (40, 80, 120))
PYIQA = ("lpips", "dists", "tlp", "niqe", "musiq", "maniqa", "clipiqa")


@pytest.fixture(scope="module")
def truth() -> Tensor:
    """Eleven frames: the left half of a photograph stands still, the right half moves. 8 bit."""
    photo = torch.from_numpy(chelsea()).permute(2, 0, 1).float() / 255
    moving = camera_path(photo, 11, HEIGHT, WIDTH)
    moving[..., : WIDTH // 2] = moving[5, ..., : WIDTH // 2]
    return quantize8(moving)


def blurred(x: Tensor, amount: float) -> Tensor:
    size = (round(HEIGHT / amount), round(WIDTH / amount))
    return resize_bicubic(resize_bicubic(x, size), (HEIGHT, WIDTH))


def noisy(x: Tensor, amount: float) -> Tensor:
    return x + amount * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


def seamed(x: Tensor, amount: float) -> Tensor:
    """Every other tile is brighter."""
    rows = torch.bucketize(torch.arange(HEIGHT), torch.tensor(BORDERS.rows), right=True)
    cols = torch.bucketize(torch.arange(WIDTH), torch.tensor(BORDERS.cols), right=True)
    return x + amount * ((rows[:, None] + cols) % 2)


def flickering(x: Tensor, amount: float) -> Tensor:
    return x + amount * (0.5 + torch.arange(len(x)) % 2).view(-1, 1, 1, 1)


WORSE: list[tuple[Callable[[Tensor, float], Tensor], tuple[float, float], str]] = [
    (blurred, (2, 4), "psnr_y psnr ssim_y vmaf vmaf_neg gmsd haarpsi tof"),
    (noisy, (0.01, 0.05), "psnr_y psnr ssim_y vmaf vmaf_neg gmsd haarpsi tof warp_error flicker"),
    (seamed, (0.01, 0.06), "psnr_y psnr ssim_y gmsd haarpsi seam"),
    (flickering, (0.01, 0.06), "psnr_y psnr warp_error flicker color_drift"),
]


@pytest.mark.parametrize(
    ("distortion", "amounts", "name"),
    [(distortion, amounts, name) for distortion, amounts, names in WORSE for name in names.split()],
)
def test_metrics_move_the_right_way(
    distortion: Callable[[Tensor, float], Tensor], amounts: tuple[float, float], name: str, truth: Tensor
) -> None:
    clip = truth[:4]
    metric = seams(BORDERS) if name == "seam" else METRICS[name]
    results = [clip, *(quantize8(distortion(clip, amount).clamp(0, 1)) for amount in amounts)]
    equal, little, much = (float(metric(result, clip).nanmean()) for result in results)
    assert metric.best([equal, little, much]) == equal and metric.best([little, much]) == little
    assert len({equal, little, much}) == 3


@pytest.mark.parametrize("metric", [vmaf, vmaf_neg])
def test_vmaf_of_a_clip_with_itself(metric: Callable[[Tensor, Tensor], Tensor], truth: Tensor) -> None:
    assert float(metric(truth, truth).min()) > 97


@pytest.mark.parametrize(("metric", "neg"), [(vmaf, False), (vmaf_neg, True)])
def test_vmaf_in_chunks_is_that_of_the_whole_clip(
    metric: Callable[[Tensor, Tensor], Tensor], neg: bool, truth: Tensor
) -> None:
    from vmaf_torch import VMAF

    result = quantize8(blurred(truth, 3).clamp(0, 1))
    y_truth, y_result = ((luma(x) * 255).round() for x in (truth, result))
    whole = VMAF(NEG=neg, clip_score=True)(y_truth, y_result)[:, 0].double()
    chunked = metric(result, truth)
    assert len(truth) > 8 and chunked.shape == (len(truth),)
    assert float((chunked - whole).abs().max()) < 1e-3
    # The motion of neighbouring frames counts: without it the frame at the seam of two chunks has another value.
    alone = metric(result[8:], truth[8:])
    assert abs(float(alone[0] - whole[8])) > 0.1


def test_sharpening_raises_vmaf_more_than_vmaf_neg(truth: Tensor) -> None:
    clip = truth[:3]
    soft = blurred(clip, 4)
    sharp = quantize8((soft + 1.5 * (soft - blurred(soft, 8))).clamp(0, 1))
    gain, gain_neg = (float((m(sharp, clip) - m(soft, clip)).mean()) for m in (vmaf, vmaf_neg))
    assert gain > gain_neg + 3


def test_vmaf_knows_which_is_the_truth(truth: Tensor) -> None:
    """Adding contrast to the truth costs nothing in VMAF; taking it from the truth does."""
    clip = truth[:3]
    flat = quantize8(0.5 + 0.7 * (clip - 0.5))
    assert float(vmaf(clip, flat).mean()) > float(vmaf(flat, clip).mean()) + 10


def test_gmsd_is_its_paper_s(truth: Tensor) -> None:
    """Xue et al., equations 4 to 6, with scipy: averaged and halved luma, Prewitt gradients, T = 170."""
    result = quantize8(blurred(truth, 2).clamp(0, 1))
    prewitt = np.array([[1, 0, -1]] * 3) / 3

    def gradient(frame: Tensor) -> np.ndarray:
        y = rgb2yiq(frame.permute(1, 2, 0).double().numpy())[..., 0] * 255
        y = y.reshape(HEIGHT // 2, 2, WIDTH // 2, 2).mean((1, 3))
        return np.hypot(*(convolve(y, kernel, mode="constant") for kernel in (prewitt, prewitt.T)))

    for ours, r, t in zip(gmsd(result, truth)[:3], result, truth, strict=False):
        x, y = gradient(r), gradient(t)
        assert abs(float(ours) - ((2 * x * y + 170) / (x * x + y * y + 170)).std()) < 1e-4


def test_gmsd_and_haarpsi_of_equal_clips(truth: Tensor) -> None:
    assert gmsd(truth, truth).abs().max() < 1e-6
    assert (haarpsi(truth, truth) - 1).abs().max() < 1e-6


def test_haarpsi_sees_colour_and_stays_in_its_range(truth: Tensor) -> None:
    grey = truth.mean(1, keepdim=True).expand_as(truth)
    values = haarpsi(grey, truth)
    assert values.shape == (len(truth),) and float(values.min()) > 0 and float(values.max()) < 0.95


def test_tlp_is_the_difference_of_the_distances(monkeypatch: pytest.MonkeyPatch, truth: Tensor) -> None:
    """DC-VSR equation 14 with the mean absolute difference in the place of LPIPS, which needs weights."""
    asked: list[str] = []
    monkeypatch.setattr(
        perceptual, "with_truth", lambda name: asked.append(name) or (lambda a, b: (a - b).abs().mean((1, 2, 3)))
    )
    clip = truth[:4]
    change = (clip[1:] - clip[:-1]).abs().mean((1, 2, 3))
    assert tlp(clip, clip).tolist() == [0.0, 0.0, 0.0] and asked == ["lpips"] and float(change.min()) > 0
    # A result that stands still lacks all of the change; one of half the contrast half of it.
    assert torch.allclose(tlp(clip[:1].expand(4, -1, -1, -1), clip), 100 * change)
    assert torch.allclose(tlp(clip / 2, clip), 50 * change)


@pytest.mark.parametrize("metric", [vmaf, gmsd, haarpsi])
def test_tiny_frames_are_refused(metric: Callable[[Tensor, Tensor], Tensor]) -> None:
    small = torch.rand(2, 3, 24, 40)
    with pytest.raises(SettingError, match=r"2x3x24x40.*at least 32x32"):
        metric(small, small)


@pytest.mark.skipif(importlib.util.find_spec("pyiqa") is not None, reason="pyiqa is installed")
@pytest.mark.parametrize("name", PYIQA)
def test_without_pyiqa_one_line_says_so(name: str) -> None:
    assert missing(name).startswith("package pyiqa is not installed") and "\n" not in missing(name)
    x = torch.rand(2, 3, 64, 64)
    with pytest.raises(SettingError, match="package pyiqa is not installed"):
        METRICS[name](x, x)


def test_dover_is_named_as_what_pyiqa_lacks() -> None:
    x = torch.rand(2, 3, 64, 64)
    assert "pyiqa has no DOVER" in missing("dover")
    with pytest.raises(SettingError, match="pyiqa has no DOVER"):
        METRICS["dover"](x, x)


def test_names_and_directions_are_pyiqa_s() -> None:
    configs = pytest.importorskip("pyiqa.default_model_configs").DEFAULT_CONFIGS
    for name in PYIQA:
        if name != "tlp":
            assert configs[name].get("lower_better", False) is not METRICS[name].higher
            assert (configs[name]["metric_mode"] == "FR") is METRICS[name].truth
