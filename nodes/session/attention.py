"""The attention that a run puts into the host's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from einops import rearrange
from torch import Tensor

from ...vsr_ops.errors import SettingError
from ...vsr_ops.sampling.attention import batch_limit, fused_attention, identity, in_chunks
from ...vsr_ops.sampling.calls import Call
from ...vsr_ops.sampling.layers import Layer
from ...vsr_ops.sampling.propagation import TileRun


def attention_override(
    run: TileRun,
    call: Call,
    layers: Mapping[str, Layer],
    inner: Callable[..., Tensor] | None,
    is_torchs: Callable[[object], bool],
) -> Callable[..., Tensor]:
    """The host's attention with ours in the layers where it acts, around the override that was there before.

    Where the host's `is_torchs` it is asked for directly, for it can say its log-sum-exp: own and appended keys are
    attended to apart. Any other, and one that was there before, gets them joined.
    """
    seen: set[str] = set()
    run.serve(call)

    def override(func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        def proceed(*args: Any) -> Tensor:
            return in_limits(func if inner is None else partial(inner, func), args, kwargs)

        layer = _layer(layers, seen, kwargs.get("transformer_options") or {}, args)
        if layer is None or not run.acts(call, layer):
            return proceed(*args)
        q, k, v, heads, *rest = args
        own = call.branch.attention is identity and call.branch.layers in layer.places
        check_queries(q, k, kwargs["transformer_options"].get("patches", {}).get("attn1_patch", ()), own)
        split = "b n (h d) -> b h n d"

        def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (rearrange(z, "b h n d -> b n (h d)") for z in (q, k, v))
            return rearrange(proceed(q, k, v, heads, *rest), split, h=heads)

        q, k, v = (rearrange(z, split, h=heads) for z in (q, k, v))
        plainly = inner is None and is_torchs(func) and all(each is None for each in rest)
        out = run.attend(call, layer, q, k, v, fused_attention if plainly else fused)
        return rearrange(out, "b h n d -> b n (h d)")

    return override


def in_limits(attention: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The host's attention (q, k, v, heads, mask) in no more sequences at once than CUDA takes: not all of the host's
    backends see to that, and temporal layers of a window's tiles have one for every position."""
    q, k, v, heads, *rest = args
    size = batch_limit(heads)
    if q.shape[0] <= size:
        return attention(*args, **kwargs)
    named = dict(kwargs)
    mask = rest[0] if rest else named.pop("mask", None)
    if mask is None or mask.ndim < 3 or mask.shape[0] == 1:
        return in_chunks(lambda q, k, v: attention(q, k, v, heads, mask, *rest[1:], **named), size, q, k, v)
    return in_chunks(lambda q, k, v, mask: attention(q, k, v, heads, mask, *rest[1:], **named), size, q, k, v, mask)


def _layer(
    layers: Mapping[str, Layer], seen: set[str], options: Mapping[str, Any], args: Sequence[Any]
) -> Layer | None:
    """The spatial self-attention layer that is asked for attention now, if it is one.

    A block's spatial layer and its temporal one go by one name and can have one shape; the spatial one comes first.
    """
    block, shape = options.get("block"), options.get("activations_shape")
    if block is None or shape is None or len(args) < 4:
        return None
    name = f"{block[0]}.{block[1]}.{options.get('block_index', 0)}"
    q, k = args[0], args[1]
    # By its keys: other packs' patches leave these, and give fewer queries (ToMe) or queries in windows (HyperTile).
    spatial = k.ndim == 3 and (k.shape[0], k.shape[1]) == (shape[0], shape[2] * shape[3]) and q.shape[2] == k.shape[2]
    if name in seen or not spatial:
        return None
    seen.add(name)
    return layers.get(name)


def check_queries(q: Tensor, k: Tensor, patches: Sequence[Any], each_its_own: bool) -> None:
    """Raises SettingError for queries `(b, n, c)` over keys `(b, m, c)` that another pack's `patches` have cut so that
    neither propagation nor guidance can act: those of another batch, and fewer where each token sees `each_its_own`, as
    under PAG. Else fewer are as good as all: what is appended, and a temperature, concern the keys."""
    if q.shape[0] == k.shape[0] and (q.shape[1] == k.shape[1] or not each_its_own):
        return
    names = ", ".join(sorted({str(getattr(patch, "__qualname__", patch)).split(".")[0] for patch in patches}))
    raise SettingError(
        f"a patch of this MODEL ({names or 'of its attention'}) asks with {q.shape[0]} x {q.shape[1]} queries over"
        f" {k.shape[0]} x {k.shape[1]} keys: expected equal ones, or VSR's SAP, TAP and guidance could not act; take"
        " that node off (HyperTile saves nothing in tiles; ToMe goes with all but PAG)"
    )
