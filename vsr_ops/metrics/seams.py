"""Seams: what the borders of tiles leave in a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from ..errors import SettingError
from ..sampling.tiling import Span, TilePlan
from .pixels import check_equal, luma, said

_REACH = 1
"""Gradients on each side of a border's own that count as the border's too: decoders spread a step."""

_ALONG = 16
"""Pixels along a border over which its gradients are averaged with their sign: texture cancels, a seam does not."""

_BESIDE = 8
"""How many gradients on each side of those they are compared with: near enough to show the same things."""

_FLOOR = 0.1 / 255
"""Added to both: in flat areas rounding alone would decide."""


@dataclass(frozen=True)
class Borders:
    """Where tiles begin or end inside a picture: `rows` before those lines of pixels, `cols` before those columns."""

    rows: tuple[int, ...]
    cols: tuple[int, ...]


def plan_borders(plan: TilePlan, height: int, width: int, factor: int = 8) -> Borders:
    """The borders of a plan over latents in a picture of height x width, `factor` pixels a latent."""

    def inner(axis: Sequence[Span], length: int) -> tuple[int, ...]:
        edges = {edge * factor for span in axis for edge in (span.start, span.stop)}
        return tuple(sorted(edge for edge in edges if 0 < edge < length))

    return Borders(inner(plan.rows, height), inner(plan.cols, width))


def seam_energy(x: Tensor, borders: Borders) -> Tensor:
    """Gradients across tile borders over those beside them, per frame of (n, 3, h, w) RGB in [0, 1]: (n,).

    Differences of neighbouring pixels' luma, those across rows for `borders.rows` and those across columns for
    `borders.cols`, averaged over 16 pixels along the border, and their size: the mean of a border's three over the
    mean of the 8 next on each side, as a geometric mean over borders. About 1 without seams, but what the picture
    shows at its borders counts too: `seam_ratio` takes that out. Raises SettingError where no border lies inside the
    picture or nothing lies between them.
    """
    y = luma(x.float())[:, 0]
    y = y if y.device.type == "mps" else y.double()
    ratios: list[Tensor] = []
    for axis, places in ((1, borders.rows), (2, borders.cols)):
        across = _coherent(y.diff(dim=axis), axis)
        inside = [place for place in places if 0 < place < y.shape[axis]]
        taken = {d for place in inside for d in range(place - 1 - _REACH, place + _REACH)}
        for place in inside:
            near = range(max(0, place - 1 - _REACH), min(place + _REACH, across.shape[1]))
            around = range(max(0, near.start - _BESIDE), min(near.stop + _BESIDE, across.shape[1]))
            beside = [d for d in around if d not in taken]
            if beside:
                ratios.append(across[:, near.start : near.stop].mean(1) / across[:, beside].mean(1))
    if not ratios:
        raise SettingError(
            f"seam energy of {said(x)} got borders at rows {borders.rows} and columns {borders.cols}: expected some"
            " inside the picture with room between them; give the tiles it was made with, or leave seams out"
        )
    return torch.stack(ratios).log().mean(0).exp()


def seam_ratio(result: Tensor, truth: Tensor, borders: Borders) -> Tensor:
    """`seam_energy` of the result over that of the truth: (n,), exactly 1 where they are equal, above 1 for seams."""
    check_equal(result, truth)
    return seam_energy(result, borders) / seam_energy(truth, borders)


def _coherent(gradient: Tensor, axis: int) -> Tensor:
    """Size of gradients (n, h, w) across `axis`, averaged along the other axis by parts first: (n, length)."""
    lines = gradient if axis == 1 else rearrange(gradient, "n h w -> n w h")
    part = min(_ALONG, lines.shape[2])
    whole = lines[..., : lines.shape[2] // part * part]
    means = rearrange(whole, "n across (parts along) -> n across parts along", along=part).mean(3)
    return means.abs().mean(2) + _FLOOR
