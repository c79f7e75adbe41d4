"""Metrics of pixels: how near a result is to the truth, one value per frame."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import SettingError

_SSIM_TAPS = 11
_SSIM_SIGMA = 1.5


def luma(x: Tensor) -> Tensor:
    """BT.601 studio-swing Y, as MATLAB's `rgb2ycbcr` gives for doubles: not rounded.

    (frames, 3, h, w) RGB in [0, 1] to (frames, 1, h, w) in [16/255, 235/255]. Raises SettingError for other
    shapes.
    """
    if x.ndim != 4 or x.shape[1] != 3:
        raise SettingError(f"luma got {said(x)}: expected RGB of (frames, 3, height, width); convert it first")
    red, green, blue = x.unbind(1)
    return ((65.481 * red + 128.553 * green + 24.966 * blue + 16.0) / 255.0).unsqueeze(1)


def psnr(result: Tensor, truth: Tensor, border: int = 0) -> Tensor:
    """Peak signal-to-noise ratio in dB over all channels, peak 1; `border` pixels are left out on each side.

    (frames,), infinite where equal. Values are taken as they are: quantise first for that of an 8-bit
    picture. Raises SettingError for sizes that differ or a border that leaves nothing.
    """
    return _per_frame(_psnr, result, truth, border)


def psnr_y(result: Tensor, truth: Tensor, border: int = 0) -> Tensor:
    """PSNR in dB of `luma`, peak 255 of 255, as super-resolution papers report it; otherwise as `psnr`."""
    return _per_frame(lambda r, t: _psnr(luma(r), luma(t)), result, truth, border)


def ssim_y(result: Tensor, truth: Tensor, border: int = 0) -> Tensor:
    """SSIM of `luma` on the 8-bit range (Wang et al., IEEE TIP 13, 2004), mean over the valid region.

    11x11 Gaussian, sigma 1.5; (frames,), 1 where equal. Raises SettingError as `psnr` does, and for frames
    under 11 pixels a side.
    """
    return _per_frame(lambda r, t: _ssim(luma(r) * 255, luma(t) * 255), result, truth, border)


def color_drift(result: Tensor, reference: Tensor) -> Tensor:
    """Largest absolute difference of the channels' means, in units of 1/255, per frame; errors as `psnr`."""
    return _per_frame(lambda r, t: (r - t).mean((-2, -1)).abs().max() * 255, result, reference, 0)


def check_equal(result: Tensor, truth: Tensor) -> None:
    """Raises SettingError where the two are not of one shape."""
    if result.shape != truth.shape:
        raise SettingError(
            f"cannot compare {said(result)} with {said(truth)}: expected equal frames, channels, height and width;"
            " bring both to one size first, metrics resize nothing"
        )


def _per_frame(metric: Callable[[Tensor, Tensor], Tensor], result: Tensor, truth: Tensor, border: int) -> Tensor:
    """Apply `metric` to each pair of (1, c, h, w) frames without their border, in float64."""
    check_equal(result, truth)
    if result.ndim != 4 or result.shape[0] < 1 or border < 0 or min(result.shape[-2:]) <= 2 * border:
        raise SettingError(
            f"cannot measure {said(result)} with a border of {border}: expected (frames, channels, height,"
            " width) with pixels left inside the border; use a smaller one"
        )
    # Apple's devices have no float64.
    working = torch.float32 if result.device.type == "mps" else torch.float64
    height, width = result.shape[-2] - 2 * border, result.shape[-1] - 2 * border

    def inside(frame: Tensor) -> Tensor:
        return frame[..., border : border + height, border : border + width].to(working)

    frames = range(result.shape[0])
    return torch.stack([metric(inside(result[i : i + 1]), inside(truth[i : i + 1])) for i in frames])


def said(x: Tensor) -> str:
    """The shape as messages write it."""
    return "x".join(str(length) for length in x.shape)


def _psnr(result: Tensor, truth: Tensor) -> Tensor:
    return -10 * torch.log10((result - truth).square().mean())


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    if min(x.shape[-2:]) < _SSIM_TAPS:
        raise SettingError(
            f"SSIM got frames of {x.shape[-2]}x{x.shape[-1]} inside the border: expected at least"
            f" {_SSIM_TAPS}x{_SSIM_TAPS}; leave it out for frames this small"
        )
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_x, mean_y = _gaussian(x), _gaussian(y)
    # Only the sum of the two variances is needed, so one filter does for both.
    variances = _gaussian(x * x + y * y) - mean_x**2 - mean_y**2
    covariance = _gaussian(x * y) - mean_x * mean_y
    structure = (2 * covariance + c2) / (variances + c2)
    return ((2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1) * structure).mean()


def _gaussian(x: Tensor) -> Tensor:
    """The 11-tap Gaussian on both axes, valid region only."""
    taps = [math.exp(-0.5 * ((i - _SSIM_TAPS // 2) / _SSIM_SIGMA) ** 2) for i in range(_SSIM_TAPS)]
    for axis in (-1, -2):
        length = x.shape[axis] - _SSIM_TAPS + 1
        total = x.narrow(axis, 0, length) * (taps[0] / sum(taps))
        for i in range(1, _SSIM_TAPS):
            total.add_(x.narrow(axis, i, length), alpha=taps[i] / sum(taps))
        x = total
    return x
