"""Give a result the colours of a reference: by statistics (AdaIN) or by low frequencies (wavelet, detail)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from ..errors import SettingError
from .video_tensor import empty_video


class ColorFunction(Protocol):
    """(x, reference, strength) -> x with the colours of the reference; the correction smoothed within scenes."""

    def __call__(
        self, x: Tensor, reference: Tensor, strength: float = 1.0, *, smooth: float = 0.0, cuts: Sequence[int] = ()
    ) -> Tensor: ...


_FLAT = 1e-5
"""Deviation below which a channel is flat: what float32 rounding makes of a constant, never a picture."""


def adain(x: Tensor, reference: Tensor, strength: float = 1.0, smooth: float = 0.0, cuts: Sequence[int] = ()) -> Tensor:
    """Give every frame and channel of `x` the mean and population deviation of the reference's (SDATC, III-E).

    `(x - mu_x) / sigma_x * sigma_ref + mu_ref`. `x` and `reference` are (frames, c, h, w); h and w may
    differ. A flat channel has no deviation to scale: it is moved to the reference's mean with gain 1.
    `strength` in [0, 1] mixes with `x`; 0 returns `x` itself. `smooth` is the standard deviation, in frames,
    of a Gaussian over time on the correction's gain and offset; 0 is off. A colour cast that stays the same
    is then still removed exactly, whatever the scene does. `cuts` are the first frames of new scenes, which
    smoothing keeps apart. The result is not clamped and has the dtype of `x`. Raises SettingError.
    """
    _check_strength(strength)
    _check_videos(x, reference)
    scenes = _scenes(x.shape[0], smooth, cuts)
    if strength == 0:
        return x
    mean, deviation = _statistics(x)
    mean_ref, deviation_ref = _statistics(reference)
    flat = deviation < _FLAT
    gain = (deviation_ref / deviation.masked_fill(flat, 1.0)).masked_fill(flat, 1.0)
    if smooth > 0:
        # The affine map is smoothed, not the statistics: they follow the scene, it follows the colour error.
        offset = _smooth_over_time(mean_ref - gain * mean, smooth, scenes)
        gain = _smooth_over_time(gain, smooth, scenes)
        mean_ref = gain * mean + offset
    gain = 1 + strength * (gain - 1)
    target = mean + strength * (mean_ref - mean)
    out = empty_video(x, x.shape[0], (x.shape[-2], x.shape[-1]))
    for i in range(x.shape[0]):
        out[i] = (x[i].float() - mean[i]) * gain[i] + target[i]
    return out


def wavelet(
    x: Tensor,
    reference: Tensor,
    strength: float = 1.0,
    levels: int = 5,
    smooth: float = 0.0,
    cuts: Sequence[int] = (),
) -> Tensor:
    """High frequencies of `x`, low ones of the reference: `high(x) + low(reference)`, StableSR's colour fix.

    Both (frames, c, h, w) of the same size. `strength` in [0, 1] mixes with `x`; 0 returns `x` itself. `smooth`
    is the standard deviation, in frames, of a Gaussian over time on the correction `low(reference - x)`, ended
    at three deviations; 0 is off. A colour error that stands still is then still removed exactly, one that
    moves with the picture leaves a trace. `cuts` are the first frames of new scenes, which smoothing keeps
    apart. The result is not clamped and has the dtype of `x`. Beyond the result, memory for
    2 * ceil(3 * smooth) + 1 frames. Raises SettingError, naming both sizes when they differ.
    """
    _check_strength(strength)
    _check_videos(x, reference)
    _check_levels(levels)
    if x.shape != reference.shape:
        raise SettingError(
            f"wavelet and detail got {x.shape[-2]}x{x.shape[-1]} and a reference of {reference.shape[-2]}x"
            f"{reference.shape[-1]} (height x width): expected equal sizes; resize the reference or use adain"
        )
    scenes = _scenes(x.shape[0], smooth, cuts)
    if strength == 0:
        return x
    out = empty_video(x, x.shape[0], (x.shape[-2], x.shape[-1]))
    for i, correction in enumerate(_corrections(x, reference, levels, smooth, scenes)):
        out[i] = x[i].float() + strength * correction
    return out


def wavelet_split(x: Tensor, levels: int = 5) -> tuple[Tensor, Tensor]:
    """Split (frames, c, h, w) into (high, low) of the same shape, with high + low = x up to rounding.

    `low` is `x` after `levels` passes of an à-trous blur: [1 2 1]/4 per axis, its taps 1, 2, 4 ... pixels
    apart, borders replicated, as in StableSR's colour fix. Raises SettingError for levels below 1.
    """
    _check_levels(levels)
    high, low = torch.empty_like(x), torch.empty_like(x)
    for i in range(x.shape[0]):
        frame = x[i].float()
        blurred = _low(frame, levels)
        high[i] = frame - blurred
        low[i] = blurred
    return high, low


def correct(
    name: str,
    x: Tensor,
    reference: Tensor,
    strength: float = 1.0,
    smooth: float = 0.0,
    cuts: Sequence[int] = (),
) -> Tensor:
    """Apply the correction called `name` in COLOR; raises SettingError with the known names for another.

    `smooth` is the standard deviation, in frames, of a Gaussian over time on the correction; 0 is off. It never
    reaches across `cuts`, the first frames of new scenes.
    """
    if name not in COLOR:
        raise SettingError(f"unknown colour correction {name!r}: expected one of {', '.join(COLOR)}")
    return COLOR[name](x, reference, strength, smooth=smooth, cuts=cuts)


def correct_clamped(
    name: str,
    x: Tensor,
    reference: Tensor,
    strength: float = 1.0,
    smooth: float = 0.0,
    cuts: Sequence[int] = (),
) -> Tensor:
    """`correct` of an `x` in [0, 1], clamped to that without another copy; `x` itself where nothing is corrected."""
    out = correct(name, x, reference, strength, smooth, cuts)
    return out if out is x else out.clamp_(0, 1)


def _untouched(
    x: Tensor, reference: Tensor, strength: float = 1.0, *, smooth: float = 0.0, cuts: Sequence[int] = ()
) -> Tensor:
    return x


def detail(
    x: Tensor, reference: Tensor, strength: float = 1.0, smooth: float = 0.0, cuts: Sequence[int] = ()
) -> Tensor:
    """`wavelet` with 3 levels: only what is finer than about 8 pixels is the result's, the rest the reference's.

    For x4 that is about what the input cannot hold; for weights whose colours are not to be trusted.
    """
    return wavelet(x, reference, strength, levels=3, smooth=smooth, cuts=cuts)


COLOR: dict[str, ColorFunction] = {"adain": adain, "wavelet": wavelet, "detail": detail, "none": _untouched}
"""Colour corrections by name; each leaves `x` itself at strength 0."""


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population deviation per frame and channel, float32, (frames, c, 1, 1)."""
    pairs = [torch.var_mean(frame.float(), dim=(-2, -1), correction=0, keepdim=True) for frame in x]
    return torch.stack([mean for _, mean in pairs]), torch.stack([variance.sqrt() for variance, _ in pairs])


def _smooth_over_time(values: Tensor, width: float, scenes: Sequence[tuple[int, int]]) -> Tensor:
    """Gaussian over dim 0 of (frames, c, 1, 1); past the ends of a scene the weights are renormalised."""
    # A narrower one reaches no neighbour either, and float32 would divide 0 by 0.
    width = max(width, 1e-3)
    smoothed: list[Tensor] = []
    for start, stop in scenes:
        scene = values[start:stop]
        time = torch.arange(stop - start, device=values.device, dtype=values.dtype)
        weight = torch.exp(-0.5 * ((time[:, None] - time) / width) ** 2)
        weight = weight / weight.sum(1, keepdim=True)
        # A sum and not a matrix product, which reduced-precision modes would round.
        smoothed += [(row.view(-1, 1, 1, 1) * scene).sum(0) for row in weight]
    return torch.stack(smoothed)


def _corrections(
    x: Tensor, reference: Tensor, levels: int, smooth: float, scenes: Sequence[tuple[int, int]]
) -> Iterator[Tensor]:
    """What `wavelet` adds to each frame, (c, h, w) float32, smoothed over the frames of its scene."""
    reach = math.ceil(min(3 * smooth, x.shape[0]))
    weight = [1.0, *(math.exp(-0.5 * (k / smooth) * (k / smooth)) for k in range(1, reach + 1))]
    for start, stop in scenes:
        held: dict[int, Tensor] = {}
        for i in range(start, stop):
            held.pop(i - reach - 1, None)
            near = range(max(start, i - reach), min(stop, i + reach + 1))
            for j in near:
                if j not in held:
                    # high(x) + low(ref) = x + low(ref - x), as the blur is linear: one decomposition, not two.
                    held[j] = _low(reference[j].float() - x[j].float(), levels)
            total = sum(weight[abs(i - j)] for j in near)
            # At reach 0 this is the correction times one: no smoothing changes no bit.
            smoothed = held[i] * (weight[0] / total)
            for j in near:
                if j != i:
                    smoothed.add_(held[j], alpha=weight[abs(i - j)] / total)
            yield smoothed


def _low(frame: Tensor, levels: int) -> Tensor:
    for level in range(levels):
        for axis in (-1, -2):
            frame = _blur(frame, axis, 2**level)
    return frame


def _blur(x: Tensor, axis: int, hole: int) -> Tensor:
    """[1 2 1]/4, taps `hole` pixels apart, edges replicated; as sums of slices, 10x faster than a conv."""
    length = x.shape[axis]
    # Beyond length - 1 both outer taps read edge pixels only, which is what length - 1 gives too.
    reach = min(hole, length - 1)
    if reach == 0:
        return x
    inner = length - reach
    out = x * 0.5
    out.narrow(axis, reach, inner).add_(x.narrow(axis, 0, inner), alpha=0.25)
    out.narrow(axis, 0, reach).add_(x.narrow(axis, 0, 1), alpha=0.25)
    out.narrow(axis, 0, inner).add_(x.narrow(axis, reach, inner), alpha=0.25)
    out.narrow(axis, inner, reach).add_(x.narrow(axis, length - 1, 1), alpha=0.25)
    return out


def _scenes(frames: int, smooth: float, cuts: Sequence[int]) -> list[tuple[int, int]]:
    """(start, stop) of every scene; raises SettingError for cuts or a `smooth` that cannot work."""
    if not (math.isfinite(smooth) and smooth >= 0):
        raise SettingError(f"smooth is {smooth}: expected a width in frames, at least 0; set 0 for no smoothing")
    scenes = list(pairwise((0, *cuts, frames)))
    if any(start >= stop for start, stop in scenes):
        raise SettingError(
            f"scene cuts {list(cuts)} of {frames} frames: expected rising frame numbers inside the video"
        )
    return scenes


def _check_strength(strength: float) -> None:
    if not 0 <= strength <= 1:
        raise SettingError(f"colour strength is {strength}: expected a number from 0 (off) to 1 (full)")


def _check_levels(levels: int) -> None:
    if levels < 1:
        raise SettingError(f"wavelet levels is {levels}: expected at least 1; 5 is usual")


def _check_videos(x: Tensor, reference: Tensor) -> None:
    videos = x.ndim == reference.ndim == 4 and x.numel() > 0 and reference.numel() > 0
    if not videos or x.shape[:2] != reference.shape[:2]:
        raise SettingError(
            f"colour correction got {tuple(x.shape)} and a reference of {tuple(reference.shape)}: expected"
            " (frames, channels, height, width) with equal frames and channels; give one reference per frame"
        )
