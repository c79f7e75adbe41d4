"""torch's fused attentions that can say their log-sum-exp, so that attention to two sets of keys can be merged.

`scaled_dot_product_attention` keeps it to itself; the kernels that it chooses from give it. Torch's own ring attention
(torch.distributed.tensor.experimental) merges by the same numbers of the same kernels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

#: softmax(Q K^T / sqrt(d)) V of `(b, heads, tokens, dim)`, and log sum exp(Q K^T / sqrt(d)) `(b, heads, tokens)` in
#: float32 or better.
Kernel = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

_aten = torch.ops.aten


def _cpu(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v)
    return out, lse


def _flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _aten._scaled_dot_product_flash_attention.default(q, k, v)
    return out, lse


def _efficient(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _aten._scaled_dot_product_efficient_attention.default(q, k, v, None, True)
    # It stands in whole blocks of 32 queries.
    return out, lse[..., : q.shape[2]]


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _aten._scaled_dot_product_cudnn_attention.default(q, k, v, None, True)
    return out, lse.reshape(q.shape[:3])


#: By device, and by what torch would choose there.
KERNELS: dict[tuple[str, str], Kernel] = {
    ("cpu", "flash"): _cpu,
    ("cuda", "flash"): _flash,
    ("cuda", "efficient"): _efficient,
    ("cuda", "cudnn"): _cudnn,
}
_NAMES = {
    SDPBackend.FLASH_ATTENTION.value: "flash",
    SDPBackend.EFFICIENT_ATTENTION.value: "efficient",
    SDPBackend.CUDNN_ATTENTION.value: "cudnn",
}


def lse_kernel(q: Tensor, k: Tensor, v: Tensor) -> Kernel | None:
    """The kernel that torch's own attention would take for these; None where it has none that says its log-sum-exp."""
    # AMD's kernels go by the same names; nobody has seen what their log-sum-exp is to the base of.
    if torch.version.hip is not None or (q.device.type == "cuda" and q.shape[-1] % 8):
        return None
    return KERNELS.get((q.device.type, chosen(q, k, v)))


def chosen(q: Tensor, k: Tensor, v: Tensor) -> str:
    """What torch's own attention would take, by its name in KERNELS; another for one that is not there."""
    if not torch.compiler.is_compiling():
        return _NAMES.get(torch._fused_sdp_choice(q, k, v), "math")  # pyright: ignore[reportPrivateImportUsage]
    # The compiler cannot follow that question; these it can.
    if q.device.type != "cuda":
        return "flash"
    asked = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, False)
    if torch.backends.cuda.can_use_flash_attention(asked):
        return "flash"
    return "efficient" if torch.backends.cuda.can_use_efficient_attention(asked) else "math"
