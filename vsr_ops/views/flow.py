"""Optical flow as pictures: direction as hue, speed as saturation; and where it can be followed, in black and white."""

from __future__ import annotations

import math

import torch
from einops import repeat
from torch import Tensor

from ..flow.field import Flow

_ARCS = (15, 6, 4, 11, 13, 6)
"""Hues from red to yellow, yellow to green, green to cyan, cyan to blue, blue to magenta, magenta to red: as many as
the eye tells apart."""


def wheel() -> Tensor:
    """The colours (55, 3) of Baker et al. (IJCV 92, 2011; Middlebury), in [0, 1], once around from red."""
    colours = torch.tensor([(1, 0, 0), (1, 1, 0), (0, 1, 0), (0, 1, 1), (0, 0, 1), (1, 0, 1), (1, 0, 0)]).float()
    arcs = [
        torch.lerp(colours[i], colours[i + 1], (torch.arange(count) / count)[:, None]) for i, count in enumerate(_ARCS)
    ]
    return torch.cat(arcs)


def flow_picture(flow: Tensor, largest: float | None = None) -> Tensor:
    """Pictures (n, 3, h, w) in [0, 1] of flow (n, 2, h, w): white stands still, full colour moves by `largest` pixels.

    `largest` is by default the longest vector of all, so that the frames of a video compare; longer ones are darkened,
    as Middlebury does. Frame by frame.
    """
    if largest is None:
        lengths = [float(frame.float().square().sum(0).max()) for frame in flow]
        largest = math.sqrt(max(lengths, default=0.0))
    out = flow.new_empty((flow.shape[0], 3, *flow.shape[-2:]), dtype=torch.float32)
    for i, frame in enumerate(flow):
        out[i] = _picture(frame.float() / max(largest, 1e-6))
    return out


def _picture(flow: Tensor) -> Tensor:
    """One frame (2, h, w), 1 being full colour."""
    colours = wheel().to(flow.device)
    count = len(colours)
    turn = (torch.atan2(-flow[1], -flow[0]) / math.pi + 1) / 2 * (count - 1)
    low = turn.floor().long().clamp(0, count - 1)
    hue = torch.lerp(colours[low], colours[(low + 1) % count], (turn - low)[..., None]).permute(2, 0, 1)
    length = flow.square().sum(0).sqrt()
    return torch.where(length <= 1 + 1e-4, 1 - length * (1 - hue), 0.75 * hue).clamp(0, 1)


def visibility_picture(visible: Tensor) -> Tensor:
    """Pictures (n, 3, h, w) of masks (n, 1, h, w): white where the next frame shows the pixel too, else black."""
    return repeat(visible.float(), "n 1 h w -> n c h w", c=3)


def preview(flow: Flow) -> tuple[Tensor, Tensor]:
    """`flow.forward` and `flow.visible_now` as pictures (frames - 1, 3, h, w); a video of no pairs gives one, still."""
    forward, visible = flow.forward, flow.visible_now
    if len(forward) == 0:
        forward, visible = forward.new_zeros((1, 2, *flow.size)), visible.new_zeros((1, 1, *flow.size))
    return flow_picture(forward), visibility_picture(visible)
