"""Curves over frames as a picture, drawn with Pillow: one panel for each metric, one colour for each method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..errors import SettingError

_PAPER = (255, 255, 255)
_INK = (30, 34, 42)
_PALE = (208, 212, 219)
_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#7f5fc4", "#3d3d3d")
"""Okabe and Ito's palette, which the colour-blind can tell apart, with violet and grey in place of yellow and black."""

_TWICE = 2
"""Drawn at twice the size and halved, for smooth lines."""


@dataclass(frozen=True)
class Panel:
    """One plot: `curves` by name, all of one length; NaN and infinity leave a gap.

    `parts` are (first frame, name) of what the frames belong to, with a line before each.
    """

    title: str
    curves: Mapping[str, Sequence[float]]
    parts: Sequence[tuple[int, str]] = ()


def draw_panels(panels: Sequence[Panel], width: int = 960, height: int = 220) -> Tensor:
    """The panels below each other, under one legend: (3, H, width) RGB in [0, 1], each `height` high.

    Raises SettingError where there is nothing to draw, or the picture is too small for it.
    """
    if not panels or not all(panel.curves for panel in panels):
        raise SettingError("plot got no curves: expected at least one metric and one method; measure something first")
    if width < 200 or height < 80:
        raise SettingError(f"plot is {width}x{height} pixels a panel: expected at least 200x80; use a larger one")
    names = list(dict.fromkeys(name for panel in panels for name in panel.curves))
    colors = {name: _COLORS[k % len(_COLORS)] for k, name in enumerate(names)}
    places = _legend(names, width * _TWICE)
    head = _size() * 2 + places[-1][1] * _size() * 3 // 2
    image = Image.new("RGB", (width * _TWICE, head + height * _TWICE * len(panels)), _PAPER)
    draw = ImageDraw.Draw(image)
    for name, (x, line) in zip(names, places, strict=True):
        y = _size() + line * _size() * 3 // 2
        draw.rectangle((x, y - _size() // 6, x + _size(), y + _size() // 6), fill=colors[name])
        draw.text((x + _size() * 3 // 2, y), name, fill=_INK, font=_font(), anchor="lm")
    for k, panel in enumerate(panels):
        _panel(draw, panel, colors, (0, head + k * height * _TWICE, width * _TWICE, head + (k + 1) * height * _TWICE))
    small = image.resize((width, image.height // _TWICE), Image.Resampling.BOX)
    return rearrange(torch.tensor(np.asarray(small)), "h w c -> c h w").float() / 255


def _panel(draw: ImageDraw.ImageDraw, panel: Panel, colors: Mapping[str, str], box: tuple[int, int, int, int]) -> None:
    size, font = _size(), _font()
    values = [v for curve in panel.curves.values() for v in curve if math.isfinite(v)]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    ticks = _ticks(low, high)
    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    texts = [f"{tick:.{digits}f}" for tick in ticks]
    left = box[0] + size + round(max(font.getlength(text) for text in texts))
    top, right, bottom = box[1] + size * 2, box[2] - size, box[3] - size * 2
    count = max(len(curve) for curve in panel.curves.values())

    def x(frame: float) -> float:
        return left + (right - left) * (frame + 0.5) / count

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - ticks[0]) / (ticks[-1] - ticks[0])

    draw.text((left, box[1] + size // 4), panel.title, fill=_INK, font=font)
    for tick, text in zip(ticks, texts, strict=True):
        draw.line([(left, y(tick)), (right, y(tick))], fill=_PALE, width=_TWICE)
        draw.text((left - size // 3, y(tick)), text, fill=_INK, font=font, anchor="rm")
    stops = [start for start, _ in panel.parts[1:]] + [count]
    for (start, name), stop in zip(panel.parts, stops, strict=False):
        if start:
            draw.line([(x(start - 0.5), top), (x(start - 0.5), bottom)], fill=_INK, width=_TWICE)
        if font.getlength(name) <= x(stop) - x(start):
            draw.text(
                ((x(start - 0.5) + x(stop - 0.5)) / 2, bottom + size // 4), name, fill=_INK, font=font, anchor="ma"
            )
    starts = {start for start, _ in panel.parts}
    for name, curve in panel.curves.items():
        for run in _runs(curve, starts):
            points = [(x(frame), y(curve[frame])) for frame in run]
            if len(points) == 1:
                (px, py), r = points[0], size // 5
                draw.ellipse((px - r, py - r, px + r, py + r), fill=colors[name])
            draw.line(points, fill=colors[name], width=2 * _TWICE, joint="curve")


def _runs(curve: Sequence[float], starts: set[int]) -> list[list[int]]:
    """Frames that one line goes through: unbroken numbers of one part."""
    runs: list[list[int]] = []
    for frame, value in enumerate(curve):
        if not math.isfinite(value):
            continue
        if runs and runs[-1][-1] == frame - 1 and frame not in starts:
            runs[-1].append(frame)
        else:
            runs.append([frame])
    return runs


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers that hold both ends."""
    span = high - low or abs(high) * 0.1 or 1.0
    rough = span / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(times * unit for times in (1, 2, 5, 10) if times * unit >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    return [k * step for k in range(first, last + 1)]


def _legend(names: Sequence[str], width: int) -> list[tuple[int, int]]:
    """Where each name begins and in which line."""
    places: list[tuple[int, int]] = []
    x, line = _size(), 0
    for name in names:
        length = round(_font().getlength(name)) + 3 * _size()
        if x > _size() and x + length > width:
            x, line = _size(), line + 1
        places.append((x, line))
        x += length
    return places


def _size() -> int:
    """Height of the letters as drawn."""
    return 13 * _TWICE


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(_size())
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font
