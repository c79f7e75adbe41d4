"""How good a result is: functions of (result, truth) in a table, each giving one value per frame."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .errors import SettingError

MetricFunction = Callable[[Tensor, Tensor], Tensor]
"""(result, truth), both (frames, 3, h, w) RGB in [0, 1] -> (frames,), float64 where the device has it."""

_SSIM_TAPS = 11
_SSIM_SIGMA = 1.5


def luma(x: Tensor) -> Tensor:
    """BT.601 studio-swing Y, as MATLAB's `rgb2ycbcr` gives for doubles: not rounded.

    (frames, 3, h, w) RGB in [0, 1] to (frames, 1, h, w) in [16/255, 235/255]. Raises SettingError for other
    shapes.
    """
    if x.ndim != 4 or x.shape[1] != 3:
        raise SettingError(f"luma got {_shape(x)}: expected RGB of (frames, 3, height, width); convert it first")
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


METRICS: dict[str, MetricFunction] = {
    "psnr_y": psnr_y,
    "ssim_y": ssim_y,
    "psnr": psnr,
    "color_drift": color_drift,
}
"""Metrics by name, in the order tables show them."""

DIGITS: dict[str, int] = {"psnr_y": 2, "ssim_y": 4, "psnr": 2, "color_drift": 2}
"""Decimals a table shows per metric; 3 for a column that is not here."""


def measure(result: Tensor, truth: Tensor, names: Iterable[str] | None = None) -> dict[str, float]:
    """Mean over frames of the metrics in `names` (all of METRICS when None): one row of `table`.

    Raises SettingError for a name that is not in METRICS, and for sizes that differ.
    """
    chosen = list(METRICS if names is None else names)
    for name in chosen:
        if name not in METRICS:
            raise SettingError(f"unknown metric {name!r}: expected one of {', '.join(METRICS)}")
    return {name: float(METRICS[name](result, truth).mean()) for name in chosen}


def table(rows: dict[str, dict[str, float]]) -> str:
    """Plain text, one line per method and one aligned column per metric; "-" where there is no value."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [["method", *columns]]
    lines += [[method, *(_cell(name, row) for name in columns)] for method, row in rows.items()]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)


def _cell(name: str, row: dict[str, float]) -> str:
    return f"{row[name]:.{DIGITS.get(name, 3)}f}" if name in row else "-"


def _per_frame(metric: Callable[[Tensor, Tensor], Tensor], result: Tensor, truth: Tensor, border: int) -> Tensor:
    """Apply `metric` to each pair of (1, c, h, w) frames without their border, in float64."""
    if result.shape != truth.shape:
        raise SettingError(
            f"cannot compare {_shape(result)} with {_shape(truth)}: expected equal frames, channels, height"
            " and width; bring both to one size first, metrics resize nothing"
        )
    if result.ndim != 4 or result.shape[0] < 1 or border < 0 or min(result.shape[-2:]) <= 2 * border:
        raise SettingError(
            f"cannot measure {_shape(result)} with a border of {border}: expected (frames, channels, height,"
            " width) with pixels left inside the border; use a smaller one"
        )
    # Apple's devices have no float64.
    working = torch.float32 if result.device.type == "mps" else torch.float64
    height, width = result.shape[-2] - 2 * border, result.shape[-1] - 2 * border

    def inside(frame: Tensor) -> Tensor:
        return frame[..., border : border + height, border : border + width].to(working)

    frames = range(result.shape[0])
    return torch.stack([metric(inside(result[i : i + 1]), inside(truth[i : i + 1])) for i in frames])


def _shape(x: Tensor) -> str:
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
