"""What a VAE computes in: its encoder overflows float16, its decoder now and then."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

log = logging.getLogger(__name__)


def dtype_of(module: nn.Module) -> torch.dtype:
    """The precision of a module's weights."""
    return next(cast("Iterator[Tensor]", module.parameters())).dtype


def narrow(vae: Any, dtype: torch.dtype) -> None:
    """Puts a diffusers VAE into `dtype`; where that is float16, its encoder into float32: SVD's and SD's overflow."""
    for part in vae.children():
        part.to(dtype)
    if dtype == torch.float16:
        for part in (vae.encoder, getattr(vae, "quant_conv", None)):
            if part is not None:
                part.float()


def widen(vae: Any) -> bool:
    """Puts a decoder that overflowed float16 into bfloat16, which has float32's range, or into float32 on a card that
    has no bfloat16; False where it is no float16 decoder."""
    device = next(cast("Iterator[Tensor]", vae.decoder.parameters())).device
    if dtype_of(vae.decoder) != torch.float16:
        return False
    has = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    wide = torch.bfloat16 if has else torch.float32
    for part in (vae.decoder, getattr(vae, "post_quant_conv", None)):
        if part is not None:
            part.to(wide)
    log.warning("The VAE's decoder overflowed float16: it goes on in %s", str(wide).removeprefix("torch."))
    return True


def run_like(module: nn.Module, x: Tensor, *more: Tensor) -> Tensor:
    """What a module gives in the precision of `x`, whatever its weights lie in: they are small beside what goes through
    it, and their owner keeps them as they are. Norms and softmax gather in float32 within their kernels."""
    if dtype_of(module) == x.dtype:
        return module(x, *more)
    weights = {name: value.to(x.dtype) for name, value in module.named_parameters()}
    return cast(Tensor, functional_call(module, weights, (x, *(each.to(x.dtype) for each in more))))


def decoded_within(vae: Any, decode: Callable[[], Tensor], widen: Callable[[Any], bool] = widen) -> Tensor:
    """What `decode` gives; where a float16 decoder overflows it is widened, and decodes this again and all that
    follows. What is not finite even so is for whoever counts frames to refuse."""
    out = decode()
    if dtype_of(vae.decoder) != torch.float16 or bool(torch.isfinite(out).all()) or not widen(vae):
        return out
    return decode()
