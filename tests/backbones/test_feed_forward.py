"""A feed-forward in parts gives what it gives whole, and never sees more tokens than it should."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock, TemporalBasicTransformerBlock
from torch import Tensor, nn

from vsr_ops.backbones.feed_forward import TOKENS, keep_in_caches


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def block(seed: int = 1) -> BasicTransformerBlock:
    torch.manual_seed(seed)
    return BasicTransformerBlock(16, 2, 8)


def tokens_seen(module: BasicTransformerBlock) -> list[int]:
    seen: list[int] = []
    inner = module.ff.net[0]
    assert isinstance(inner, nn.Module)
    inner.register_forward_hook(lambda _, given, out: seen.append(out.shape[:-1].numel()))
    return seen


@torch.no_grad()
@pytest.mark.parametrize("shape", [(3, 1000, 16), (2500, 1, 16), (1, TOKENS, 16), (1, 7, 16)])
def test_it_gives_the_same_in_parts(shape: tuple[int, ...]) -> None:
    whole, parts, x = block(), block(), noise(*shape)
    keep_in_caches(parts)
    seen = tokens_seen(parts)
    torch.testing.assert_close(parts.ff(x), whole.ff(x), atol=1e-6, rtol=1e-6)
    assert sum(seen) == x.shape[:-1].numel() and max(seen) <= TOKENS


@torch.no_grad()
def test_one_that_changes_the_width_does_so_in_parts() -> None:
    torch.manual_seed(1)
    wider, x = TemporalBasicTransformerBlock(16, 32, 2, 8), noise(3, 1000, 16)
    expected = wider.ff_in(x)
    keep_in_caches(wider)
    torch.testing.assert_close(wider.ff_in(x), expected, atol=1e-6, rtol=1e-6)


def test_who_learns_sees_all_at_once() -> None:
    parts = block()
    keep_in_caches(parts)
    seen, x = tokens_seen(parts), noise(1, TOKENS + 1, 16)
    parts.ff(x).sum().backward()
    assert seen == [TOKENS + 1] and parts.ff.net[0].proj.weight.grad is not None  # pyright: ignore
