"""The three models of an SVD: what builds each, its key map, and its configuration from an original file."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from ..errors import CheckpointError
from ..system.no_data import without_data
from . import keymap
from .keymap import CLIP, UNET, VAE, Names
from .ldm_unet import count, encoder_levels
from .safefile import Shapes, first_line

HEAD_WIDTH = 64
CLIP_HEADS = 16


def _one_or_all(values: list[int]) -> int | tuple[int, ...]:
    return values[0] if len(set(values)) == 1 else tuple(values)


def infer_unet(shapes: Shapes) -> dict[str, Any]:
    """diffusers' keyword arguments for an original UNet with heads of 64 channels, as published.

    Raises KeyError for a tensor that is not there and ValueError for a size that SVD cannot have.
    """
    levels = encoder_levels(shapes, UNET)
    middle = UNET + "middle_block.1.transformer_blocks."
    ends = [UNET + name for name in ("input_blocks.0.0.weight", "out.2.weight", "label_emb.0.0.weight")]
    return _unet_kwargs(shapes, levels, middle, ends)


def infer_unet_alone(shapes: Shapes) -> dict[str, Any]:
    """The same for a UNet under diffusers' own names. Raises as infer_unet does."""
    block = "down_blocks.{}.resnets.0.spatial_res_block.conv1.weight"
    widths, layers, depths = list[int](), list[int](), list[int]()
    for level in range(count(shapes, block)):
        down = f"down_blocks.{level}."
        widths.append(shapes[down + "resnets.0.spatial_res_block.conv2.weight"][0])
        layers.append(count(shapes, down + "resnets.{}.spatial_res_block.conv1.weight"))
        depths.append(count(shapes, down + "attentions.0.transformer_blocks.{}.norm1.weight"))
    middle = "mid_block.attentions.0.transformer_blocks."
    ends = ["conv_in.weight", "conv_out.weight", "add_embedding.linear_1.weight"]
    return _unet_kwargs(shapes, (widths, layers, depths), middle, ends)


def _unet_kwargs(
    shapes: Shapes, levels: tuple[list[int], list[int], list[int]], middle: str, ends: list[str]
) -> dict[str, Any]:
    """diffusers' keyword arguments of what `encoder_levels` gives, the names that the middle's transformer blocks begin
    with, and the first convolution's, the last one's and the added embedding's."""
    widths, layers, depths = levels
    first, last, embedding = ends
    attends = [depth > 0 for depth in depths]
    if not widths:
        raise KeyError(first)
    depths = [*depths[:-1], count(shapes, middle + "{}.norm1.weight")]
    for width, attention in zip(widths, [*attends[:-1], True], strict=True):
        if attention and width % HEAD_WIDTH:
            raise ValueError(f"attention is {width} wide, expected a multiple of {HEAD_WIDTH}-channel heads")
    extra = shapes[embedding][1]
    if extra % 3:
        raise ValueError(f"label_emb takes {extra} values, expected three embeddings (frame rate, motion, noise)")
    down = tuple("CrossAttnDownBlockSpatioTemporal" if a else "DownBlockSpatioTemporal" for a in attends)
    return {
        "in_channels": shapes[first][1],
        "out_channels": shapes[last][0],
        "down_block_types": down,
        "up_block_types": tuple(name.replace("Down", "Up") for name in reversed(down)),
        "block_out_channels": tuple(widths),
        "layers_per_block": _one_or_all(layers),
        "transformer_layers_per_block": _one_or_all([depth or 1 for depth in depths]),
        "num_attention_heads": tuple(max(width // HEAD_WIDTH, 1) for width in widths),
        "cross_attention_dim": shapes[middle + "0.attn2.to_k.weight"][1],
        "addition_time_embed_dim": extra // 3,
        "projection_class_embeddings_input_dim": extra,
    }


def infer_vae(shapes: Shapes) -> dict[str, Any]:
    """diffusers' keyword arguments for an original VAE with a temporal decoder. Raises as infer_unet does."""
    levels = count(shapes, VAE + "encoder.down.{}.block.0.conv1.weight")
    return {
        "in_channels": shapes[VAE + "encoder.conv_in.weight"][1],
        "out_channels": shapes[VAE + "decoder.conv_out.weight"][0],
        "latent_channels": shapes[VAE + "decoder.conv_in.weight"][1],
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "block_out_channels": tuple(
            shapes[f"{VAE}encoder.down.{level}.block.0.conv1.weight"][0] for level in range(levels)
        ),
        "layers_per_block": count(shapes, VAE + "encoder.down.0.block.{}.conv1.weight"),
    }


def in_transformers_names(names: Container[str]) -> bool:
    """Whether a file keeps the image encoder under transformers' names, as ComfyUI saves it."""
    return CLIP + "vision_model.embeddings.class_embedding" in names


def infer_clip(shapes: Shapes) -> dict[str, Any]:
    """transformers' keyword arguments for an original image encoder, by the conventions of OpenCLIP's ViT-H.

    Those are 16 heads and the exact GELU. Raises KeyError as infer_unet does.
    """
    if in_transformers_names(shapes):
        layers = count(shapes, CLIP + "vision_model.encoder.layers.{}.layer_norm1.weight")
        names = keymap.clip_map({"num_hidden_layers": layers})
        shapes = {old: shapes[CLIP + new] for old, new in names.items() if "*" not in new}
        shapes[CLIP + "proj"] = shapes[CLIP + "proj"][::-1]
    width, channels, patch, _ = shapes[CLIP + "conv1.weight"]
    patches = shapes[CLIP + "positional_embedding"][0] - 1
    return {
        "hidden_size": width,
        "intermediate_size": shapes[CLIP + "transformer.resblocks.0.mlp.c_fc.weight"][0],
        "num_hidden_layers": count(shapes, CLIP + "transformer.resblocks.{}.ln_1.weight"),
        "num_attention_heads": CLIP_HEADS,
        "num_channels": channels,
        "patch_size": patch,
        "image_size": math.isqrt(patches) * patch,
        "projection_dim": shapes[CLIP + "proj"][1],
        "hidden_act": "gelu",
    }


def _build_unet(kwargs: Mapping[str, Any]) -> tuple[nn.Module, Mapping[str, Any]]:
    from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel

    model = UNetSpatioTemporalConditionModel(**kwargs)
    return model, cast("Mapping[str, Any]", model.config)


def _build_vae(kwargs: Mapping[str, Any]) -> tuple[nn.Module, Mapping[str, Any]]:
    from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import AutoencoderKLTemporalDecoder

    model = AutoencoderKLTemporalDecoder(**kwargs)
    return model, cast("Mapping[str, Any]", model.config)


def _build_image_encoder(kwargs: Mapping[str, Any]) -> tuple[nn.Module, Mapping[str, Any]]:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(**kwargs)
    return CLIPVisionModelWithProjection(config), cast("Mapping[str, Any]", config.to_dict())


@dataclass(frozen=True)
class Part:
    """One model: its folder in a diffusers layout, its prefix in a single file, and how to plan it."""

    name: str
    prefix: str
    class_name: str
    stem: str
    build: Callable[[Mapping[str, Any]], tuple[nn.Module, Mapping[str, Any]]]
    names: Callable[[Mapping[str, Any]], Names]
    infer: Callable[[Shapes], dict[str, Any]]

    def plan(self, path: Path, kwargs: Mapping[str, Any]) -> tuple[dict[str, Tensor], Names]:
        """The state dict that a configuration asks for, without memory behind it, and its map."""
        state, names, _ = self.whole_plan(path, kwargs)
        return state, names

    def whole_plan(self, path: Path, kwargs: Mapping[str, Any]) -> tuple[dict[str, Tensor], Names, Mapping[str, Any]]:
        """The same, and the whole configuration: what `kwargs` leaves to the class too. Raises CheckpointError."""
        try:
            with without_data():
                model, config = self.build(kwargs)
            return model.state_dict(), self.names(config), config
        except Exception as error:  # whatever a wrong value breaks inside the other library
            reason = first_line(error)
            raise CheckpointError(
                f"{path}: its {self.name} configuration does not build a {self.class_name} ({reason}); "
                "expected that class's keyword arguments, use the file's original configuration"
            ) from error


_WEIGHTS = "diffusion_pytorch_model"
UNET_PART = Part(
    "unet",
    UNET,
    "UNetSpatioTemporalConditionModel",
    _WEIGHTS,
    _build_unet,
    keymap.unet_map,
    infer_unet,
)
VAE_PART = Part("vae", VAE, "AutoencoderKLTemporalDecoder", _WEIGHTS, _build_vae, keymap.vae_map, infer_vae)
IMAGE_ENCODER_PART = Part(
    "image_encoder",
    CLIP,
    "CLIPVisionModelWithProjection",
    "model",
    _build_image_encoder,
    keymap.clip_map,
    infer_clip,
)
PARTS = (UNET_PART, VAE_PART, IMAGE_ENCODER_PART)
