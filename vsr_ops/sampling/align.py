"""SDATC's flow-guided alignment: the denoised estimate of a video is made to move as the low-resolution video does.

SDATC equations 12 and 13: the motion error E of latents along the flow, and a step against its gradient, scaled by one
of SCALES; or, instead, values carried along the flow from frame to frame. Either is taken only as far as E falls. Each
scene is a video of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..errors import SettingError
from ..flow.field import Flow, check_fits
from ..flow.warp import warp

HALVINGS = 6
"""How often a step is halved until E falls, before it is left out. An L1 gradient does not shrink near the minimum."""

PAIRS = 8
"""Pairs of frames that are warped together."""

SHARE = 0.5
"""Least share of a latent's pixels that must be visible where sampling is aligned: a single pixel that the flow loses
would else take the whole latent out."""

ROUNDS = 4
"""Most steps against E at each step of sampling. One lowers the warping error of a flickering video by 7 %, four by 10
%, and by 16 % with SHARE (the demo clip, no refiner)."""

_ROUNDING = 1e-6
"""Smaller differences along the flow are the warp's own rounding, and no motion error."""


def motion_error(z: Tensor, flow: Flow) -> float:
    """`alignment_error` as a mean over the visible pixels of all frames and both directions: to compare videos by.

    `z` is (n, c, h, w), `flow` of the same size. 0 where nothing is visible.
    """
    seen = int(flow.visible_now.sum()) + int(flow.visible_next.sum())
    return alignment_error(z, flow) / (seen * z.shape[1]) if seen else 0.0


@torch.no_grad()
def align(
    z: Tensor,
    flow: Flow,
    strength: float,
    v: float,
    mode: str = "gradient",
    rounds: int = 1,
    device: torch.device | None = None,
) -> Tensor:
    """The denoised estimate `z` (n, c, h, w) of a whole video, aligned along `flow` of its size.

    `strength` is lambda, from 0. gradient: z - lambda v dE, with `v` one of SCALES at this noise level. dE is that of
    the sum over visible pixels, so that lambda is how far one difference moves a value, whatever the video's size; the
    step is halved until E falls, else left out. propagate: lambda, up to 1, is the share that a visible pixel takes
    from the frame before along the flow, frame after frame, then back from the frame after; equally halved, whatever
    `v` is. `rounds` is how many such steps are taken, as long as E falls; the paper takes one. `device` is where a
    scene is worked on: z's for None. E never rises. Lambda or v 0, one frame, nothing visible, or nothing to gain
    return `z` itself. Maths in float32, z's dtype out. Raises SettingError for an unknown mode, a lambda that is
    negative or not finite, or a flow that does not fit.
    """
    check_strength(strength, mode)
    check_fits(flow, z.shape[0], z.shape[-2], z.shape[-1], 1)
    if strength == 0 or v == 0:
        return z
    where, out = device or z.device, z
    for start, stop in flow.scenes():
        scene, given = flow.part(start, stop).to(where), z[start:stop].to(where)
        aligned = given
        for _ in range(rounds):
            moved = _fall(aligned, scene, MODES[mode](aligned.float(), scene, strength, v))
            if moved is None:
                break
            aligned = moved
        if aligned is not given:
            out = z.clone() if out is z else out
            out[start:stop] = aligned
    return out


def check_strength(strength: float, mode: str, scale: str = "bounded") -> None:
    """Raises SettingError for an unknown mode or scale, or a lambda or scale that the mode cannot take."""
    if mode not in MODES:
        raise SettingError(f"alignment mode is {mode!r}: expected one of {', '.join(MODES)}; choose one of them")
    if not (strength >= 0 and math.isfinite(strength)):
        raise SettingError(f"lambda is {strength}: expected a finite number from 0 (off) up; use a value such as 0.1")
    if mode == "propagate" and strength > 1:
        raise SettingError(f"lambda is {strength}: expected a share from 0 to 1 in mode propagate; lower it")
    if scale not in SCALES:
        raise SettingError(f"alignment scale is {scale!r}: expected one of {', '.join(SCALES)}; choose one of them")
    if mode == "propagate" and scale != "bounded":
        raise SettingError(
            f"alignment scale is {scale!r} in mode propagate, whose share nothing scales: expected bounded there;"
            " choose it, or mode gradient"
        )


def _fall(z: Tensor, flow: Flow, step: Tensor) -> Tensor | None:
    """`z` + the largest of `step`, half of it, a quarter ... that lowers E; None where none does."""
    before = alignment_error(z, flow)
    for halvings in range(HALVINGS + 1 if before > 0 else 0):
        moved = (z.float() + step * 0.5**halvings).to(z.dtype)
        if alignment_error(moved, flow) < before:
            return moved
    return None


def _sides(z: Tensor, flow: Flow) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """A few pairs of frames at a time and both ways: the frames looked at, those warped onto them, flow and mask."""
    for first in range(0, len(flow.forward), PAIRS):
        pairs = slice(first, min(first + PAIRS, len(flow.forward)))
        following = slice(pairs.start + 1, pairs.stop + 1)
        yield pairs, following, flow.forward[pairs], flow.visible_now[pairs]
        yield following, pairs, flow.backward[pairs], flow.visible_next[pairs]


def alignment_error(z: Tensor, flow: Flow) -> float:
    """E of SDATC equation 12: the sum of absolute differences along the flow, over the visible pixels of all frames of
    `z` (n, c, h, w) and both directions."""
    total = torch.zeros((), device=z.device)
    for here, there, moves, seen in _sides(z, flow):
        total += ((warp(z[there].float(), moves) - z[here].float()).abs() * seen).sum()
    return float(total)


def _gradient(z: Tensor, flow: Flow, strength: float, v: float) -> Tensor:
    """The step of SDATC equation 13."""
    gradient = torch.zeros_like(z)
    for here, there, moves, seen in _sides(z, flow):
        apart = warp(z[there], moves) - z[here]
        sign = apart.sign() * (apart.abs() > _ROUNDING) * seen
        gradient[here] -= sign
        gradient[there] += splat(sign, moves)
    return -strength * v * gradient


def _propagate(z: Tensor, flow: Flow, strength: float, v: float) -> Tensor:
    """To what a pass forward and one back along the flow leave, each frame taking from the one just done."""
    out = z.clone()
    for i in range(len(flow.backward)):
        _take(out, i + 1, i, flow.backward[i : i + 1], strength * flow.visible_next[i])
    for i in reversed(range(len(flow.forward))):
        _take(out, i, i + 1, flow.forward[i : i + 1], strength * flow.visible_now[i])
    return out - z


def _take(z: Tensor, here: int, there: int, moves: Tensor, share: Tensor) -> None:
    z[here] = torch.lerp(z[here], warp(z[there : there + 1], moves)[0], share)


MODES: dict[str, Callable[[Tensor, Flow, float, float], Tensor]] = {"gradient": _gradient, "propagate": _propagate}
"""What step a scene's latents (n, c, h, w) float32 take, by name: of its flow, lambda and v."""


def bounded(sigma: float, following: float) -> float:
    """sigma^2 / (1 + sigma^2): the share of noise in the latent, from 1 down to 0, whatever the steps are."""
    return sigma**2 / (1 + sigma**2)


def ddpm(sigma: float, following: float) -> float:
    """s'^2 / sqrt(1 + s'^2), s' the following sigma: what the estimate must move by so that a DDPM step's result moves
    by the step's variance.

    SDATC, equation 13, subtracts lambda v_t dE from the latent z that a DDPM step has led to, v_t the variance of the
    step's noise. Of x = sqrt(1 + s'^2) z that step takes the share 1 - s'^2/s^2 of the estimate, and v_t is
    s'^2 (1 - s'^2/s^2) / (1 + s'^2) (`samplers.step_variance`): their quotient is left, and sigma cancels. Like the
    paper's it is 0 at a last step, which ends at no noise.
    """
    return following**2 / (1 + following**2) ** 0.5


SCALES: dict[str, Callable[[float, float], float]] = {"bounded": bounded, "ddpm": ddpm}
"""By name: v of SDATC's equation 13, of a step's sigma and the following one."""


def splat(x: Tensor, flow: Tensor) -> Tensor:
    """The transpose of `vsr_ops.flow.warp.warp`: each value of `x` (n, c, h, w) is added where `flow`
    (n, 2, h, w) took it from.

    Written out, since hosts sample where autograd is shut off.
    """
    n, channels, height, width = x.shape
    across = (flow[:, 0] + torch.arange(width, device=x.device)).clamp(0, width - 1)
    down = (flow[:, 1] + torch.arange(height, device=x.device)[:, None]).clamp(0, height - 1)
    left, top = across.floor(), down.floor()
    right, low = across - left, down - top
    out = x.new_zeros(n, channels, height * width)
    for col, row, weight in (
        (left, top, (1 - right) * (1 - low)),
        (left + 1, top, right * (1 - low)),
        (left, top + 1, (1 - right) * low),
        (left + 1, top + 1, right * low),
    ):
        # One past the border has no weight.
        place = row.clamp(max=height - 1) * width + col.clamp(max=width - 1)
        index = place.long().flatten(1)[:, None].expand(-1, channels, -1)
        out.scatter_add_(2, index, (x * weight[:, None]).flatten(2))
    return out.view(n, channels, height, width)
