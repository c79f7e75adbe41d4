"""What the trainer does to convolutions on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def safe_convolutions(model: nn.Module) -> None:
    """For CPUs, where the bfloat16 gradient of 3D convolutions has crashed. Those over time alone run as 2D ones, over
    frames and pixels, which is quicker too; the others stay out of autocast."""
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            over_time = module.kernel_size[1:] == (1, 1) and module.stride == (1, 1, 1)
            forward = partial(_over_time, module) if over_time else _in_float32(module.forward)
            module.forward = forward  # type: ignore[method-assign]


def _over_time(module: nn.Conv3d, x: Tensor) -> Tensor:
    flat = rearrange(x, "b c t h w -> b c t (h w)")
    out = F.conv2d(flat, module.weight.squeeze(-1), module.bias, padding=(int(module.padding[0]), 0))
    return rearrange(out, "b c t (h w) -> b c t h w", h=x.shape[-2])


def _in_float32(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def exact(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return forward(x.float())

    return exact
