"""One self-attention with extended keys and values and a temperature, and the perturbed forms guidance swaps in.

Tensors are `(videos*frames, heads, tokens, dim)`. Everything goes through one fused attention, torch's or a host's, in
no more sequences at a time than CUDA takes. Where it can say its log-sum-exp, what is appended is attended to apart and
merged, else the keys are joined.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .kernels import Kernel, lse_kernel


class KeyValue(NamedTuple):
    """Keys and values of one layer, both `(videos*frames, heads, tokens, dim)`; those to append `(videos or 1, frames
    or 1, heads, tokens, dim)`, 1 where all share them."""

    keys: Tensor
    values: Tensor


#: softmax(Q K^T / sqrt(d)) V, by torch or by a host.
Fused = Callable[[Tensor, Tensor, Tensor], Tensor]

#: Sequences, heads counted each, of one fused attention. Memory-efficient and flash attention put the batch on an axis
#: of CUDA's grid that ends here (pytorch#146704, #142228), and some kernels put batch times heads there.
SEQUENCES = 65535


def in_chunks(function: Callable[..., Tensor], size: int, *inputs: Tensor) -> Tensor:
    """`function(*inputs)` of at most `size` rows at a time, its parts joined; the inputs have as many rows each."""
    rows = inputs[0].shape[0]
    if rows <= size:
        return function(*inputs)
    return torch.cat([function(*(x[first : first + size] for x in inputs)) for first in range(0, rows, size)])


def batch_limit(heads: int) -> int:
    """The largest batch that one fused attention of so many heads may have."""
    return max(1, SEQUENCES // heads)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, *mask: Tensor) -> Tensor:
    """torch's own; a `mask`, if there is one, has the batch's length."""
    return in_chunks(F.scaled_dot_product_attention, batch_limit(q.shape[1]), q, k, v, *mask)


class SelfAttention(Protocol):
    """`extra` holds keys and values to append to the layer's own; `frames` how many frames one video has; `fused` does
    the attention itself."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, extra: KeyValue | None, frames: int, fused: Fused = ...
    ) -> Tensor: ...


def plain(
    q: Tensor, k: Tensor, v: Tensor, extra: KeyValue | None, frames: int, fused: Fused = fused_attention
) -> Tensor:
    """softmax(Q [K; K']^T / sqrt(d)) [V; V'], DC-VSR equations 1 and 2."""
    if extra is None:
        return fused(q, k, v)
    extra = KeyValue(extra.keys.to(k), extra.values.to(v))
    kernel = lse_kernel(q, k, v) if fused is fused_attention else None
    if kernel is None:
        return fused(q, joined(k, extra.keys, frames), joined(v, extra.values, frames))
    return merged(kernel, q, k, v, extra, frames)


def merged(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, extra: KeyValue, frames: int) -> Tensor:
    """`plain` as two attentions, to the layer's own keys and to the extra ones, weighed by their sums of exponentials.

    No key is copied: the queries of all videos or frames that share the extra keys attend to them in one call.
    """
    out, lse = with_lse(kernel, q, k, v)
    axes = dict(zip("mt", extra.keys.shape[:2], strict=True))
    rows, shared = (" ".join(axis for axis, size in axes.items() if (size == 1) is one) for one in (False, True))
    apart, folded, sizes = "(m t) h n", f"({rows}) h ({shared} n)", {"t": frames, "n": q.shape[2]}
    other, its = with_lse(kernel, rearrange(q, f"{apart} d -> {folded} d", **sizes), *(x.flatten(0, 1) for x in extra))
    other, its = rearrange(other, f"{folded} d -> {apart} d", **sizes), rearrange(its, f"{folded} -> {apart}", **sizes)
    share = torch.sigmoid(its - lse).unsqueeze(-1)
    return out.lerp_(other, share.to(out.dtype))


def with_lse(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A kernel's attention and log-sum-exp in no more sequences at once than CUDA takes."""
    size = batch_limit(q.shape[1])
    parts = [kernel(*(x[first : first + size] for x in (q, k, v))) for first in range(0, q.shape[0], size)]
    if len(parts) == 1:
        return parts[0]
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs), torch.cat(lses)


def joined(own: Tensor, extra: Tensor, frames: int) -> Tensor:
    """A layer's own tokens and those to append, of every frame."""
    apart = rearrange(own, "(m t) h n d -> m t h n d", t=frames)
    return torch.cat([apart, extra.expand(*apart.shape[:2], -1, -1, -1)], dim=3).flatten(0, 1)


def temperature(q: Tensor, k: Tensor, gamma: float, frames: int) -> Tensor:
    """max(gamma^2 q k, 1) of DC-VSR equation 7, q and k the largest |Q| and |K| of each video.

    `(videos*frames, 1, 1, 1)` float32, over the video's own keys, so that neither batching nor appended keys change it.
    """
    # amax and amin copy nothing, and on the CPU are some 7 times quicker than an infinity norm.
    peaks = [torch.maximum(x.amax(dim=(1, 2, 3)), -x.amin(dim=(1, 2, 3))) for x in (q, k)]
    tops = [rearrange(peak.float(), "(b t) -> b t", t=frames).amax(dim=1) for peak in peaks]
    divisor = (gamma**2 * tops[0] * tops[1]).clamp(min=1)
    return rearrange(divisor.repeat_interleave(frames), "b -> b 1 1 1")


@dataclass(frozen=True)
class Tempered:
    """DC-VSR equation 7: attention blurred by gamma in [0, 1]. Gamma 0 is `plain`, bit for bit.

    Scales Q in place before the fused attention (no extra memory), so `q` must be the caller's to spend.
    """

    gamma: float

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, extra: KeyValue | None, frames: int, fused: Fused = fused_attention
    ) -> Tensor:
        if self.gamma > 0:
            # By its root twice: the temperature may be above float16's largest number, and for a float32 divisor the
            # CPU would make two float32 copies of a half precision Q.
            root = temperature(q, k, self.gamma, frames).sqrt().to(q.dtype)
            q = q.div_(root).div_(root)
        return plain(q, k, v, extra, frames, fused)


def identity(
    q: Tensor, k: Tensor, v: Tensor, extra: KeyValue | None, frames: int, fused: Fused = fused_attention
) -> Tensor:
    """PAG's perturbation (DC-VSR, equation 6): every token attends to itself alone, so the values pass through."""
    return v


def attention_received(q: Tensor, k: Tensor) -> Tensor:
    """How much attention each token receives, mean over heads and sum over as many queries as tokens (of fewer, as
    token merging leaves, each counts for more): `(videos*frames, tokens)` float32.

    1 is what a token gets when attention is even. For small layers: it forms the whole attention map.
    """
    scores = torch.einsum("b h i d, b h j d -> b h i j", q.float(), k.float()) / q.shape[-1] ** 0.5
    return scores.softmax(-1).mean(1).sum(1) * (k.shape[2] / q.shape[2])
