"""Blocks of an autoencoder or a UNet that add nothing, because training for speed has made their last layer zero.

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


class Nothing(nn.Module):
    """Stands in the place of a branch that is added to what went into it, and adds nothing."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x.new_zeros(())


#: The branches of a transformer's block over time: each with the norm before it, and the layer that it ends with.
BRANCHES = (("ff_in", "norm_in", "net.2"), ("attn1", "norm1", "to_out.0"), ("ff", "norm3", "net.2"))


def leave_out_idle(model: nn.Module) -> None:
    """Puts stand-ins in the place of all that adds nothing in diffusers' networks.

    An `Idle` for a residual block, or its half over time, whose second convolution is zero, and for an autoencoder's
    attention whose projection is; `Nothing` for the feed-forwards and the self-attention of a UNet's blocks over time
    that end with a zero layer, and no norm before it. Attention within a frame stays, for methods act in it.
    """
    for name, child in list(model.named_children()):
        leave_out_idle(child)
        if getattr(child, "is_res", False) and hasattr(child, "ff_in"):
            _leave_out_branches(child)
        channels = _idle_channels(child)
        if channels is not None:
            model.add_module(name, Idle(channels))


def _leave_out_branches(block: nn.Module) -> None:
    for branch, norm, last in BRANCHES:
        if _is_zero(block.get_submodule(f"{branch}.{last}").parameters()):
            block.add_module(branch, Nothing())
            block.add_module(norm, nn.Identity())


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
