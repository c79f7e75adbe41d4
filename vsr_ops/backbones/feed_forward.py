"""A transformer's feed-forward on a CPU: so many tokens at a time that what they are widened to stays in its caches.

All tiles of a window go through the UNet at once, and diffusers' own chunks are only of sizes that divide their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..modules.idle import Nothing

#: Of 512 to 4,096 the fastest at the bundled UNet's widths, by a fifth.
TOKENS = 2048


def keep_in_caches(model: nn.Module) -> None:
    """Has every feed-forward in a model of diffusers' go over its tokens in parts, on a CPU and where nobody learns."""
    for name, module in cast("Iterable[tuple[str, Any]]", model.named_modules()):
        if name.rpartition(".")[2] in ("ff", "ff_in") and not isinstance(module, Nothing):
            module.forward = partial(_in_parts, module.forward)


def _in_parts(forward: Callable[[Tensor], Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if x.device.type != "cpu" or torch.is_grad_enabled():
        return forward(x, *args, **kwargs)
    tokens = x.flatten(0, -2)
    if len(tokens) <= TOKENS:
        return forward(x, *args, **kwargs)
    first = forward(tokens[:TOKENS], *args, **kwargs)
    # Into one tensor: parts that wait to be joined would lie between what each of them leaves free.
    out = first.new_empty(len(tokens), first.shape[-1])
    out[:TOKENS] = first
    for start in range(TOKENS, len(tokens), TOKENS):
        part = slice(start, start + TOKENS)
        out[part] = forward(tokens[part], *args, **kwargs)
    return out.view(*x.shape[:-1], -1)
