"""Metrics of time: how a result moves and flickers, one value per pair of neighbouring frames.

The value at k is that of frames k and k+1: n frames give n - 1 values. Flow is OpenCV's DIS, which needs no weights;
the papers use RAFT, so that their figures are of the same kind but not of the same scale.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SettingError
from ..flow.warp import dis_flow, inside, visibility, warp
from .pixels import check_equal, luma, said

STILL = 2 / 255
"""How much the truth's luma may change where it counts as static: rounding, and a codec's breath."""

STATIC_SHARE = 0.01
"""Smallest share of static pixels at which flicker is measured."""


def tof(result: Tensor, truth: Tensor) -> Tensor:
    """Temporal error of optical flow (DC-VSR, equation 13; Chu et al., ACM TOG 39, 2020), in pixels: (n - 1,).

    The L1 norm of flow(result) - flow(truth), |dx| + |dy|, as a mean over pixels instead of the equation's sum: then
    clips of any size and length compare. 0 where both move alike. (n, 3, h, w) RGB in [0, 1]; raises SettingError for
    shapes that differ, a single frame, or frames under 12 pixels a side.
    """
    _check(result, truth)
    moved, true = (dis_flow(x[:-1], x[1:]) for x in (result, truth))
    return _exact((moved - true).abs().sum(1).mean((1, 2)))


def warp_error(result: Tensor, truth: Tensor) -> Tensor:
    """How much the result changes along the truth's motion, in 1/255: (n - 1,); shapes and errors as `tof`.

    The next frame of the result is warped onto the current one by the flow of the truth (Lai et al., ECCV 2018, with
    the absolute difference in place of its square); pixels that are covered in one of the two do not count. NaN where
    none is left. Warping interpolates, so that even a perfect result is a little above 0.
    """

    _check(result, truth)
    forward = dis_flow(truth[:-1], truth[1:])
    return warp_error_along(result[:-1], result[1:], forward, visibility(forward, dis_flow(truth[1:], truth[:-1])))


def warp_error_along(now: Tensor, after: Tensor, forward: Tensor, visible: Tensor) -> Tensor:
    """Mean of |`after` warped by `forward` - `now`| where `visible`, in 1/255, frame by frame: (n,).

    Frames (n, 3, h, w), flow (n, 2, h, w) from `now` to `after`, `visible` (n, 1, h, w).
    """
    values: list[Tensor] = []
    for i in range(len(now)):
        part = slice(i, i + 1)
        seen = visible[part] * inside(forward[part])
        apart = (warp(after[part].float(), forward[part]) - now[part].float()).abs().mean(1, keepdim=True)
        values.append(255 * (apart * seen).sum() / seen.sum())
    return _exact(torch.stack(values))


def flicker(result: Tensor, truth: Tensor) -> Tensor:
    """How much the result changes where the truth stands still, in 1/255: (n - 1,); shapes and errors as `tof`.

    Mean absolute difference of neighbouring frames of the result over pixels in whose 5x5 neighbourhood the luma of
    the truth changes by no more than 2/255. NaN where under 1 % of the picture stands still.
    """

    _check(result, truth)
    values: list[Tensor] = []
    for i in range(len(result) - 1):
        y, frames = luma(truth[i : i + 2].float()), result[i : i + 2].float()
        static = static_pixels(y)
        moved = (frames[1:] - frames[:1]).abs().mean(1, keepdim=True)
        enough = bool(static.float().mean() >= STATIC_SHARE)
        values.append(255 * moved[static].mean() if enough else moved.new_tensor(torch.nan))
    return _exact(torch.stack(values))


def static_pixels(luma: Tensor) -> Tensor:
    """Where nothing moves from each frame of `luma` (n, 1, h, w) to the next: (n - 1, 1, h, w), True or False.

    In the 5x5 neighbourhood of such a pixel no value changes by more than STILL.
    """
    change = F.max_pool2d((luma[1:] - luma[:-1]).abs(), 5, stride=1, padding=2)
    # Half a level more, since luma of 8-bit colours is not rounded.
    return change <= STILL + 0.5 / 255


def _check(result: Tensor, truth: Tensor) -> None:
    check_equal(result, truth)
    if result.ndim != 4 or result.shape[1] != 3 or len(result) < 2:
        raise SettingError(
            f"cannot measure change over time in {said(result)}: expected at least two RGB frames (frames, 3, height,"
            " width); leave this metric out for single pictures"
        )


def _exact(values: Tensor) -> Tensor:
    """In float64, which Apple's devices lack."""
    return values if values.device.type == "mps" else values.double()
