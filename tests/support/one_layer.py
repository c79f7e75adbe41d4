"""A model of one self-attention layer on a latent's pixels, and passes of it and of a real UNet, for the tests of
propagation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from vsr_ops.sampling.calls import Call, gather_tiles
from vsr_ops.sampling.guidance import COND, Branch
from vsr_ops.sampling.layers import Layer
from vsr_ops.sampling.passes import run_pass
from vsr_ops.sampling.propagation import Propagation, TileRun
from vsr_ops.sampling.schedule import Step
from vsr_ops.sampling.tiling import TilePlan, TileSize, plan_tiles

if TYPE_CHECKING:
    from vsr_ops.backbones.svd import SVD

ENDS, MIDDLE = Layer("one", frozenset({"ends"})), Layer("one", frozenset({"middle"}))
TILE = TileSize(8, 8, 4)
#: Two tiles side by side without overlap, so that nothing but propagation carries from one to the other.
PAIR = plan_tiles(4, 8, 16, TILE, 0.0)
SAP, TAP, LAGGED = Propagation(("sap",), sap_rate=1), Propagation(("tap",)), Propagation(("sap",), True, sap_rate=1)


def project(video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `(frames, 2, pixels, 4)`: the latent's pixels through fixed random matrices."""
    rng = torch.Generator().manual_seed(99)
    weights = [torch.randn(4, 8, generator=rng).to(video.dtype) for _ in range(3)]
    tokens = rearrange(video, "b c h w -> b (h w) c")
    q, k, v = (rearrange(tokens @ w, "b n (h d) -> b h n d", h=2) for w in weights)
    return q, k, v


def one_layer(run: TileRun, video: Tensor, layer: Layer = ENDS) -> Callable[[Call], Tensor]:
    """A model that is a single self-attention layer on the latent's pixels."""

    def evaluate(call: Call) -> Tensor:
        run.serve(call)
        out = run.attend(call, layer, *project(gather_tiles(run.plan, call, video)))
        return rearrange(out, "b h (y x) d -> b (h d) y x", y=call.height)

    return evaluate


def attend(q: Tensor, k: Tensor, v: Tensor, height: int = 8) -> Tensor:
    """Plain attention in float64, as a video."""
    scores = q.double() @ k.double().transpose(-1, -2) / math.sqrt(q.shape[-1])
    return rearrange(scores.softmax(-1) @ v.double(), "b h (y x) d -> b (h d) y x", y=height)


def passed(
    plan: TilePlan, settings: Propagation, step: Step, video: Tensor, branch: Branch = COND, batch: int = 1
) -> Tensor:
    """One pass of the one-layer model in a run of its own."""
    run = TileRun(plan, settings)
    return run_pass(run, step, branch, one_layer(run, video), batch)


def through_unet(
    model: SVD, run: TileRun, step: Step, video: Tensor, branch: Branch = COND, batch: int = 1, sigma: float = 2.0
) -> Tensor:
    """One pass of the real UNet."""

    def evaluate(call: Call) -> Tensor:
        tiles = gather_tiles(run.plan, call, video)
        with model.serving(run, call), torch.no_grad():
            return model.denoise(tiles * sigma, sigma, tiles, model.context(None), call.frames)

    return run_pass(run, step, branch, evaluate, batch)
