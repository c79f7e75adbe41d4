"""Moving crops of photographs: pan, zoom, roll, perspective, a hand's shake, and two layers in parallax.

A path is drawn once per clip and then rendered. Positions are pixels of the photograph, pixel centres on whole
numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from training.loop.draws import uniform
from vsr_ops.errors import SettingError
from vsr_ops.image.resize import resize_bicubic


@dataclass(frozen=True)
class Path:
    """A camera's motion over a clip, about its middle frame; the default stands still.

    `pan` in pixels a frame (x, y); `zoom` is relative growth a frame; `angle` and `roll` are radians and radians
    a frame; `tilt` and `swing` are the perspective at the crop's edge (x, y) and its change a frame; `shake` is
    (pixels, radians a frame, phase in x, phase in y).
    """

    pan: tuple[float, float] = (0, 0)
    zoom: float = 0
    angle: float = 0
    roll: float = 0
    tilt: tuple[float, float] = (0, 0)
    swing: tuple[float, float] = (0, 0)
    shake: tuple[float, float, float, float] = (0, 0, 0, 0)


def draw_path(rng: torch.Generator, speed: float) -> Path:
    """A path that pans up to `speed` pixels a frame."""

    def pair(limit: float) -> tuple[float, float]:
        return uniform(rng, -limit, limit), uniform(rng, -limit, limit)

    angle, roll = (math.radians(uniform(rng, -limit, limit)) for limit in (4, 0.4))
    shaky = uniform(rng, 0, 1) < 0.3
    shake = (uniform(rng, 0, 1) * shaky, uniform(rng, 0.5, 2.5), uniform(rng, 0, 6.28), uniform(rng, 0, 6.28))
    return Path(pair(speed), uniform(rng, -0.012, 0.012), angle, roll, pair(0.06), pair(0.004), shake)


def positions(path: Path, frames: int, size: int) -> Tensor:
    """Where each pixel of a `size` crop looks, about the crop's middle: `(frames, size, size, 2)` as x, y."""
    time = (torch.arange(frames) - (frames - 1) / 2)[:, None, None]
    axis = torch.arange(size) - (size - 1) / 2
    v, u = (each[None] for each in torch.meshgrid(axis, axis, indexing="ij"))
    depth = 1 + sum((t + s * time) * w * 2 / size for t, s, w in zip(path.tilt, path.swing, (u, v), strict=True))
    grow = (1 + path.zoom * time) / depth
    cos, sin = torch.cos(path.angle + path.roll * time), torch.sin(path.angle + path.roll * time)
    reach, pace, phase_x, phase_y = path.shake
    x = grow * (cos * u - sin * v) + path.pan[0] * time + reach * torch.sin(pace * time + phase_x)
    y = grow * (sin * u + cos * v) + path.pan[1] * time + reach * torch.sin(pace * time + phase_y)
    return torch.stack([x.expand(frames, size, size), y.expand(frames, size, size)], dim=-1)


def render(photo: Tensor, grid: Tensor) -> Tensor:
    """`photo` (c, h, w) in [0, 1] at `grid` (frames, size, size, 2) of pixel positions, bicubic, in [0, 1]."""
    scale = 2 / torch.tensor([photo.shape[-1], photo.shape[-2]])
    unit = (grid + 0.5) * scale - 1
    source = photo.expand(len(grid), -1, -1, -1)
    return F.grid_sample(source, unit, "bicubic", padding_mode="reflection", align_corners=False).clamp(0, 1)


def view(photo: Tensor, grid: Tensor, rng: torch.Generator, zoom_out: float = 3.0) -> Tensor:
    """Place a path's positions somewhere on `photo` (3, h, w) uint8 and render them.

    The photograph is first cut to what is seen and shrunk (antialiased) by a random factor up to `zoom_out` that
    it has room for: a magnified one would be a soft ground truth. One that is too small is magnified.
    """
    low, high = grid.amin((0, 1, 2)), grid.amax((0, 1, 2))
    extent = (high - low + 2).tolist()
    room = min((photo.shape[-1] - 1) / extent[0], (photo.shape[-2] - 1) / extent[1])
    density = min(math.exp(uniform(rng, math.log(0.9), math.log(max(0.9, min(room, zoom_out))))), room)
    width, height = (min(math.ceil(each * density), n) for each, n in zip(extent, photo.shape[:0:-1], strict=True))
    left = round(uniform(rng, 0, photo.shape[-1] - width))
    top = round(uniform(rng, 0, photo.shape[-2] - height))
    patch = photo[:, top : top + height, left : left + width].float() / 255
    if density > 1:
        target = (max(1, round(height / density)), max(1, round(width / density)))
        patch, density = resize_bicubic(patch[None], target)[0].clamp(0, 1), 1.0
    middle = torch.tensor([patch.shape[-1] - 1, patch.shape[-2] - 1]) / 2
    return render(patch, (grid - (low + high) / 2) * density + middle)


def camera_clip(photo: Tensor, frames: int, size: int, rng: torch.Generator, speed: float = 3.0) -> Tensor:
    """A random path over one photograph `(3, h, w)` uint8: `(frames, 3, size, size)` in [0, 1]."""
    return view(photo, positions(draw_path(rng, speed), frames, size), rng)


def draw_mask(rng: torch.Generator, side: int) -> Tensor:
    """A soft-edged random blob, `(1, side, side)` in [0, 1], covering a fifth to a half."""
    if side < 1:
        raise SettingError(f"a mask of {side} pixels cannot be drawn: expected 1 or more")
    coarse = torch.rand(1, 1, 5, 5, generator=rng)
    field = F.interpolate(coarse, (side, side), mode="bicubic", align_corners=False)[0]
    level = field.flatten().quantile(uniform(rng, 0.5, 0.8))
    slope = 4 * field.std() / max(side, 2)
    return torch.sigmoid((field - level) / (slope * uniform(rng, 0.3, 1.2)).clamp(min=1e-6))


def composite(back: Tensor, front: Tensor, mask: Tensor) -> Tensor:
    """`front` where `mask` is 1, `back` where it is 0, all `(frames, ..., h, w)` in [0, 1]."""
    return back + mask * (front - back)


def parallax_clip(
    back: Tensor, front: Tensor, frames: int, size: int, rng: torch.Generator, speed: float = 3.0
) -> Tensor:
    """Two layers that move differently: `front`, cut by a soft mask that moves with it, over `back`.

    Both are `(3, h, w)` uint8 and may be the same photograph; the front moves up to twice as fast.
    """
    near = positions(draw_path(rng, 2 * speed), frames, size)
    behind = camera_clip(back, frames, size, rng, speed)
    low, high = near.amin((0, 1, 2)), near.amax((0, 1, 2))
    side = int((high - low).max().ceil()) + 2
    mask = render(draw_mask(rng, side), near - (low + high) / 2 + (side - 1) / 2)
    return composite(behind, view(front, near, rng), mask)
