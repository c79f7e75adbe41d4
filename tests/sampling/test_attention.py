"""Self-attention with extended keys, a temperature, and perturbations, against softmax written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.support.tensors import randn, relative
from vsr_ops.sampling.attention import KeyValue, Tempered, attention_received, identity, plain, temperature

FRAMES = 3


def draw(seed: int, videos: int = 2, tokens: int = 20, scale: float = 1.0) -> Tensor:
    return scale * randn(videos * FRAMES, 2, tokens, 8, seed=seed)


def appended(seed: int, tokens: int = 20, scale: float = 1.0, videos: int = 2, frames: int = FRAMES) -> KeyValue:
    """Keys and values for all, where `videos` or `frames` is 1."""
    return KeyValue(*(scale * randn(videos, frames, 2, tokens, 8, seed=s) for s in (seed, seed + 1)))


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, divisor: Tensor | float = 1.0) -> Tensor:
    """softmax(Q K^T / (divisor sqrt(d))) V, every sum written out, float64."""
    scores = q.double() @ k.double().transpose(-1, -2) / (divisor * math.sqrt(q.shape[-1]))
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return (weights / weights.sum(-1, keepdim=True)) @ v.double()


def equation_7(q: Tensor, k: Tensor, v: Tensor, gamma: float, extra: KeyValue | None = None) -> Tensor:
    """Video by video, the peaks over the video's own queries and keys."""
    out: list[Tensor] = []
    for i in range(0, len(q), FRAMES):
        own = slice(i, i + FRAMES)
        peak = float(q[own].double().abs().max() * k[own].double().abs().max())
        keys = k[own] if extra is None else torch.cat([k[own], extra.keys[i // FRAMES]], dim=2)
        values = v[own] if extra is None else torch.cat([v[own], extra.values[i // FRAMES]], dim=2)
        out.append(softmax_attention(q[own], keys, values, max(gamma**2 * peak, 1.0)))
    return torch.cat(out)


def test_plain_is_softmax_attention() -> None:
    q, k, v = draw(0), draw(1), draw(2)
    assert relative(plain(q, k, v, None, FRAMES), softmax_attention(q, k, v)) < 1e-6


def test_extended_attention_is_attention_over_the_union() -> None:
    q, k, v = draw(0), draw(1), draw(2)
    own = KeyValue(k[:, :, :13], v[:, :, :13])
    extra = KeyValue(*(x[:, :, 13:].unflatten(0, (2, FRAMES)) for x in (k, v)))
    assert relative(plain(q, *own, extra, FRAMES), softmax_attention(q, k, v)) < 1e-6
    assert relative(plain(q, *own, None, FRAMES), softmax_attention(q, k, v)) > 1e-2


def test_the_own_tokens_doubled_change_nothing() -> None:
    q, k, v = draw(0), draw(1), draw(2)
    own = KeyValue(*(x.unflatten(0, (2, FRAMES)) for x in (k, v)))
    assert relative(plain(q, k, v, own, FRAMES), plain(q, k, v, None, FRAMES)) < 1e-6


def test_a_bank_of_another_dtype_is_taken_in_the_layers() -> None:
    q, k, v = draw(0).half(), draw(1).half(), draw(2).half()
    out = plain(q, k, v, appended(3), FRAMES)
    assert out.dtype == torch.float16 and out.shape == q.shape


@pytest.mark.parametrize("gamma", [1.0, 0.5, 0.2])
@pytest.mark.parametrize("extended", [False, True])
def test_tempered_is_equation_7(gamma: float, extended: bool) -> None:
    q, k, v = draw(0, scale=3), draw(1, scale=3), draw(2)
    # Larger than the layer's own keys: they must not enter the peak.
    extra = appended(3, tokens=7, scale=9) if extended else None
    expected = equation_7(q, k, v, gamma, extra)
    out = Tempered(gamma)(q.clone(), k, v, extra, FRAMES)
    assert relative(out, expected) < 1e-6
    assert relative(plain(q, k, v, extra, FRAMES), expected) > 1e-2


def test_where_the_maximum_is_one_tempered_is_plain_bit_for_bit() -> None:
    q, k, v = draw(0, scale=0.1), draw(1, scale=0.1), draw(2)
    assert float(q.abs().max() * k.abs().max()) < 1
    assert torch.equal(Tempered(1.0)(q.clone(), k, v, None, FRAMES), plain(q, k, v, None, FRAMES))
    # One video below the threshold, one above: each keeps its own temperature.
    q[FRAMES:] *= 100
    k[FRAMES:] *= 100
    found = temperature(q, k, 1.0, FRAMES)
    assert (found[:FRAMES] == 1).all() and (found[FRAMES:] > 1).all()
    assert relative(Tempered(1.0)(q.clone(), k, v, None, FRAMES), equation_7(q, k, v, 1.0)) < 1e-6


@pytest.mark.parametrize("extended", [False, True])
def test_gamma_zero_is_plain_bit_for_bit(extended: bool) -> None:
    q, k, v = draw(0, scale=5), draw(1, scale=5), draw(2)
    extra = appended(3) if extended else None
    assert torch.equal(Tempered(0.0)(q.clone(), k, v, extra, FRAMES), plain(q, k, v, extra, FRAMES))


def test_gamma_blurs_more_the_larger_it_is() -> None:
    q, k, v = draw(0, scale=3), draw(1, scale=3), draw(2)
    even = v.mean(2, keepdim=True)
    distance = [float((Tempered(g)(q.clone(), k, v, None, FRAMES) - even).norm()) for g in (0, 0.3, 0.6, 1)]
    assert distance == sorted(distance, reverse=True) and distance[0] > 2 * distance[-1]


def test_the_temperature_of_a_batch_is_that_of_each_video_alone() -> None:
    q, k = draw(0, videos=4, scale=3), draw(1, videos=4, scale=3)
    together = temperature(q, k, 0.7, FRAMES)
    alone = [temperature(q[i : i + FRAMES], k[i : i + FRAMES], 0.7, FRAMES) for i in range(0, len(q), FRAMES)]
    assert together.shape == (12, 1, 1, 1) and together.dtype == torch.float32
    assert torch.equal(together, torch.cat(alone))
    assert len(set(together.flatten().tolist())) == 4


def test_the_peaks_are_of_the_whole_video_and_both_signs() -> None:
    q, k = torch.zeros(2, 2, 5, 8), torch.zeros(2, 2, 5, 8)
    q[0, 1, 2, 3], k[1, 0, 4, 0] = -6.0, 5.0
    assert torch.equal(temperature(q, k, 1.0, 2), torch.full((2, 1, 1, 1), 30.0))
    assert torch.equal(temperature(q, -k, 0.5, 2), torch.full((2, 1, 1, 1), 7.5))
    assert torch.equal(temperature(q, k, 1.0, 1), torch.ones(2, 1, 1, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [3.0, 100.0])
def test_half_precision_follows_equation_7(dtype: torch.dtype, scale: float) -> None:
    # At scale 100 the product of the peaks is above float16's largest number.
    q, k, v = draw(0, scale=scale).to(dtype), draw(1, scale=scale).to(dtype), draw(2).to(dtype)
    assert (float(q.abs().max()) * float(k.abs().max()) > 65504) == (scale == 100)
    out = Tempered(1.0)(q.clone(), k, v, None, FRAMES)
    assert out.dtype == dtype
    assert relative(out, equation_7(q, k, v, 1.0)) < 2e-2


def test_identity_returns_the_values() -> None:
    q, k, v = draw(0), draw(1), draw(2)
    assert torch.equal(identity(q, k, v, None, FRAMES), v)


def test_received_counts_what_each_token_gets() -> None:
    q, k = draw(0, scale=2), draw(1, scale=2)
    attention = (q.double() @ k.double().transpose(-1, -2) / math.sqrt(8)).softmax(-1)
    expected = torch.zeros(len(q), 20, dtype=torch.float64)
    for query in range(20):
        expected += attention[:, :, query].mean(1)
    found = attention_received(q, k)
    assert found.dtype == torch.float32 and relative(found, expected) < 1e-6
    assert torch.allclose(found.sum(1), torch.full((len(q),), 20.0), rtol=1e-5)
    assert found.std() > 0.05


def test_even_attention_gives_each_token_one() -> None:
    assert torch.allclose(
        attention_received(torch.zeros(3, 2, 16, 8), draw(1, tokens=16)[:3]), torch.ones(3, 16), atol=1e-6
    )
