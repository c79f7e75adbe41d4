"""Losses as plain functions of `(..., channels, height, width)` tensors; every one is a mean, in float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vsr_ops.flow.warp import dis_flow, visibility, warp
from vsr_ops.metrics.time import static_pixels

_EYE = 2.0
"""Variance of the noise that VIF's model of the eye adds."""


def charbonnier(result: Tensor, truth: Tensor, epsilon: float = 1e-3) -> Tensor:
    """Absolute error that is smooth at zero: mean of sqrt(e^2 + epsilon^2)."""
    return ((result.float() - truth.float()).square() + epsilon**2).sqrt().mean()


def frequency(result: Tensor, truth: Tensor) -> Tensor:
    """Mean absolute error of the real and imaginary parts of the orthonormal 2D Fourier transform."""
    spectrum = torch.fft.rfft2(result.float() - truth.float(), norm="ortho")
    return torch.view_as_real(spectrum).abs().mean()


def luma_deviation(result: Tensor, truth: Tensor) -> Tensor:
    """Root mean square error of the luma of each picture `(n, 3, h, w)`, then their mean: what Y-PSNR is about, with
    no picture's weight growing by the square of its error."""
    error = _luma(result.float() - truth.float())
    return (error.square().mean((1, 2, 3)) + 1e-5).sqrt().mean()


def laplacian(x: Tensor, levels: int = 3) -> list[Tensor]:
    """Band-pass images of `(frames, c, h, w)`, finest first; h and w multiples of `2**levels`."""
    bands: list[Tensor] = []
    for _ in range(levels):
        small = F.avg_pool2d(x, 2)
        bands.append(x - F.interpolate(small, scale_factor=2.0, mode="bilinear"))
        x = small
    return bands


def band_error(result: Tensor, truth: Tensor, levels: int = 3) -> Tensor:
    """Sum over the bands of their mean absolute error: fine structure counts as much as coarse."""
    bands = zip(laplacian(result.float(), levels), laplacian(truth.float(), levels), strict=True)
    return torch.stack([(a - b).abs().mean() for a, b in bands]).sum()


def temporal_difference(result: Tensor, truth: Tensor) -> Tensor:
    """Mean absolute error of the change from frame to frame of `(..., frames, c, h, w)`; 0 for one frame."""
    error = (result - truth).float()
    change = error[..., 1:, :, :, :] - error[..., :-1, :, :, :]
    return change.abs().mean() if change.numel() else error.sum() * 0


@dataclass(frozen=True)
class Motion:
    """What moves where in true clips `(frames, 3, h, w)`, from each frame to the next: DIS flow `(frames - 1, 2, h,
    w)`, and (frames - 1, 1, h, w) each: where it can be followed, where nothing moves, and the local contrast."""

    flow: Tensor
    visible: Tensor
    still: Tensor
    contrast: Tensor


@torch.no_grad()
def motion_of(truth: Tensor) -> Motion:
    """Of one clip `(frames, 3, h, w)` in [0, 1], at least two frames; sides of at least 12 pixels."""
    before, after = truth[:-1], truth[1:]
    flow = dis_flow(before, after)
    luma = _luma(truth.float())
    padded = F.pad(luma, [3] * 4, mode="replicate")
    variance = F.avg_pool2d(padded**2, 7, 1) - F.avg_pool2d(padded, 7, 1) ** 2
    still = static_pixels(luma).float()
    return Motion(flow, visibility(flow, dis_flow(after, before)), still, variance[:-1].clamp(min=0).sqrt())


def followed_change(result: Tensor, truth: Tensor, motion: Motion) -> Tensor:
    """Mean change of the error of one clip `(frames, 3, h, w)` along the truth's motion, where it can be followed.

    Relative to the truth's local contrast plus 0.03: what wobbles in a faint texture misleads the eye, and an optical
    flow, as much as what wobbles in a strong one. An error that moves with its object costs nothing.
    """
    error = (result - truth).float()
    change = (warp(error[1:], motion.flow) - error[:-1]).abs().mean(1, keepdim=True)
    return (change * motion.visible / (motion.contrast + 0.03)).mean()


def flicker(result: Tensor, motion: Motion) -> Tensor:
    """Mean change of a clip `(frames, 3, h, w)` where the truth stands still; elsewhere nothing counts."""
    change = (result[1:] - result[:-1]).float().abs().mean(1, keepdim=True)
    return (change * motion.still).mean()


def information(result: Tensor, truth: Tensor) -> Tensor:
    """The share of the truth's luma information that the result lost, of RGB `(frames, 3, h, w)` in [0, 1].

    After VIF in the pixel domain (Sheikh and Bovik 2006, equations 6-15): within local windows the result is a gain
    times the truth, plus noise; the eye adds noise of variance 2 (luma to 255). As in VMAF-NEG, a gain above 1 earns
    nothing. Box windows of 9, 5 and 3 pixels at full, half and quarter size. 0 for equal pictures (to within the
    stabilising terms), 1 where nothing is left, and where the truth has no structure at all.
    """
    x, y = (255 * _luma(pictures.float()) for pictures in (result, truth))
    lost: list[Tensor] = []
    for window in (9, 5, 3):
        mean_x, mean_y = F.avg_pool2d(x, window, 1), F.avg_pool2d(y, window, 1)
        variance_x = F.avg_pool2d(x * x, window, 1) - mean_x**2
        variance_y = (F.avg_pool2d(y * y, window, 1) - mean_y**2).clamp(min=0)
        covariance = F.avg_pool2d(x * y, window, 1) - mean_x * mean_y
        gain = (covariance / (variance_y + 1e-3)).clamp(0, 1e3)
        noise = (variance_x - gain * covariance).clamp(min=1e-3)
        kept = torch.log1p(gain.clamp(max=1) ** 2 * variance_y / (noise + _EYE)).sum()
        lost.append(1 - kept / (torch.log1p(variance_y / _EYE).sum() + 1e-3))
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return torch.stack(lost).mean()


def _luma(rgb: Tensor) -> Tensor:
    return 0.299 * rgb[:, :1] + 0.587 * rgb[:, 1:2] + 0.114 * rgb[:, 2:]


def psnr(result: Tensor, truth: Tensor, peak: float = 1.0) -> float:
    """Over all values, in dB; what the progress bar shows, not a metric."""
    mse = (result.detach().float() - truth.float()).square().mean().item()
    return float(10 * torch.log10(torch.tensor(peak**2 / max(mse, 1e-12))))
