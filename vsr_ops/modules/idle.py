"""Blocks of an autoencoder that add nothing, because training for speed has made their last layer zero.

Such a file keeps the shape that every program expects and is read by all of them; here what adds nothing is not
computed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


class Idle(nn.Module):
    """Stands in a block's place and gives what it is given, `channels` wide."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x


def leave_out_idle(model: nn.Module) -> None:
    """Puts an `Idle` in the place of every block of diffusers' autoencoders that adds nothing: of a residual block, or
    its half over time, whose second convolution is zero, and of an attention whose projection is."""
    for name, child in list(model.named_children()):
        leave_out_idle(child)
        channels = _idle_channels(child)
        if channels is not None:
            model.add_module(name, Idle(channels))


def _idle_channels(block: Any) -> int | None:
    """A block's channels where it adds nothing; None where it acts."""
    if hasattr(block, "spatial_res_block") and hasattr(block, "temporal_res_block"):
        halves = (block.spatial_res_block, block.temporal_res_block)
        return halves[0].channels if all(isinstance(half, Idle) for half in halves) else None
    if hasattr(block, "norm1") and hasattr(block, "conv2"):
        odd = (getattr(block, name, None) for name in ("conv_shortcut", "upsample", "downsample"))
        plain = all(part is None for part in odd) and getattr(block, "output_scale_factor", 1) == 1
        idle = plain and _is_zero(block.conv2.parameters())
        return int(block.conv2.out_channels) if idle else None
    if hasattr(block, "to_out") and getattr(block, "residual_connection", False):
        idle = block.rescale_output_factor == 1 and _is_zero(block.to_out[0].parameters())
        return int(block.to_out[0].out_features) if idle else None
    return None


def _is_zero(weights: Iterable[Tensor]) -> bool:
    return all(not weight.is_meta and not bool(weight.any()) for weight in weights)
