"""No attention asks for more sequences at once than CUDA takes, at any plan; in parts it is the same attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.sequences import Sequences
from tests.support.tensors import randn
from vsr_ops.modules.stam import STAMBlock
from vsr_ops.modules.windows import Place, WindowAttention
from vsr_ops.sampling import attention
from vsr_ops.sampling.attention import SEQUENCES, batch_limit, fused_attention, in_chunks
from vsr_ops.sampling.calls import calls
from vsr_ops.sampling.guidance import COND, Branch
from vsr_ops.sampling.propagation import Propagation, TileRun
from vsr_ops.sampling.schedule import Step
from vsr_ops.sampling.tiling import TilePlan, TileSize, plan_tiles

if TYPE_CHECKING:
    from vsr_ops.backbones.svd import SVD

#: Latents of 1080p and 4K.
PLANS = {
    name: plan_tiles(28, *size, TileSize(64, 64, 14)) for name, size in {"hd": (136, 240), "4k": (272, 480)}.items()
}


@pytest.fixture(scope="module")
def full() -> SVD:
    """Stable Video Diffusion's UNet at its full size, without data."""
    from diffusers import UNetSpatioTemporalConditionModel

    from vsr_ops.backbones.svd import SVD

    with torch.device("meta"):
        unet = UNetSpatioTemporalConditionModel().to("meta").eval()
    return SVD(unet, None, None, TileSize(64, 64, 14), torch.device("meta"), torch.float16)


def denoised(model: SVD, plan: TilePlan, kind: str, tokens: int = 1) -> list[int]:
    """The sequences of every attention of one call, all tiles of a window at once."""
    run, step = TileRun(plan, Propagation()), Step(0, kind)  # type: ignore[arg-type]
    run.begin(step, Branch("cond"))
    call = next(calls(plan, step, COND, len(plan.spatial), synchronous=True))
    x = torch.empty(len(call.tiles) * call.frames, 4, call.height, call.width, device="meta")
    context = torch.empty(1, tokens, 1024, device="meta", dtype=torch.float16)
    model.unet.half()
    with Sequences() as spy, model.serving(run, call), torch.no_grad():
        model.denoise(x, 2.0, x, context, call.frames)
    return spy.seen


@pytest.mark.parametrize("kind", ["sap", "tap"])
@pytest.mark.parametrize("name", PLANS)
def test_full_size_svd_stays_below_the_limit_with_all_tiles_at_once(full: SVD, name: str, kind: str) -> None:
    plan = PLANS[name]
    positions = len(plan.spatial) * 64 * 64
    assert positions > SEQUENCES
    seen = denoised(full, plan, kind)
    assert max(seen) <= SEQUENCES
    # Every position of the first level was seen, by each of its five heads.
    assert sum(seen) >= 2 * 5 * positions


def test_cross_attention_to_several_tokens_stays_below_it_too(full: SVD) -> None:
    one, many = (denoised(full, PLANS["hd"], "sap", tokens) for tokens in (1, 3))
    assert len(many) > len(one)
    assert max(many) <= SEQUENCES


@pytest.mark.parametrize(("batch", "heads"), [(1, 70000), (65536, 1), (65535, 1), (70000, 8), (200000, 20), (3, 5)])
def test_any_batch_and_heads_stay_below_it(batch: int, heads: int) -> None:
    q = torch.empty(batch, heads, 2, 4, device="meta")
    with Sequences() as spy:
        assert fused_attention(q, q, q).shape == q.shape
    assert max(spy.seen) <= max(SEQUENCES, heads)
    assert sum(spy.seen) == batch * heads
    assert len(spy.seen) == -(-batch // batch_limit(heads))


def test_beside_the_decoder_they_stay_below_it() -> None:
    """A tile of 64 latents with its margins, on the decoder's last level."""
    side, frames = 704, 14
    with torch.device("meta"), Sequences() as spy, torch.no_grad():
        STAMBlock(128, 128, 4)(torch.empty(frames, 128, side, side))
        stam = len(spy.seen)
        WindowAttention(32)(torch.empty(frames, side, side, 32), Place(0, 0, side, side))
        WindowAttention(32)(torch.empty(frames, side, side, 32), Place(3, 5, 2 * side, 2 * side))
    assert stam and len(spy.seen) > stam + 2
    assert max(spy.seen) <= SEQUENCES


def test_in_parts_it_is_the_same_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (randn(7, 2, 6, 8, seed=seed) for seed in range(3))
    mask = randn(7, 1, 1, 6, seed=3) > 0
    whole, masked = fused_attention(q, k, v), fused_attention(q, k, v, mask)
    assert torch.equal(whole, F.scaled_dot_product_attention(q, k, v))
    assert torch.equal(masked, F.scaled_dot_product_attention(q, k, v, mask))
    monkeypatch.setattr(attention, "SEQUENCES", 5)
    with Sequences() as spy:
        assert torch.equal(fused_attention(q, k, v), whole)
        assert torch.equal(fused_attention(q, k, v, mask), masked)
    assert spy.seen == [4, 4, 4, 2] * 2


def test_chunks_take_every_row_once_in_order() -> None:
    x, y = randn(10, 3), randn(10, 3, seed=1)
    sizes: list[int] = []

    def add(a: Tensor, b: Tensor) -> Tensor:
        sizes.append(len(a))
        return a + b

    assert torch.equal(in_chunks(add, 4, x, y), x + y)
    assert sizes == [4, 4, 2]


def test_the_tiny_svd_is_the_same_in_parts(tiny: SVD, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_tiles(4, 8, 16, TileSize(8, 8, 4), 0.5, factor=8)

    def once(tokens: int) -> Tensor:
        run, step = TileRun(plan, Propagation()), Step(0, "sap")
        run.begin(step, COND)
        call = next(calls(plan, step, COND, 1, synchronous=True))
        x = randn(len(call.tiles) * 4, 4, 8, 8)
        with tiny.serving(run, call), torch.no_grad():
            return tiny.denoise(x, 2.0, x, randn(1, tokens, 16, seed=1), 4)

    whole = [once(tokens) for tokens in (1, 3)]
    monkeypatch.setattr(attention, "SEQUENCES", 12)
    for tokens, expected in zip((1, 3), whole, strict=True):
        assert torch.allclose(once(tokens), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
