"""A run's pictures: the curve of its loss, and rows of input, result and truth."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vsr_ops.system.outputs import whole
from vsr_ops.views.compare import View, side_by_side

WIDTH, HEIGHT = 960, 480
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 20, 40, 40
_DARK, _PALE, _GRID, _LINE, _FAINT = (16, 18, 24), (225, 228, 235), (48, 52, 62), (70, 190, 255), (40, 74, 98)


def draw_losses(source: Path, target: Path, title: str) -> None:
    """The `loss` column of a CSV as a PNG: every step faint, a running mean bright; logarithmic height."""
    with source.open(newline="") as file:
        rows = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]
    rows = [(step, loss) for step, loss in rows if loss > 0 and math.isfinite(loss)]
    if len(rows) < 2:
        return
    steps, losses = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    smooth = _running_mean(np.log(losses), max(1, len(losses) // 100))
    image = Image.new("RGB", (WIDTH, HEIGHT), _DARK)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(14)
    # The first steps and single outliers would flatten the rest.
    low, high = np.quantile(np.log(losses), (0.002, 0.99))
    high = max(high, low + 1e-3)

    def at(step: float, value: float) -> tuple[float, float]:
        x = _LEFT + (WIDTH - _LEFT - _RIGHT) * (step - steps[0]) / (steps[-1] - steps[0])
        share = (min(max(value, low), high) - low) / (high - low)
        return x, HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * share

    for k in range(6):
        value = low + (high - low) * k / 5
        y = at(steps[0], value)[1]
        draw.line([(_LEFT, y), (WIDTH - _RIGHT, y)], fill=_GRID)
        draw.text((_LEFT - 8, y), f"{math.exp(value):.3g}", fill=_PALE, font=font, anchor="rm")
        step = steps[0] + (steps[-1] - steps[0]) * k / 5
        draw.text((at(step, low)[0], HEIGHT - _BOTTOM + 8), f"{step:.0f}", fill=_PALE, font=font, anchor="mt")
    every = max(1, len(rows) // (2 * WIDTH))
    for values, color, width in ((np.log(losses), _FAINT, 1), (smooth, _LINE, 3)):
        points = [at(step, value) for step, value in zip(steps[::every], values[::every], strict=True)]
        draw.line(points, fill=color, width=width, joint="curve")
    draw.text((_LEFT, _TOP // 2), f"{title}   loss {math.exp(smooth[-1]):.4g}", fill=_PALE, font=font, anchor="lm")
    with whole(target, overwrite=True) as part:
        image.save(part)


def rows_of(columns: Sequence[tuple[str, Tensor]]) -> Tensor:
    """Labelled columns of pictures `(n, 3, h, w)` in [0, 1], one row a picture: `(3, H, W)`."""
    videos = [pictures.detach().float().cpu().clamp(0, 1) for _, pictures in columns]
    wide = side_by_side(videos, [name for name, _ in columns], View())
    return rearrange(wide, "n c h w -> c (n h) w")


def save_picture(path: Path, picture: Tensor) -> None:
    """`(3, h, w)` in [0, 1] as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (picture.clamp(0, 1) * 255).round().byte()
    with whole(path, overwrite=True) as part:
        Image.fromarray(rearrange(pixels, "c h w -> h w c").numpy()).save(part)


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of the last `width` values, of fewer at the start."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(stop - width, 0)
    return (sums[stop] - sums[start]) / (stop - start)
