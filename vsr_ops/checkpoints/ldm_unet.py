"""What the tensors of a UNet under its original (LDM) names show of its encoder: SVD, Stable Diffusion, a control."""

from __future__ import annotations

import itertools

from .safefile import Shapes


def count(shapes: Shapes, pattern: str) -> int:
    """How many of the names pattern.format(0), pattern.format(1) ... there are before the first gap."""
    return next(i for i in itertools.count() if pattern.format(i) not in shapes)


def encoder_levels(shapes: Shapes, prefix: str) -> tuple[list[int], list[int], list[int]]:
    """(widths, numbers of residual blocks, transformer blocks in each of their attentions), a number for each level."""
    widths, layers, depths = [0], [0], [0]
    index = 1
    while True:
        block = f"{prefix}input_blocks.{index}."
        if block + "0.op.weight" in shapes:
            widths, layers, depths = [*widths, 0], [*layers, 0], [*depths, 0]
        elif block + "0.out_layers.3.weight" in shapes:
            widths[-1] = shapes[block + "0.out_layers.3.weight"][0]
            layers[-1] += 1
            depths[-1] = count(shapes, block + "1.transformer_blocks.{}.norm1.weight")
        else:
            return widths, layers, depths
        index += 1
