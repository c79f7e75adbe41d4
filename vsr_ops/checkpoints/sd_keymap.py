"""Names of Stable Diffusion's tensors: the original single-file layout against diffusers' own (see keymap.py)."""

from __future__ import annotations

from typing import Any

from .keymap import (
    ATTENTIONS,
    TIMED_RESNET,
    TRANSFORMER,
    UNET,
    VAE,
    Config,
    Names,
    below,
    pairs,
    unet_names,
    vae_names,
    vae_resnet,
)
from .ldm_unet import encoder_levels
from .safefile import Shapes

#: Stable Diffusion 1.x has this many attention heads at every level, 2.x heads of so many channels.
HEADS_1, HEAD_WIDTH_2 = 8, 64


def sd_unet_map(config: Config) -> Names:
    """Original names, with their prefix, to those of diffusers' UNet2DConditionModel."""
    return unet_names(config, _has_attention, _resnet, _transformer)


_WITH_ATTENTION = {"CrossAttnDownBlock2D": True, "DownBlock2D": False, "CrossAttnUpBlock2D": True, "UpBlock2D": False}


def _has_attention(block_type: str) -> bool:
    if block_type not in _WITH_ATTENTION:
        raise ValueError(f"block type '{block_type}', expected one of {', '.join(_WITH_ATTENTION)}")
    return _WITH_ATTENTION[block_type]


def _resnet(shortcut: bool) -> Names:
    return pairs({**TIMED_RESNET, **({"skip_connection": "conv_shortcut"} if shortcut else {})})


def _transformer(depth: int) -> Names:
    names = pairs({name: name for name in ("norm", "proj_in", "proj_out")})
    block = {**pairs({name: name for name in TRANSFORMER}), **{name: name for name in ATTENTIONS}}
    for layer in range(depth):
        names |= below(f"transformer_blocks.{layer}", f"transformer_blocks.{layer}", block)
    return names


def picture_vae_map(config: Config) -> Names:
    """Original names, with their prefix, to those of diffusers' AutoencoderKL."""
    quants = pairs({name: name for name in ("quant_conv", "post_quant_conv")})
    return vae_names(config, vae_resnet, 2) | {VAE + old: new for old, new in quants.items()}


def infer_sd_unet(shapes: Shapes) -> dict[str, Any]:
    """diffusers' keyword arguments for an original UNet of Stable Diffusion 1.x or 2.x.

    Raises KeyError for a tensor that is not there and ValueError for a UNet with other inputs.
    """
    first = shapes[UNET + "input_blocks.0.0.weight"]
    if first[1] != 4:
        raise ValueError(f"it takes {first[1]} channels, expected 4: not an inpainting, depth or upscaling model")
    if UNET + "label_emb.0.0.weight" in shapes:
        raise ValueError("it takes a label, as SDXL does")
    widths, layers, depths = encoder_levels(shapes, UNET)
    attends = [depth > 0 for depth in depths]
    linear = len(shapes[UNET + "middle_block.1.proj_in.weight"]) == 2
    return {
        "in_channels": 4,
        "out_channels": shapes[UNET + "out.2.weight"][0],
        "down_block_types": tuple("CrossAttnDownBlock2D" if on else "DownBlock2D" for on in attends),
        "up_block_types": tuple("CrossAttnUpBlock2D" if on else "UpBlock2D" for on in reversed(attends)),
        "block_out_channels": tuple(widths),
        "layers_per_block": layers[0] if len(set(layers)) == 1 else tuple(layers),
        "attention_head_dim": tuple(max(w // HEAD_WIDTH_2, 1) for w in widths) if linear else HEADS_1,
        "cross_attention_dim": shapes[UNET + "middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
        "use_linear_projection": linear,
        "upcast_attention": linear,
    }
