"""Resizing as MATLAB's imresize does it, and rounding to 8 bit: the baseline of every comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SettingError

ResizeFunction = Callable[[Tensor, tuple[int, int]], Tensor]
"""(x, (h, w)) -> x of that size."""

_BLOCK = 32
"""Output pixels that share one small dense matrix; such a block reads only its own stretch of the input."""


def resize_bicubic(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (frames, c, h, w) to `size` = (h, w), any ratio, as MATLAB's `imresize(x, size, "bicubic")`.

    Keys' cubic (IEEE TASSP 29, 1981; a = -0.5), half-pixel centres, per axis the scale out/in, the kernel
    widened by in/out when shrinking, mirrored borders that repeat the edge pixel. Values may overshoot the
    input's range: nothing is clamped. Float32 maths (float64 for float64), the input's dtype out. An axis
    that keeps its length is left alone, so the same size gives `x` itself. Raises SettingError for a shape,
    dtype or size that cannot work.
    """
    return _resize(x, size, _CUBIC)


def resize_lanczos(x: Tensor, size: tuple[int, int]) -> Tensor:
    """As `resize_bicubic` with Lanczos' kernel of three lobes, `sinc(x) sinc(x/3)`: sharper, and rings more."""
    return _resize(x, size, _LANCZOS)


RESIZE: dict[str, ResizeFunction] = {"bicubic": resize_bicubic, "lanczos": resize_lanczos}
"""Ways to resize by name."""


def resize(name: str, x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize by the way called `name` in RESIZE; raises SettingError, naming the known ones, else."""
    if name not in RESIZE:
        raise SettingError(f"unknown way to resize {name!r}: expected one of {', '.join(RESIZE)}")
    return RESIZE[name](x, size)


def quantize8(x: Tensor) -> Tensor:
    """Clamp to [0, 1] and round to the nearest of the 256 levels k/255; any shape, the input's dtype out."""
    working = torch.promote_types(x.dtype, torch.float32)
    return (x.to(working).clamp(0, 1) * 255).round().div(255).to(x.dtype)


@dataclass(frozen=True)
class _Kernel:
    """Weight by distance in pixels, zero beyond the radius."""

    weight: Callable[[Tensor], Tensor]
    radius: int


def _cubic(x: Tensor) -> Tensor:
    a = x.abs()
    near = (1.5 * a - 2.5) * a * a + 1
    far = ((-0.5 * a + 2.5) * a - 4) * a + 2
    return torch.where(a <= 1, near, torch.where(a <= 2, far, torch.zeros_like(a)))


def _lanczos(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 3, torch.sinc(x) * torch.sinc(x / 3), torch.zeros_like(x))


_CUBIC = _Kernel(_cubic, 2)
_LANCZOS = _Kernel(_lanczos, 3)


def _resize(x: Tensor, size: tuple[int, int], kernel: _Kernel) -> Tensor:
    if x.ndim != 4 or x.shape[-1] < 1 or x.shape[-2] < 1 or not x.is_floating_point():
        raise SettingError(
            f"cannot resize a {x.dtype} tensor of shape {tuple(x.shape)}: expected floating-point"
            " (frames, channels, height, width) with at least one pixel; convert it first"
        )
    if min(size) < 1:
        raise SettingError(f"cannot resize to {size[0]}x{size[1]}: expected a height and width of at least 1 pixel")
    lengths = {-2: (x.shape[-2], size[0]), -1: (x.shape[-1], size[1])}
    changed = {axis: pair for axis, pair in lengths.items() if pair[0] != pair[1]}
    if not changed:
        return x
    # The axis that grows least goes first, as in MATLAB: what lies between the passes is then smaller.
    order = sorted(changed, key=lambda axis: changed[axis][1] / changed[axis][0])
    working = torch.promote_types(x.dtype, torch.float32)
    passes = [(axis, _blocks(*changed[axis], kernel, x.device, working)) for axis in order]
    out = x.new_empty((*x.shape[:2], *size))
    # Frame by frame, so that temporaries do not grow with the clip; no autocast, which cuts precision.
    with torch.autocast(device_type=x.device.type, enabled=False):
        for i in range(x.shape[0]):
            frame = x[i].to(working)
            for axis, blocks in passes:
                frame = _apply(frame, axis, blocks)
            out[i] = frame
    return out


def _taps(n_in: int, n_out: int, kernel: _Kernel) -> tuple[Tensor, Tensor]:
    """Input positions and weights of each output pixel on one axis: (n_out, taps), on the CPU, float64."""
    scale = n_out / n_in
    shrink = min(scale, 1.0)
    radius = kernel.radius / shrink
    # Multiplied before it is divided, so that whole ratios give positions without rounding error.
    centre = (2 * torch.arange(n_out, dtype=torch.float64) + 1) * n_in / (2 * n_out) - 0.5
    first = torch.floor(centre - radius).long()
    position = first[:, None] + torch.arange(int(2 * radius) + 3)
    weight = kernel.weight((centre[:, None] - position) * shrink)
    weight = weight / weight.sum(1, keepdim=True)
    # The mirror, ... 1 0 | 0 1 ... n-1 | n-1 n-2 ..., has period 2n: any reach is covered.
    position = position % (2 * n_in)
    return torch.minimum(position, 2 * n_in - 1 - position), weight


def _blocks(
    n_in: int, n_out: int, kernel: _Kernel, device: torch.device, dtype: torch.dtype
) -> list[tuple[int, int, Tensor]]:
    """The resizing matrix as a band: per block of outputs the input range and its (stop - start, outputs)."""
    blocks: list[tuple[int, int, Tensor]] = []
    position, weight = _taps(n_in, n_out, kernel)
    for i in range(0, n_out, _BLOCK):
        where, value = position[i : i + _BLOCK], weight[i : i + _BLOCK]
        start, stop = int(where.min()), int(where.max()) + 1
        matrix = torch.zeros(len(where), stop - start, dtype=torch.float64)
        matrix.scatter_add_(1, where - start, value)
        blocks.append((start, stop, matrix.T.to(dtype).to(device)))
    return blocks


def _apply(frame: Tensor, axis: int, blocks: list[tuple[int, int, Tensor]]) -> Tensor:
    if axis == -1:
        return torch.cat([frame[..., start:stop] @ matrix for start, stop, matrix in blocks], -1)
    return torch.cat([matrix.T @ frame[..., start:stop, :] for start, stop, matrix in blocks], -2)
