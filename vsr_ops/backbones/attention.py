"""diffusers' attention layers with the pack's attention in them: none asks for more sequences at once than CUDA takes.

A window's tiles go through the UNet as videos, and its temporal layers see every position as a sequence: at 1080p 28
tiles of 64 x 64 latents are 114,688 of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, cast

from einops import rearrange
from torch import Tensor, nn

from ..modules.idle import Nothing
from ..sampling.attention import fused_attention, plain
from ..sampling.calls import Call
from ..sampling.layers import Layer
from ..sampling.passes import SideBySide
from ..sampling.propagation import TileRun


class Serving(Protocol):
    """A model whose attention layers serve a run's call; None outside one."""

    active: tuple[TileRun | SideBySide, Call] | None


def _projected(attn: Any, hidden_states: Tensor, context: Tensor) -> list[Tensor]:
    """Queries, keys and values `(b, heads, tokens, dim)`."""
    pairs = ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
    return [rearrange(project(x), "b n (h d) -> b h n d", h=attn.heads) for project, x in pairs]


def _left(attn: Any, out: Tensor, like: Tensor) -> Tensor:
    """What a layer gives for its attention's `(b, heads, tokens, dim)`."""
    return attn.to_out[1](attn.to_out[0](rearrange(out, "b h n d -> b n (h d)").to(like.dtype)))


class PatchedAttention:
    """Of one spatial self-attention layer: projections, then `attend`."""

    def __init__(self, model: Serving, layer: Layer) -> None:
        self._model = model
        self._layer = layer

    def __call__(self, attn: Any, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        q, k, v = _projected(attn, hidden_states, hidden_states)
        if attn.upcast_attention:  # SD 2.1's logits overflow float16
            q, k, v = q.float(), k.float(), v.float()
        active = self._model.active
        if active is None:
            out = plain(q, k, v, None, 1)
        else:
            run, call = active
            out = run.attend(call, self._layer, q, k, v)
        return _left(attn, out, hidden_states)


class ChunkedAttention:
    """Of a layer that is left as it is: the temporal ones' self-attention, and any attention to a context."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *_: object, **__: object
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        return _left(attn, fused_attention(*_projected(attn, hidden_states, context)), hidden_states)


class OneTokenAttention:
    """Of attention to a context. To one token it is that token's value for every query: a softmax over one key is 1."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: object, **__: object
    ) -> Tensor:
        context = encoder_hidden_states
        if context.shape[1] != 1:
            return ChunkedAttention()(attn, hidden_states, context)
        if context.stride(0) == 0:
            # The temporal blocks' expanded view: as it is, a linear layer copies its weight for every row on the CPU.
            context = context[:1]
        value = attn.to_out[1](attn.to_out[0](attn.to_v(context)))
        return value.expand(*hidden_states.shape[:2], -1)


def use_chunks(module: nn.Module) -> None:
    """Gives every attention layer in a module the chunked processor."""
    for name, layer in cast("Iterable[tuple[str, nn.Module]]", module.named_modules()):
        if name.endswith((".attn1", ".attn2")) and not isinstance(layer, Nothing):
            cast(Any, layer).set_processor(ChunkedAttention())
