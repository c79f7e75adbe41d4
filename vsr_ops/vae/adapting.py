"""SATeCo's adapters in a decoder of tiles: their guide is what the frozen encoder sees of the upscaled video."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..modules.sateco import SATeCo, Strengths
from ..modules.windows import WINDOW, Place
from .layout import DecoderOp
from .places import Box
from .sweeps import BRANCH, MAIN, At, Sweep

#: Pixels beyond whole windows that TFA's first convolution reaches, and with it the one that makes SFA of the guide.
BEFORE_TFA, BEFORE_BOTH = 1, 2


def adapting(model: SATeCo, strengths: Strengths, name: str, level: int) -> DecoderOp:
    """SFA and TFA at the end of the decoder's level `name`, which lies on `level` of the picture. All frames of a chunk
    see each other, where TFA acts."""
    block, step = model.part(name), f"{name}_sateco"

    def guided(tap: Tensor, x: Tensor, place: Place | None, own: Box | None) -> Tensor:
        return model(name, x, guide_of(tap), len(x), strengths, place)

    def guide_of(tap: Tensor) -> Tensor:
        return model.guide_of(name, _like(block.sfa.keep, tap))

    def modulated(n: Tensor, tap: Tensor | None, at: At) -> Tensor:
        assert tap is not None
        return block.modulated(_like(block.sfa.keep, n), guide_of(tap)).to(n.dtype)

    def mixed(x: Tensor, change: Tensor | None, at: At) -> Tensor:
        assert change is not None
        keep = block.sfa.keep.to(x)
        return x + strengths.spatial * ((keep - 1) * x + change)

    def aligned(x: Tensor, tap: Tensor | None, at: At) -> Tensor:
        assert tap is not None
        added = block.aligned(_like(block.sfa.keep, x), guide_of(tap), len(x), at.place)
        return x + strengths.temporal * added.to(x.dtype)

    def sweeps() -> list[Sweep]:
        found: list[Sweep] = []
        if strengths.spatial:
            wide = 2 * block.width
            found.append(Sweep(modulated, MAIN, BRANCH, step, block.sfa.norm, activated=False, reach=1, widest=wide))
            found.append(Sweep(mixed, MAIN, MAIN, BRANCH, last=(BRANCH,) if strengths.temporal else (BRANCH, step)))
        if strengths.temporal:
            wide = block.width + 3 * block.tfa.inner
            tfa = Sweep(aligned, MAIN, MAIN, step, reach=1, window=WINDOW, before=BEFORE_TFA, widest=wide, last=(step,))
            found.append(tfa)
        return found

    window, before = (WINDOW, BEFORE_BOTH) if strengths.temporal else (1, 0)
    op = DecoderOp(step, (block,), lambda x: x, level, guided=guided, sweeps=sweeps)
    return replace(op, window=window, before=before)


def _like(parameter: torch.Tensor, x: Tensor) -> Tensor:
    """As SATeCo computes, whatever the decoder's precision."""
    return x.to(parameter.dtype)
