"""Where a UNet's middle block attends, which SAG blurs (SAG, section 4; DC-VSR, equation 5)."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from .attention import attention_received
from .calls import Call, token_grid
from .tiling import Merger, TilePlan


class Saliency:
    """Collects, per tile, the mask SAG blurs by: where the middle block gives a token more than an even share."""

    def __init__(self, plan: TilePlan) -> None:
        self._merger = Merger(plan)
        self._pending: dict[tuple[int, int], Tensor] = {}

    def observe(self, call: Call, q: Tensor, k: Tensor) -> None:
        """Takes the queries and keys of a middle self-attention layer; the last layer's count."""
        rows, cols = token_grid(k.shape[2], call.height, call.width)
        mask = rearrange((attention_received(q, k) > 1).float(), "b (y x) -> b 1 y x", y=rows, x=cols)
        full = torch.nn.functional.interpolate(mask, size=(call.height, call.width), mode="nearest")
        for i, m in enumerate(call.tiles):
            self._pending[call.window, m] = full[i * call.frames : (i + 1) * call.frames]

    def commit(self) -> None:
        """Blends in what was observed since the last time."""
        for (window, m), mask in self._pending.items():
            self._merger.add(window, m, mask)
        self._pending = {}

    def result(self) -> Tensor:
        """The mask `(frames, 1, h, w)` in [0, 1], tiles blended."""
        return self._merger.result()
