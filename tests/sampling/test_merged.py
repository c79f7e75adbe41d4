"""Attention to own and appended keys, apart and merged by their log-sum-exp: the same as to all of them joined."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.support.tensors import latents, randn, relative
from vsr_ops.pipeline.sampler import SamplingSettings, sample
from vsr_ops.sampling import attention, kernels
from vsr_ops.sampling.attention import KeyValue, Tempered, fused_attention, joined, plain
from vsr_ops.sampling.kernels import KERNELS, Kernel, lse_kernel
from vsr_ops.sampling.propagation import Propagation
from vsr_ops.sampling.tiling import TileSize, plan_tiles

if TYPE_CHECKING:
    from vsr_ops.backbones.svd import SVD

VIDEOS, FRAMES, HEADS, TOKENS, DIM = 2, 3, 2, 20, 8
#: Who shares the appended keys: nobody, all frames of a video (TAP), all videos' same frames (SAP), everybody.
SHARED = [(VIDEOS, FRAMES), (VIDEOS, 1), (1, FRAMES), (1, 1)]


def own(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """As a linear layer leaves them: heads beside each other."""
    q, k, v = (randn(VIDEOS * FRAMES, TOKENS, HEADS, DIM, seed=seed).transpose(1, 2).to(dtype) for seed in range(3))
    return 2 * q, k, v


def bank(shared: tuple[int, int], scale: float = 1.0) -> KeyValue:
    return KeyValue(scale * randn(*shared, HEADS, 33, DIM, seed=3), randn(*shared, HEADS, 33, DIM, seed=4))


def written_out(q: Tensor, k: Tensor, v: Tensor, extra: KeyValue, divisor: float = 1.0) -> Tensor:
    """softmax(Q [K; K']^T / (divisor sqrt(d))) [V; V'] in float64, query by query's row."""
    rows: list[Tensor] = []
    for i in range(len(q)):
        places = [min(place, side - 1) for place, side in zip(divmod(i, FRAMES), extra.keys.shape[:2], strict=True)]
        keys, values = (
            torch.cat([mine[i], theirs[places[0], places[1]].to(mine)], 1).double()
            for mine, theirs in ((k, extra.keys), (v, extra.values))
        )
        scores = q[i].double() @ keys.transpose(-1, -2) / (divisor * math.sqrt(DIM))
        rows.append(scores.softmax(-1) @ values)
    return torch.stack(rows)


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("scale", [1.0, 40.0, 1e-3])
def test_merged_is_attention_to_the_joined_keys(shared: tuple[int, int], scale: float) -> None:
    """Also where one of the two sets has all the weight: at 40 logits are in the hundreds."""
    q, k, v = own()
    extra = bank(shared, scale)
    assert lse_kernel(q, k, v) is not None
    found = plain(q, k, v, extra, FRAMES)
    assert relative(found, written_out(q, k, v, extra)) < 1e-6 * max(1.0, scale)
    theirs = fused_attention(q, joined(k, extra.keys, FRAMES), joined(v, extra.values, FRAMES))
    assert relative(found, theirs) < 1e-5
    assert relative(plain(q, k, v, None, FRAMES), theirs) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shared", SHARED)
def test_half_precision_is_nearly_as_near_as_joined(dtype: torch.dtype, shared: tuple[int, int]) -> None:
    """It is rounded once more."""
    q, k, v = own(dtype)
    extra = bank(shared)
    extra = KeyValue(*(x.to(dtype) for x in extra))
    expected = written_out(q, k, v, extra)
    found = plain(q, k, v, extra, FRAMES)
    theirs = fused_attention(q, joined(k, extra.keys, FRAMES), joined(v, extra.values, FRAMES))
    assert found.dtype == dtype
    assert relative(found, expected) < 2 * relative(theirs, expected)


@pytest.mark.parametrize("shared", SHARED)
def test_a_temperature_acts_on_both(shared: tuple[int, int]) -> None:
    q, k, v = own()
    q[:FRAMES] *= 3
    extra, out = bank(shared), Tempered(0.9)(q.clone(), k, v, bank(shared), FRAMES)
    for i in range(0, len(q), FRAMES):
        rows = slice(i, i + FRAMES)
        part = KeyValue(*(x[i // FRAMES :][:1] if shared[0] > 1 else x for x in extra))
        peak = float(q[rows].abs().max() * k[rows].abs().max())
        assert 0.81 * peak > 1
        assert relative(out[rows], written_out(q[rows], k[rows], v[rows], part, 0.81 * peak)) < 1e-6


class Spy:
    """A kernel that notes what it is asked with."""

    def __init__(self, kernel: Kernel) -> None:
        self.asked: list[tuple[Tensor, Tensor, Tensor]] = []
        self._kernel = kernel

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.asked.append((q, k, v))
        return self._kernel(q, k, v)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    place = next(iter(KERNELS))
    made = Spy(KERNELS[place])
    monkeypatch.setitem(KERNELS, place, made)
    return made


@pytest.mark.parametrize("shared", SHARED)
def test_the_bank_is_attended_to_once_by_all_and_never_copied(spy: Spy, shared: tuple[int, int]) -> None:
    q, k, v = own()
    extra = bank(shared)
    plain(q, k, v, extra, FRAMES)
    (_, *mine), (queries, *theirs) = spy.asked
    assert [x.data_ptr() for x in (*mine, *theirs)] == [x.data_ptr() for x in (k, v, *extra)]
    sharing = VIDEOS * FRAMES // (shared[0] * shared[1])
    assert theirs[0].shape == (shared[0] * shared[1], HEADS, 33, DIM)
    assert queries.shape == (shared[0] * shared[1], HEADS, sharing * TOKENS, DIM)
    # The frames of a video lie behind one another anyway.
    assert (queries.data_ptr() == q.data_ptr()) == (shared != (1, FRAMES))


def test_of_many_sequences_it_is_the_same_in_parts(spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = own()
    for shared in SHARED:
        whole = plain(q, k, v, bank(shared), FRAMES)
        with monkeypatch.context() as patch:
            patch.setattr(attention, "SEQUENCES", 5)
            spy.asked.clear()
            assert torch.equal(plain(q, k, v, bank(shared), FRAMES), whole)
            assert all(x.shape[0] * x.shape[1] <= 5 for each in spy.asked for x in each)


def test_an_attention_that_keeps_its_sum_to_itself_gets_the_keys_joined() -> None:
    q, k, v = own()
    asked: list[int] = []

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        asked.append(k.shape[2])
        return fused_attention(q, k, v)

    for shared in SHARED:
        extra = bank(shared)
        assert relative(plain(q, k, v, extra, FRAMES, theirs), written_out(q, k, v, extra)) < 1e-6
    assert asked == [TOKENS + 33] * len(SHARED)


@pytest.fixture
def cuda() -> Iterator[None]:
    """Tensors on CUDA that have shapes and no values."""
    with FakeTensorMode():
        yield


@pytest.mark.parametrize("backend", [backend for device, backend in KERNELS if device == "cuda"])
def test_every_kernel_of_cuda_has_the_shapes(cuda: None, backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "chosen", lambda q, k, v: backend)
    q = torch.empty(6, 2, 70, 64, device="cuda", dtype=torch.float16)
    kernel = lse_kernel(q, q, q)
    assert kernel is not None
    out, lse = kernel(q, q, q)
    assert out.shape == q.shape and lse.shape == q.shape[:3] and lse.dtype == torch.float32
    extra = KeyValue(*(torch.empty(2, 1, 2, 99, 64, device="cuda", dtype=torch.float16) for _ in range(2)))
    assert plain(q, q, q, extra, 3).shape == q.shape
    # Widths that only torch's own front pads.
    odd = q[..., :63]
    assert lse_kernel(odd, odd, odd) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize(("device", "backend"), [place for place in KERNELS if place[0] == "cuda"])
def test_every_kernel_of_cuda_says_its_sum(device: str, backend: Any) -> None:
    q, k, v = (randn(2, 3, 70, 64, seed=seed).to(device, torch.float16) for seed in range(3))
    lse = KERNELS[device, backend](q, k, v)[1]
    expected = torch.logsumexp(q.double() @ k.double().transpose(-1, -2) / 8, -1)
    assert torch.allclose(lse.double(), expected, rtol=0, atol=1e-2)


def test_the_kernel_of_the_cpu_says_its_sum() -> None:
    q, k, v = own()
    out, lse = KERNELS[next(iter(KERNELS))](q, k, v)
    assert torch.allclose(lse, torch.logsumexp(q @ k.transpose(-1, -2) / math.sqrt(DIM), -1), atol=1e-5)
    assert torch.equal(out, fused_attention(q, k, v))


@pytest.mark.parametrize("lagged", [False, True])
def test_the_latents_of_a_run_are_the_same_joined(tiny: SVD, lagged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """SAP, TAP forward, SAP, TAP backward, each with DSSAG's second branch."""
    plan = plan_tiles(4, 8, 16, TileSize(8, 8, 2), 0.0, factor=8)
    settings = SamplingSettings(4, "dssag", 1.0, 1.0, propagation=Propagation(sap_lagged=lagged, sap_rate=2), batch=2)
    found = sample(tiny, latents(plan), plan, settings)
    monkeypatch.setattr(kernels, "KERNELS", {})
    expected = sample(tiny, latents(plan), plan, settings)
    assert 0 < float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())
