"""Names of Stable Video Diffusion's tensors: the original single-file layout against diffusers' own.

A map is plain data, `{original name: diffusers name}`, built from a configuration, so that the full model and
a small one share the code. Three kinds of tensor differ in more than the name:

- a `*` in the diffusers name stands for q, k and v, which the original stacks in that order along dim 0;
- the projections of the VAE's attention are 1x1 convolutions `(o, i, 1, 1)` there and matrices `(o, i)` here;
- CLIP's output projection `(width, projection)` is stored transposed here.

The original VAE has no `quant_conv`: its encoder's last convolution carries it, so the maps leave it out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = "conditioner.embedders.0.open_clip.model.visual."
QUANT = VAE + "quant_conv."

Config = Mapping[str, Any]
Names = dict[str, str]
#: Names in one residual block, by whether it has a shortcut, and in one transformer, by its depth.
Resnet = Callable[[bool], Names]
Transformer = Callable[[int], Names]

_CONV_ATTENTION = re.compile(r"\.attn_1\.(q|k|v|proj_out)\.weight$")
_WITH_ATTENTION = {
    "CrossAttnDownBlockSpatioTemporal": True,
    "DownBlockSpatioTemporal": False,
    "CrossAttnUpBlockSpatioTemporal": True,
    "UpBlockSpatioTemporal": False,
}


def has_attention(block_type: str) -> bool:
    """Whether diffusers blocks of this type hold attention. Raises ValueError for one that SVD lacks."""
    if block_type not in _WITH_ATTENTION:
        raise ValueError(f"block type '{block_type}', expected one of {', '.join(_WITH_ATTENTION)}")
    return _WITH_ATTENTION[block_type]


def pairs(modules: Mapping[str, str]) -> Names:
    """Weight and bias of each module."""
    return {f"{old}.{p}": f"{new}.{p}" for old, new in modules.items() for p in ("weight", "bias")}


def below(old: str, new: str, names: Mapping[str, str]) -> Names:
    """Names of a part in both projects, under where the part is in each."""
    return {f"{old}.{a}": f"{new}.{b}" for a, b in names.items()}


def _per_level(value: int | Sequence[int], levels: int) -> list[int]:
    return [value] * levels if isinstance(value, int) else list(value)


# --- UNet ---------------------------------------------------------------------------------------------------

_RESNET = {"in_layers.0": "norm1", "in_layers.2": "conv1", "out_layers.0": "norm2", "out_layers.3": "conv2"}
TIMED_RESNET = {**_RESNET, "emb_layers.1": "time_emb_proj"}
ATTENTIONS = [f"attn{n}.to_{p}.weight" for n in (1, 2) for p in "qkv"]
TRANSFORMER = ["norm1", "norm2", "norm3", "attn1.to_out.0", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2"]


def _spatio_temporal_resnet(shortcut: bool) -> Names:
    spatial = {**TIMED_RESNET, **({"skip_connection": "conv_shortcut"} if shortcut else {})}
    return {
        **pairs({old: f"spatial_res_block.{new}" for old, new in spatial.items()}),
        **pairs({f"time_stack.{old}": f"temporal_res_block.{new}" for old, new in TIMED_RESNET.items()}),
        "time_mixer.mix_factor": "time_mixer.mix_factor",
    }


def _spatio_temporal_transformer(depth: int) -> Names:
    names = pairs({n: n for n in ("norm", "proj_in", "proj_out")})
    names |= pairs({"time_pos_embed.0": "time_pos_embed.linear_1", "time_pos_embed.2": "time_pos_embed.linear_2"})
    names["time_mixer.mix_factor"] = "time_mixer.mix_factor"
    temporal = [*TRANSFORMER, "norm_in", "ff_in.net.0.proj", "ff_in.net.2"]
    for layer in range(depth):
        for old, new, modules in (
            ("transformer_blocks", "transformer_blocks", TRANSFORMER),
            ("time_stack", "temporal_transformer_blocks", temporal),
        ):
            block = {**pairs({n: n for n in modules}), **{n: n for n in ATTENTIONS}}
            names |= below(f"{old}.{layer}", f"{new}.{layer}", block)
    return names


def unet_map(config: Config) -> Names:
    """Original names, with their prefix, to those of diffusers' UNetSpatioTemporalConditionModel."""
    names = unet_names(config, has_attention, _spatio_temporal_resnet, _spatio_temporal_transformer)
    embeddings = pairs({"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"})
    return names | {UNET + old: new for old, new in embeddings.items()}


def unet_names(config: Config, attends: Callable[[str], bool], resnet: Resnet, transformer: Transformer) -> Names:
    """Original names, with their prefix, to diffusers', of a UNet made of such residual blocks and, in the blocks of
    the types that `attends`, such transformers."""
    widths: list[int] = list(config["block_out_channels"])
    levels = len(widths)
    layers = _per_level(config["layers_per_block"], levels)
    depths = _per_level(config["transformer_layers_per_block"], levels)
    names = pairs(
        {
            "time_embed.0": "time_embedding.linear_1",
            "time_embed.2": "time_embedding.linear_2",
            "input_blocks.0.0": "conv_in",
            "out.0": "conv_norm_out",
            "out.2": "conv_out",
        }
    )
    index = 1
    for level, block_type in enumerate(config["down_block_types"]):
        new = f"down_blocks.{level}"
        for layer in range(layers[level]):
            shortcut = layer == 0 and widths[max(level - 1, 0)] != widths[level]
            names |= below(f"input_blocks.{index}.0", f"{new}.resnets.{layer}", resnet(shortcut))
            if attends(block_type):
                block = transformer(depths[level])
                names |= below(f"input_blocks.{index}.1", f"{new}.attentions.{layer}", block)
            index += 1
        if level < levels - 1:
            names |= pairs({f"input_blocks.{index}.0.op": f"{new}.downsamplers.0.conv"})
            index += 1
    for old, layer in ((0, 0), (2, 1)):
        names |= below(f"middle_block.{old}", f"mid_block.resnets.{layer}", resnet(False))
    names |= below("middle_block.1", "mid_block.attentions.0", transformer(depths[-1]))
    names |= _up_blocks(widths, layers, depths, list(config["up_block_types"]), attends, resnet, transformer)
    return {UNET + old: new for old, new in names.items()}


def _up_blocks(
    widths: list[int],
    layers: list[int],
    depths: list[int],
    block_types: list[str],
    attends: Callable[[str], bool],
    resnet: Resnet,
    transformer: Transformer,
) -> Names:
    names: Names = {}
    index = 0
    lower = widths[-1]
    for up, block_type in enumerate(block_types):
        level = len(widths) - 1 - up
        new = f"up_blocks.{up}"
        for layer in range(layers[level] + 1):
            last = layer == layers[level]
            skip = widths[max(level - 1, 0)] if last else widths[level]
            shortcut = (lower if layer == 0 else widths[level]) + skip != widths[level]
            names |= below(f"output_blocks.{index}.0", f"{new}.resnets.{layer}", resnet(shortcut))
            if attends(block_type):
                block = transformer(depths[level])
                names |= below(f"output_blocks.{index}.1", f"{new}.attentions.{layer}", block)
            if last and level > 0:
                place = 2 if attends(block_type) else 1
                names |= pairs({f"output_blocks.{index}.{place}.conv": f"{new}.upsamplers.0.conv"})
            index += 1
        lower = widths[level]
    return names


# --- VAE ----------------------------------------------------------------------------------------------------

_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def vae_resnet(shortcut: bool) -> Names:
    """Names in a residual block of a picture VAE."""
    modules = {n: n for n in ("norm1", "conv1", "norm2", "conv2")}
    return pairs({**modules, **({"nin_shortcut": "conv_shortcut"} if shortcut else {})})


def _vae_temporal_resnet(shortcut: bool) -> Names:
    return {
        **{old: f"spatial_res_block.{new}" for old, new in vae_resnet(shortcut).items()},
        **pairs({f"time_stack.{old}": f"temporal_res_block.{new}" for old, new in _RESNET.items()}),
        "mix_factor": "time_mixer.mix_factor",
    }


def vae_map(config: Config) -> Names:
    """Original names, with their prefix, to those of diffusers' AutoencoderKLTemporalDecoder."""
    names = vae_names(config, _vae_temporal_resnet, config["layers_per_block"])
    time = pairs({"decoder.conv_out.time_mix_conv": "decoder.time_conv_out"})
    return names | {VAE + old: new for old, new in time.items()}


def vae_names(config: Config, decoder_resnet: Resnet, decoder_middle: int) -> Names:
    """Original names, with their prefix, to diffusers', of a VAE whose decoder has such residual blocks, and
    `decoder_middle` of them in its middle."""
    widths: list[int] = list(config["block_out_channels"])
    layers: int = config["layers_per_block"]
    names: Names = {}
    for side, resnet, middle in (("encoder", vae_resnet, 2), ("decoder", decoder_resnet, decoder_middle)):
        names |= pairs({f"{side}.{n}": f"{side}.{n}" for n in ("conv_in", "conv_out")})
        names |= pairs({f"{side}.norm_out": f"{side}.conv_norm_out"})
        names |= below(f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0", pairs(_VAE_ATTENTION))
        for layer in range(middle):
            names |= below(f"{side}.mid.block_{layer + 1}", f"{side}.mid_block.resnets.{layer}", resnet(False))
    top = len(widths) - 1
    for level, width in enumerate(widths):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{top - level}"
        for layer in range(layers):
            block = vae_resnet(layer == 0 and widths[max(level - 1, 0)] != width)
            names |= below(f"encoder.down.{level}.block.{layer}", f"{down}.resnets.{layer}", block)
        for layer in range(layers + 1):
            block = decoder_resnet(layer == 0 and widths[min(level + 1, top)] != width)
            names |= below(f"decoder.up.{level}.block.{layer}", f"{up}.resnets.{layer}", block)
        if level < top:
            names |= pairs({f"encoder.down.{level}.downsample.conv": f"{down}.downsamplers.0.conv"})
        if level > 0:
            names |= pairs({f"decoder.up.{level}.upsample.conv": f"{up}.upsamplers.0.conv"})
    return {VAE + old: new for old, new in names.items()}


# --- CLIP image encoder -------------------------------------------------------------------------------------


#: Names in one layer of OpenCLIP's transformers, of pictures and of texts, and in transformers'.
CLIP_LAYER: Names = {
    "attn.in_proj_weight": "self_attn.*_proj.weight",
    "attn.in_proj_bias": "self_attn.*_proj.bias",
    **pairs({"attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}),
    **pairs({"ln_1": "layer_norm1", "ln_2": "layer_norm2"}),
}


def clip_map(config: Config) -> Names:
    """Original (open_clip) names, with prefix, to those of transformers' CLIPVisionModelWithProjection."""
    embeddings = "vision_model.embeddings"
    names = {
        "class_embedding": f"{embeddings}.class_embedding",
        "positional_embedding": f"{embeddings}.position_embedding.weight",
        "conv1.weight": f"{embeddings}.patch_embedding.weight",
        "proj": "visual_projection.weight",
        **pairs({"ln_pre": "vision_model.pre_layrnorm", "ln_post": "vision_model.post_layernorm"}),
    }
    for layer in range(config["num_hidden_layers"]):
        names |= below(f"transformer.resblocks.{layer}", f"vision_model.encoder.layers.{layer}", CLIP_LAYER)
    return {CLIP + old: new for old, new in names.items()}


def expand(name: str) -> list[str]:
    """The diffusers names that one entry of a map stands for: three for a `*`, else the name itself."""
    return [name.replace("*", part) for part in "qkv"] if "*" in name else [name]


def to_diffusers(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """One original tensor, whose map entry is `name`, as the tensor or tensors of diffusers."""
    if name == "visual_projection.weight":
        tensor = tensor.T.contiguous()
    elif ".attentions.0.to_" in name and tensor.ndim == 4:
        tensor = tensor.flatten(1)
    parts = [part.clone() for part in tensor.chunk(3)] if "*" in name else [tensor]
    yield from zip(expand(name), parts, strict=True)


def to_original(original: str, name: str, weights: Mapping[str, Tensor]) -> Tensor:
    """What the original layout stores as `original`, from diffusers' `weights`; `name` is its map entry."""
    parts = [weights[part] for part in expand(name)]
    if len(parts) == 3:
        return torch.cat(parts)
    if name == "visual_projection.weight":
        return parts[0].T
    return parts[0][:, :, None, None] if _CONV_ATTENTION.search(original) else parts[0]


def fold_quant_conv(vae: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' VAE weights without `quant_conv`, folded into the encoder's last convolution (in float64).

    A 1x1 convolution after a 3x3 one is one 3x3 convolution, borders included. An identity leaves the bits
    alone.
    """
    folded = {k: v for k, v in vae.items() if not k.startswith("quant_conv.")}
    mix, shift = (
        vae["quant_conv.weight"].detach().double().flatten(1),
        vae["quant_conv.bias"].detach().double(),
    )
    if torch.equal(mix, torch.eye(len(mix), dtype=mix.dtype, device=mix.device)) and not shift.any():
        return folded
    weight, bias = vae["encoder.conv_out.weight"].detach(), vae["encoder.conv_out.bias"].detach()
    folded["encoder.conv_out.weight"] = torch.einsum("oc,cihw->oihw", mix, weight.double()).to(weight.dtype)
    folded["encoder.conv_out.bias"] = (mix @ bias.double() + shift).to(bias.dtype)
    return folded


def identity_quant_conv(channels: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The `quant_conv` that changes nothing, for `channels` moments (twice the latent channels)."""
    eye = torch.eye(channels, dtype=dtype)[:, :, None, None]
    return {"quant_conv.weight": eye, "quant_conv.bias": torch.zeros(channels, dtype=dtype)}


def idle_middle_block(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the original decoder's middle has more when `layers_per_block` is 1, set to change nothing.

    The original always runs attention and a second block there; diffusers, with one layer, runs neither. With
    every last convolution zero both are exact identities. `weights` is an original-named VAE; its attention
    is replaced.
    """
    first, second = VAE + "decoder.mid.block_1.", VAE + "decoder.mid.block_2."
    idle = {second + k[len(first) :]: _zeros(v) for k, v in weights.items() if k.startswith(first)}
    return idle | {k: _zeros(v) for k, v in weights.items() if k.startswith(VAE + "decoder.mid.attn_1.proj_out.")}


def _zeros(like: Tensor) -> Tensor:
    # torch.zeros_like imports SymPy where a tensor has no data: half a second.
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device)
