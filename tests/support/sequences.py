"""How many sequences the fused attentions within a block ask for."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class Sequences(TorchFunctionMode):
    """Notes batch times heads of every fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.seen.append(args[0].shape[0] * args[0].shape[1])
        return func(*args, **(kwargs or {}))
