"""How good a result is: one table of metrics, each a function of (result, truth), and the plain table of their means.

    METRICS["psnr_y"](result, truth)        # one value per frame
    measure(result, truth, ["psnr_y"])      # their mean
    missing("lpips")                        # "" or one line on what is not installed

`vsr_ops.metrics.evaluate` measures folders of clips and long videos with the same table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..errors import SettingError
from .perceptual import (
    gmsd,
    haarpsi,
    missing_dover,
    missing_package,
    missing_pyiqa,
    no_dover,
    tlp,
    vmaf,
    vmaf_neg,
    with_truth,
    without_truth,
)
from .pixels import check_equal, color_drift, luma, psnr, psnr_y, ssim_y
from .seams import Borders, seam_ratio
from .time import flicker, tof, warp_error

__all__ = [
    "METRICS",
    "QUICK",
    "Metric",
    "MetricFunction",
    "chosen",
    "color_drift",
    "luma",
    "measure",
    "missing",
    "psnr",
    "psnr_y",
    "seams",
    "ssim_y",
    "table",
]

MetricFunction = Callable[[Tensor, Tensor], Tensor]
"""(result, truth), both (frames, 3, h, w) RGB in [0, 1] -> one value per frame, or per pair of neighbours."""


def _nothing() -> str:
    return ""


@dataclass(frozen=True)
class Metric:
    """A metric and how to show it; call it as its function.

    `higher`: larger is better; with a `target`, nearer to it is. `pairs`: its values are those of neighbouring frames,
    one fewer than frames. `context`: frames on each side that a frame's value depends on. `truth`: it compares with
    the truth. `cropped`: a border may be cut off first. `missing` gives one line on what is not installed, or nothing.
    """

    name: str
    label: str
    digits: int
    higher: bool
    function: MetricFunction
    note: str
    pairs: bool = False
    context: int = 0
    truth: bool = True
    cropped: bool = True
    target: float | None = None
    missing: Callable[[], str] = _nothing

    @property
    def arrow(self) -> str:
        """Which way is better, for tables."""
        return f"→{self.target:g}" if self.target is not None else "↑" if self.higher else "↓"

    @property
    def aim(self) -> str:
        """The same in words, for pictures: Pillow's font has no arrows."""
        return (
            f"{self.target:g} is best"
            if self.target is not None
            else f"{'higher' if self.higher else 'lower'} is better"
        )

    def best(self, values: Iterable[float]) -> float:
        """The best of some values; NaN where there is none."""
        numbers = [value for value in values if not math.isnan(value)]
        target = self.target
        if target is not None:
            return min(numbers, key=lambda value: abs(value - target), default=math.nan)
        return max(numbers, default=math.nan) if self.higher else min(numbers, default=math.nan)

    def __call__(self, result: Tensor, truth: Tensor) -> Tensor:
        """Values of (result, truth), both (frames, 3, h, w) RGB in [0, 1]; raises SettingError.

        Without a truth, for a metric that needs none, give the result twice.
        """
        check_equal(result, truth)
        return self.function(result, truth)


def seams(borders: Borders | None) -> Metric:
    """The metric "seam" for tiles with these borders; None: it says that it needs them."""

    def function(result: Tensor, truth: Tensor) -> Tensor:
        if borders is None:
            raise SettingError("seam: no tiles were given: expected the tiles of the result; name their size")
        return seam_ratio(result, truth, borders)

    note = "gradients at tile borders over those beside them, over the truth's own"
    lacking = "no tiles were given: name the tiles that the result was made with"
    return Metric(
        "seam",
        "seams",
        3,
        False,
        function,
        note,
        cropped=False,
        target=1.0,
        missing=_nothing if borders is not None else lambda: lacking,
    )


def _vmaf_torch() -> str:
    return missing_package("vmaf_torch", "vmaf-torch")


def _piq() -> str:
    return missing_package("piq", "piq")


def _learned(name: str, label: str, digits: int, higher: bool, note: str, truth: bool) -> Metric:
    function = (with_truth if truth else without_truth)(name)
    return Metric(
        name, label, digits, higher, function, f"{note}, by pyiqa", truth=truth, missing=lambda: missing_pyiqa(name)
    )


_ALL = (
    Metric("psnr_y", "PSNR-Y", 2, True, psnr_y, "dB, BT.601 luma, peak 255"),
    Metric("ssim_y", "SSIM-Y", 4, True, ssim_y, "BT.601 luma, 11x11 Gaussian"),
    Metric("psnr", "PSNR", 2, True, psnr, "dB, RGB"),
    Metric("vmaf", "VMAF", 2, True, vmaf, "v0.6.1, 0 to 100", context=1, missing=_vmaf_torch),
    Metric(
        "vmaf_neg", "VMAF-NEG", 2, True, vmaf_neg, "VMAF without credit for sharpening", context=1, missing=_vmaf_torch
    ),
    Metric("gmsd", "GMSD", 4, False, gmsd, "luma gradients", missing=_piq),
    Metric("haarpsi", "HaarPSI", 4, True, haarpsi, "RGB, 0 to 1", missing=_piq),
    _learned("lpips", "LPIPS", 4, False, "AlexNet", True),
    _learned("dists", "DISTS", 4, False, "VGG16", True),
    Metric("tof", "tOF", 3, False, tof, "pixels, on DIS flow (the papers use RAFT), mean over pixels", pairs=True),
    Metric("tlp", "tLP x100", 2, False, tlp, "on LPIPS, by pyiqa", pairs=True, missing=lambda: missing_pyiqa("lpips")),
    Metric("warp_error", "warp error", 3, False, warp_error, "1/255, along the truth's DIS flow", pairs=True),
    Metric("flicker", "flicker", 3, False, flicker, "1/255, where the truth stands still", pairs=True),
    seams(None),
    Metric("color_drift", "colour drift", 2, False, color_drift, "1/255, largest channel"),
    _learned("niqe", "NIQE", 3, False, "no truth", False),
    _learned("musiq", "MUSIQ", 2, True, "KonIQ-10k, no truth", False),
    _learned("maniqa", "MANIQA", 4, True, "KonIQ-10k, no truth", False),
    _learned("clipiqa", "CLIP-IQA", 4, True, "no truth", False),
    Metric("dover", "DOVER x100", 2, True, no_dover, "no truth", truth=False, missing=missing_dover),
)

METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}
"""Metrics by name, in the order tables show them."""

QUICK = ("psnr_y", "ssim_y", "psnr", "color_drift")
"""What `measure` takes when it is not told: one value per frame, no other package."""


def chosen(names: Iterable[str] | str) -> list[str]:
    """The names, once each, of a list or of text with commas; raises SettingError for one that is not in METRICS."""
    listed = names.split(",") if isinstance(names, str) else list(names)
    found = list(dict.fromkeys(name.strip() for name in listed if name.strip()))
    for name in found:
        if name not in METRICS:
            raise SettingError(f"unknown metric {name!r}: expected one of {', '.join(METRICS)}")
    if not found:
        raise SettingError(f"no metric was named: expected some of {', '.join(METRICS)}")
    return found


def missing(name: str) -> str:
    """One line on what a metric lacks on this machine; empty where it can be measured."""
    return METRICS[chosen([name])[0]].missing()


def measure(result: Tensor, truth: Tensor, names: Iterable[str] | None = None) -> dict[str, float]:
    """Mean over frames of the metrics in `names` (those of QUICK when None): one row of `table`.

    What a metric leaves out (flicker where nothing stands still) does not count. Raises SettingError for a name that
    is not in METRICS, for sizes that differ, and for a metric whose package is missing.
    """
    return {name: mean(METRICS[name](result, truth)) for name in chosen(QUICK if names is None else names)}


def mean(values: Tensor) -> float:
    """The mean of what is a number; NaN of nothing."""
    return float(values.nanmean())


def written(name: str, value: float) -> str:
    """A value with its metric's decimals, 3 for another; "-" for NaN."""
    digits = METRICS[name].digits if name in METRICS else 3
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Plain text, one line per method and one aligned column per metric; "-" where there is no value."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [["method", *columns]]
    lines += [[method, *(written(name, row.get(name, math.nan)) for name in columns)] for method, row in rows.items()]
    return aligned(lines)


def aligned(lines: list[list[str]], left: int = 1) -> str:
    """Rows of cells as text: the first `left` columns to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    places = [str.ljust] * left + [str.rjust] * (len(widths) - left)
    texts = ["  ".join(put(cell, w) for put, cell, w in zip(places, line, widths, strict=True)) for line in lines]
    return "\n".join(text.rstrip() for text in texts)
