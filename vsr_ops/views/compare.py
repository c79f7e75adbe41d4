"""Two or three videos in one picture: side by side, wiped, as a difference, as a slice through time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..errors import SettingError
from ..image.video_tensor import empty_video


@dataclass(frozen=True)
class View:
    """What the modes can be told; each reads its own part.

    `position` in [0, 1] of the wipe: the share of the first video, 1 shows it alone and 0 the last. `sweep`
    takes it from 0 at the first frame to 1 at the last. `gain` multiplies a difference. `row` in [0, 1] is the
    height of the temporal profile's line, 0 at the top.
    """

    position: float = 0.5
    sweep: bool = False
    gain: float = 8.0
    row: float = 0.5


CompareFunction = Callable[[Sequence[Tensor], Sequence[str], View], Tensor]
"""(videos of one shape (n, 3, h, w), their labels, view) -> (n or 1, 3, H, W)."""

_PROFILE_HEIGHT = 64
"""Fewest pixels a slice through time is high: a few frames would be a hairline."""

_HEAT = "000004 1b0c42 4b0c6b 781c6d a52c60 cf4446 ed6925 fb9a06 f7d03c fcffa4"
"""Matplotlib's "inferno" (CC0) at ten even steps: lightness rises evenly, so equal steps look equal."""

_BOX = 0.7
"""How much of the picture a label's box hides."""


def compare(
    mode: str,
    videos: Sequence[Tensor],
    labels: Sequence[str],
    *,
    position: float = 0.5,
    sweep: bool = False,
    gain: float = 8.0,
    row: float = 0.5,
) -> Tensor:
    """One labelled picture per frame, or one for all, of two or three videos (n, 3, h, w) RGB in [0, 1].

    `mode` is a name in COMPARE; the other settings are those of `View`. (n or 1, 3, H, W) in the first video's
    dtype and on its device. An empty label draws none. Raises SettingError for an unknown mode, another number
    of videos, videos that are empty, not RGB or not of one shape, labels that are not one per video, and
    settings out of range.
    """
    if mode not in COMPARE:
        raise SettingError(f"unknown comparison {mode!r}: expected one of {', '.join(COMPARE)}")
    _check_videos(videos, labels)
    for name, share in (("position", position), ("row", row)):
        if not 0 <= share <= 1:
            raise SettingError(f"{name} is {share}: expected a share of the picture from 0 to 1, such as 0.5")
    if not (math.isfinite(gain) and gain > 0):
        raise SettingError(f"gain is {gain}: expected a positive factor, such as 8")
    return COMPARE[mode](videos, labels, View(position, sweep, gain, row))


def side_by_side(videos: Sequence[Tensor], labels: Sequence[str], view: View) -> Tensor:
    """The videos from left to right, whole, a white line between them: (n, 3, h, about w per video)."""
    n, _, h, w = videos[0].shape
    parts = _parts(len(videos), w, _line(h))
    out = empty_video(videos[0], n, (h, parts[-1].stop)).fill_(1)
    for i in range(n):
        for video, label, part in zip(videos, labels, parts, strict=True):
            out[i, :, :, part] = video[i]
            draw_label(out[i, :, :, part], label, _font_size(h))
    return out


def wipe(videos: Sequence[Tensor], labels: Sequence[str], view: View) -> Tensor:
    """The first video left of a white line and the second right of it, with three a band of the second between."""
    n, _, h, w = videos[0].shape
    out = empty_video(videos[0], n, (h, w))
    for i in range(n):
        share = i / (n - 1) if view.sweep and n > 1 else view.position
        edges = [0, *_splits(len(videos), share, w), w]
        for k, (video, label) in enumerate(zip(videos, labels, strict=True)):
            part = slice(edges[k], edges[k + 1])
            out[i, :, :, part] = video[i, :, :, part]
            draw_label(out[i, :, :, part], label, _font_size(h))
        for edge in edges[1:-1]:
            if 0 < edge < w:
                out[i, :, :, max(0, edge - _line(h) // 2) : edge + _line(h) // 2] = 1
    return out


def difference(videos: Sequence[Tensor], labels: Sequence[str], view: View) -> Tensor:
    """A heat map per later video: its mean absolute RGB difference from the first, times `gain`, ending at 1."""
    first, *others = videos
    n, _, h, w = first.shape
    parts = _parts(len(others), w, _line(h))
    out = empty_video(first, n, (h, parts[-1].stop)).fill_(1)
    for i in range(n):
        for video, label, part in zip(others, labels[1:], parts, strict=True):
            error = (video[i].to(first.device).float() - first[i].float()).abs().mean(0)
            out[i, :, :, part] = heat_colors(error * view.gain)
            names = f"{label} vs {labels[0]}: " if label and labels[0] else ""
            draw_label(out[i, :, :, part], f"{names}difference x{view.gain:g}", _font_size(h))
    return out


def temporal_profile(videos: Sequence[Tensor], labels: Sequence[str], view: View) -> Tensor:
    """One row of every frame, time going down, one slice per video under the other: a single picture.

    What stands still is a straight column; flicker is a ripple, a seam in time a step.
    """
    n, _, h, w = videos[0].shape
    y = min(h - 1, int(view.row * h))
    times = math.ceil(_PROFILE_HEIGHT / n)
    parts = _parts(len(videos), n * times, _line(h))
    out = videos[0].new_ones(1, 3, parts[-1].stop, w)
    for video, label, part in zip(videos, labels, parts, strict=True):
        slab = rearrange(out[0, :, part], "c (n times) w -> n times c w", n=n)
        for i in range(n):
            slab[i] = video[i, :, y]
        draw_label(out[0, :, part], label, max(10, min(_font_size(h), n * times // 4)))
    return out


COMPARE: dict[str, CompareFunction] = {
    "side by side": side_by_side,
    "wipe": wipe,
    "difference": difference,
    "temporal profile": temporal_profile,
}
"""Ways to compare by name."""


def heat_colors(values: Tensor) -> Tensor:
    """(h, w) to (3, h, w) RGB in [0, 1]: black at 0 over purple and orange to pale yellow from 1 on, and for NaN."""
    points = torch.tensor([list(bytes.fromhex(color)) for color in _HEAT.split()], device=values.device) / 255
    place = values.float().nan_to_num(1.0).clamp(0, 1) * (len(points) - 1)
    below = place.long().clamp(max=len(points) - 2)
    colors = torch.lerp(points[below], points[below + 1], (place - below).unsqueeze(-1))
    return rearrange(colors, "h w c -> c h w")


def draw_label(part: Tensor, text: str, size: int) -> None:
    """Write one line in white on a dark box into the top left corner of (3, h, w), in place.

    `size` is the font's height in pixels. What does not fit is cut short with an ellipsis, and where no letter
    fits nothing is drawn. The font is Pillow's own: ASCII; other letters show as boxes.
    """
    margin, padding = size // 2, max(2, size // 3)
    mask = _text(text, size, part.shape[-1] - 2 * (margin + padding))
    height, width = (length + 2 * pad for length, pad in zip(mask.shape, (padding // 2, padding), strict=True))
    if mask.shape[1] == 0 or margin + height > part.shape[1]:
        return
    box = part[:, margin : margin + height, margin : margin + width]
    box.mul_(1 - _BOX)
    inner = box[:, padding // 2 : height - padding // 2, padding : width - padding]
    inner.copy_(torch.lerp(inner.float(), torch.ones(()).to(part.device), mask.to(part.device)))


@lru_cache(maxsize=256)
def _text(text: str, size: int, room: int) -> Tensor:
    """How much of each pixel the text covers, (line height, w <= room), w 0 where not even one letter fits."""
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    height = sum(font.getmetrics())
    shown = line = " ".join(text.split())
    kept = len(line)
    while kept > 0 and math.ceil(font.getlength(shown)) > room:
        kept = min(kept - 1, room)
        shown = line[: max(kept, 0)].rstrip() + "…"
    if kept <= 0:
        return torch.zeros(height, 0)
    image = Image.new("L", (math.ceil(font.getlength(shown)), height))
    ImageDraw.Draw(image).text((0, 0), shown, fill=255, font=font)
    return torch.tensor(np.asarray(image)).float() / 255


def _font_size(height: int) -> int:
    return max(10, round(height / 32))


def _line(height: int) -> int:
    """Even, so that even frames stay even: video encoders want that."""
    return 2 * max(1, round(height / 540))


def _parts(count: int, length: int, line: int) -> list[slice]:
    """Where `count` parts of one length lie along an axis with lines between them."""
    return [slice(k * (length + line), k * (length + line) + length) for k in range(count)]


def _splits(count: int, share: float, width: int) -> list[int]:
    """Columns where the next video begins. With three videos the middle band is a third wide and travels through."""
    band = 0.0 if count == 2 else 1 / 3
    lead = share * (1 + band)
    return [round(min(1.0, max(0.0, edge)) * width) for edge in ((lead,) if count == 2 else (lead - band, lead))]


def _check_videos(videos: Sequence[Tensor], labels: Sequence[str]) -> None:
    if len(videos) not in (2, 3):
        raise SettingError(f"comparison got {len(videos)} videos: expected 2 or 3; connect as many")
    if len(labels) != len(videos):
        raise SettingError(f"comparison got {len(labels)} labels for {len(videos)} videos: expected one for each")
    for k, (video, label) in enumerate(zip(videos, labels, strict=True), 1):
        shape = "x".join(map(str, video.shape))
        if video.ndim != 4 or not video.is_floating_point():
            raise SettingError(
                f"input {k} ({label}) is a {video.dtype} tensor of {shape}: expected floating-point RGB of"
                " (frames, 3, height, width); convert it first"
            )
        if video.shape[1] != 3:
            raise SettingError(
                f"input {k} ({label}) has {video.shape[1]} channels: expected the 3 of RGB; remove an alpha"
                " channel, repeat a grey one three times"
            )
        if video.numel() == 0:
            raise SettingError(f"input {k} ({label}) is empty ({shape}): expected at least one frame and one pixel")
    for k, (video, label) in enumerate(zip(videos[1:], labels[1:], strict=True), 2):
        if video.shape == videos[0].shape:
            continue
        todo = "resize one first" if video.shape[2:] != videos[0].shape[2:] else "cut the longer one first"
        raise SettingError(
            f"input 1 ({labels[0]}) is {_said(videos[0])}, input {k} ({label}) is {_said(video)}: expected equal"
            f" sizes; {todo}"
        )


def _said(video: Tensor) -> str:
    return f"{video.shape[0]} frames of {video.shape[3]}x{video.shape[2]} (width x height)"
