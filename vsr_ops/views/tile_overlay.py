"""A tile plan drawn over its video: the spatial tiles on the frames, the temporal windows on a strip below."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..errors import SettingError
from ..sampling.tiling import Span, TilePlan

_Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels, the last two exclusive."""

_HUES = (0.53, 0.09, 0.33, 0.89, 0.16, 0.62, 0.0, 0.75)
_COLORS = [tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.7, 1.0)) for hue in _HUES]
"""Cyan, orange, green, pink, yellow, blue, red, violet: bright on any photograph."""

_ROW_STEP = 3
"""Tile (row, column) has colour column + 3 * row: all eight around it, and the next ones straight on, differ."""

_PADDING = 8
"""Latents by which a plan is larger than its picture stay below this: the UNet's factor."""

_DARK = (16, 18, 24)
_PALE = (225, 228, 235)
_SHADE = (70, 110, 255)
_SHADE_OPACITY = 24
"""Of 255, per axis along which tiles overlap; a blue, as grey would be lost on dark pictures or on bright ones."""


def draw_plan(plan: TilePlan, frame: Tensor, window: int) -> Tensor:
    """The spatial tiles of `plan` over one picture (3, H, W) in [0, 1]; a new tensor of that shape and dtype.

    Every tile's border is drawn just inside it, in a colour that its neighbours have not; where tiles overlap the
    picture is a little bluer; tiles are numbered from 1 in reading order where the number fits. `window` counts
    from 0 and is named in a corner. H and W are the plan's times one factor, any, less what a latent was padded by
    at the bottom or right: tiles end with the picture. Raises SettingError.
    """
    _check_picture(plan, frame)
    if not 0 <= window < len(plan.windows):
        raise SettingError(f"window is {window}: expected 0 to {len(plan.windows) - 1}, the windows of this plan")
    caption = f"window {window + 1} of {len(plan.windows)}"
    ink, alpha = _layers(_grid(plan, frame.shape[1], frame.shape[2], caption), frame)
    return frame * (1 - alpha) + ink


def timeline(plan: TilePlan, width: int, frame: int | None = None) -> Tensor:
    """A strip (3, h, width) of the temporal windows as bars over the frames, staggered where they overlap.

    Scene cuts are white lines. With `frame`, counted from 0, that frame is marked and the bars without it are dim.
    The height depends on plan and width only and is even. Raises SettingError.
    """
    if width < 1:
        raise SettingError(f"timeline width is {width}: expected at least 1 pixel")
    if frame is not None and not 0 <= frame < plan.frames:
        raise SettingError(f"frame is {frame}: expected 0 to {plan.frames - 1}, the frames of this plan")
    lanes = _lanes([window.span for window in plan.windows])
    size = _font_size(width)
    font, pad, bar = _font(size), max(2, size // 3), size + size // 3
    head = pad + size // 2
    body = head + (max(lanes) + 1) * (bar + pad)
    height = body + sum(font.getmetrics()) + pad
    image = Image.new("RGB", (width, height + height % 2), _DARK)
    draw = ImageDraw.Draw(image)

    def at(moment: float) -> int:
        return pad + round((width - 2 * pad) * moment / plan.frames)

    bars: list[tuple[_Box, tuple[int, ...], str]] = []
    for k, (window, lane) in enumerate(zip(plan.windows, lanes, strict=True)):
        span, top = window.span, head + lane * (bar + pad)
        color = _COLORS[k % len(_COLORS)]
        lit = frame is None or span.start <= frame < span.stop
        box = (at(span.start), top, max(at(span.stop) - 1, at(span.start) + 1), top + bar)
        bars.append((box, color if lit else _dim(color), str(k + 1)))
    for box, color, _ in bars:
        draw.rectangle(_inclusive(box), fill=color)
    for cut in _cuts(plan):
        draw.line([(at(cut), 0), (at(cut), body - 1)], fill=(255, 255, 255), width=max(2, size // 6))
    if frame is not None:
        _mark(draw, at(frame + 0.5), body, size)
    for box, color, text in bars:
        _number(draw, box, text, color, font)
    said = next((text for text in _captions(plan, frame) if font.getlength(text) <= width - 2 * pad), "")
    draw.text((pad, body), said, fill=_PALE, font=font)
    return rearrange(torch.tensor(np.asarray(image)), "h w c -> c h w").float() / 255


def preview(plan: TilePlan, frames: Tensor) -> Tensor:
    """Every frame with its tiles, and the timeline below with that frame marked: (n, 3, H', W), dtype kept.

    `frames` is the plan's whole video (n, 3, H, W) in [0, 1], or one picture of it, (3, H, W) or n = 1, which marks
    nothing unless the plan has one frame. H' - H is even. Raises SettingError.
    """
    video = frames.unsqueeze(0) if frames.ndim == 3 else frames
    if video.ndim != 4 or len(video) not in (1, plan.frames):
        raise SettingError(
            f"preview got {'x'.join(map(str, frames.shape))}: expected the {plan.frames} frames of the plan as"
            f" ({plan.frames}, 3, height, width), or one frame; give the video that was planned for"
        )
    _check_picture(plan, video[0])
    n, _, height, width = video.shape
    ink, alpha = _layers(_grid(plan, height, width, ""), video[0])
    clear = 1 - alpha
    strip = timeline(plan, width).shape[1]
    out = video.new_empty(n, 3, height + strip, width)
    for i in range(n):
        out[i, :, :height] = video[i] * clear + ink
        out[i, :, height:] = timeline(plan, width, i if n == plan.frames else None)
    return out


def _grid(plan: TilePlan, height: int, width: int, caption: str) -> Image.Image:
    """The drawing alone, RGBA on nothing."""
    scale = max(height / plan.height, width / plan.width)
    rows, cols = _pixels(plan.rows, scale, height), _pixels(plan.cols, scale, width)
    down, across = _coverage(rows, height), _coverage(cols, width)
    layer = np.zeros((height, width, 4), np.uint8)
    layer[..., :3] = _SHADE
    layer[..., 3] = _SHADE_OPACITY * ((down[:, None] > 1).astype(np.uint8) + (across > 1))
    image = Image.fromarray(layer)
    draw = ImageDraw.Draw(image)
    line = max(2, round(min(height, width) / 360))
    places = [(r, c) for r in range(len(rows)) for c in range(len(cols))]
    for r, c in places:
        # Tiles of one row share their top edge, those of one column their left one: stepped in, each is seen.
        step = (line * (r % int(down.max())), line * (c % int(across.max())))
        box = _inset((cols[c][0], rows[r][0], cols[c][1], rows[r][1]), *step)
        draw.rectangle(_inclusive(box), outline=(*_color(r, c), 255), width=line)
    size = _font_size(width)
    taken: list[_Box] = []
    if caption:
        # Where it would be wider than half the picture, the picture is worth more.
        _chip(draw, (0, 0, width // 2, height), "bottom left", caption, size, line * 2, _PALE, taken)
    for m, (r, c) in enumerate(places, 1):
        # Past every border that can run along this tile's.
        margin = line * (max(int(down.max()), int(across.max())) + 1)
        box = (cols[c][0], rows[r][0], cols[c][1], rows[r][1])
        corners = ("top left", "top right", "bottom right", "bottom left")
        for corner in corners:
            if _chip(draw, box, corner, str(m), size, margin, _color(r, c), taken):
                break
    return image


def _chip(
    draw: ImageDraw.ImageDraw,
    box: _Box,
    corner: str,
    text: str,
    size: int,
    margin: int,
    color: tuple[int, ...],
    taken: list[_Box],
) -> bool:
    """Dark text on a chip in a corner of `box`; not drawn, and False, where it does not fit or one is there."""
    font, pad = _font(size), max(2, size // 4)
    width, height = round(font.getlength(text)) + 2 * pad, sum(font.getmetrics()) + pad
    left = box[0] + margin if "left" in corner else box[2] - margin - width
    top = box[1] + margin if "top" in corner else box[3] - margin - height
    place = (left, top, left + width, top + height)
    inside = box[0] <= left and box[1] <= top and place[2] <= box[2] and place[3] <= box[3]
    if not inside or any(_meet(place, other) for other in taken):
        return False
    draw.rounded_rectangle(_inclusive(place), radius=pad, fill=(*color, 235))
    draw.text((left + width / 2, top + height / 2), text, fill=(*_DARK, 255), font=font, anchor="mm")
    taken.append(place)
    return True


def _layers(image: Image.Image, like: Tensor) -> tuple[Tensor, Tensor]:
    """RGBA as (colour times opacity (3, H, W), opacity (1, H, W)); exactly 0 where nothing is drawn."""
    pixels = rearrange(torch.tensor(np.asarray(image)), "h w c -> c h w").to(like.device, like.dtype) / 255
    return pixels[:3] * pixels[3:], pixels[3:]


def _lanes(spans: Sequence[Span]) -> list[int]:
    """For each span the first lane in which it meets no earlier one."""
    ends: list[int] = []
    lanes: list[int] = []
    for span in spans:
        lane = next((k for k, end in enumerate(ends) if end <= span.start), len(ends))
        ends[lane : lane + 1] = [span.stop]
        lanes.append(lane)
    return lanes


def _cuts(plan: TilePlan) -> list[int]:
    """The first frames of new scenes."""
    return [new.span.start for old, new in pairwise(plan.windows) if old.scene != new.scene]


def _captions(plan: TilePlan, frame: int | None) -> list[str]:
    """What the strip says, the longest first."""
    scenes = plan.windows[-1].scene + 1
    if frame is None:
        whole = [_count(plan.frames, "frame"), _count(len(plan.windows), "window"), _count(scenes, "scene")]
        return [", ".join(whole[:k]) for k in (3, 2, 1)]
    inside = [k for k, window in enumerate(plan.windows, 1) if window.span.start <= frame < window.span.stop]
    words = [f"frame {frame + 1} of {plan.frames}"]
    words.append(f"window{'s' * (len(inside) > 1)} {', '.join(map(str, inside))} of {len(plan.windows)}")
    words.append(f"scene {plan.windows[inside[0] - 1].scene + 1} of {scenes}")
    return ["   ".join(words[:k]) for k in (3, 2, 1)]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _mark(draw: ImageDraw.ImageDraw, x: int, height: int, size: int) -> None:
    """A line through the bars with a triangle on top."""
    half = max(1, size // 8)
    draw.rectangle((x - half, 0, x + half - 1, height - 1), fill=_DARK)
    draw.line([(x, 0), (x, height - 1)], fill=(255, 255, 255), width=max(1, half))
    draw.polygon([(x - size // 2, 0), (x + size // 2, 0), (x, size // 2)], fill=(255, 255, 255))


def _number(
    draw: ImageDraw.ImageDraw, box: _Box, text: str, color: tuple[int, ...], font: ImageFont.FreeTypeFont
) -> None:
    """The number of a bar in its middle, where it fits; the mark's line stops short of it."""
    x, half = (box[0] + box[2]) / 2, font.getlength(text) / 2 + 2
    if 2 * half > box[2] - box[0]:
        return
    draw.rectangle((round(x - half), box[1], round(x + half), box[3] - 1), fill=color)
    # Dark letters on lit bars, pale ones on dim bars.
    draw.text((x, (box[1] + box[3]) / 2), text, fill=_DARK if max(color) > 127 else _PALE, font=font, anchor="mm")


def _pixels(axis: Sequence[Span], scale: float, length: int) -> list[tuple[int, int]]:
    """The spans of an axis in pixels, ended by the picture, each at least a pixel long."""
    ends = [(min(round(span.start * scale), length - 1), min(round(span.stop * scale), length)) for span in axis]
    return [(start, max(stop, start + 1)) for start, stop in ends]


def _coverage(axis: Sequence[tuple[int, int]], length: int) -> np.ndarray:
    """How many tiles cover each pixel of an axis."""
    counts = np.zeros(length, np.int64)
    for start, stop in axis:
        counts[start:stop] += 1
    return counts


def _color(row: int, column: int) -> tuple[int, ...]:
    return _COLORS[(column + _ROW_STEP * row) % len(_COLORS)]


def _dim(color: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(round(0.35 * c + 0.65 * dark) for c, dark in zip(color, _DARK, strict=True))


def _inset(box: _Box, x: int, y: int) -> _Box:
    """Smaller by x and y on each side, but never by more than a third of the box."""
    x, y = min(x, (box[2] - box[0]) // 3), min(y, (box[3] - box[1]) // 3)
    return box[0] + x, box[1] + y, box[2] - x, box[3] - y


def _inclusive(box: _Box) -> _Box:
    """As Pillow counts."""
    return box[0], box[1], max(box[0], box[2] - 1), max(box[1], box[3] - 1)


def _meet(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _font_size(width: int) -> int:
    """Readable at 512 pixels, and larger where the picture is likely to be shown shrunk."""
    return max(12, round(width / 64))


@lru_cache(maxsize=16)
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _check_picture(plan: TilePlan, frame: Tensor) -> None:
    if frame.ndim != 3 or frame.shape[0] != 3 or frame.numel() == 0 or not frame.is_floating_point():
        raise SettingError(
            f"plan cannot be drawn on a {frame.dtype} tensor of {'x'.join(map(str, frame.shape))}: expected a"
            " floating-point RGB picture (3, height, width); convert it first"
        )
    height, width = frame.shape[1:]
    scale = max(height / plan.height, width / plan.width)
    if max(plan.height - height / scale, plan.width - width / scale) >= _PADDING:
        raise SettingError(
            f"plan of {plan.width}x{plan.height} (width x height) does not fit a picture of {width}x{height}: expected"
            " equal proportions; give the video that was planned for"
        )
