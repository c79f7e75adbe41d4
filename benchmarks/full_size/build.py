"""Stock SVD and Stable Diffusion 2.1 at their real size with random weights, through the pipeline's own loaders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import AutoencoderKLTemporalDecoder
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel
from torch import Tensor, nn

from benchmarks.common import FULL_TILE, FULL_VAE, filled
from vsr_ops.backbones.sd import build_sd
from vsr_ops.backbones.svd import Backbone, build_svd
from vsr_ops.checkpoints.sd import SDWeights
from vsr_ops.checkpoints.svd import SCALING_FACTOR, SVDWeights
from vsr_ops.sampling.tiling import TileSize

#: As the pipeline reads it out of a published file of Stable Diffusion 2.x.
SD21_UNET: dict[str, Any] = {
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "upcast_attention": True,
}
SD21_VAE: dict[str, Any] = {
    **FULL_VAE,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "scaling_factor": SCALING_FACTOR,
}
_TINY: dict[str, Any] = {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1, "cross_attention_dim": 16}
_TINY_VAE: dict[str, Any] = {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}


@dataclass(frozen=True)
class Sizes:
    """What diffusers' classes are told beside their defaults, which are stock SVD's and Stable Diffusion's; the tile
    in latents. Every size has all four levels, and so the same layers for SAP, TAP and guidance to act in."""

    svd: dict[str, Any]
    svd_vae: dict[str, Any]
    sd21: dict[str, Any]
    sd21_vae: dict[str, Any]
    tile: TileSize


CONFIGS = {
    "full": Sizes({}, FULL_VAE, SD21_UNET, SD21_VAE, FULL_TILE),
    "tiny": Sizes(
        {
            **_TINY,
            "num_attention_heads": (1, 1, 2, 2),
            "addition_time_embed_dim": 16,
            "projection_class_embeddings_input_dim": 48,
        },
        {**FULL_VAE, **_TINY_VAE},
        {**SD21_UNET, **_TINY, "attention_head_dim": (1, 1, 2, 2)},
        {**SD21_VAE, **_TINY_VAE},
        TileSize(16, 16, 2),
    ),
}


def _state(make: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    # The same weights in every precision, for one to be compared with another.
    torch.manual_seed(0)
    return dict(filled(make, device, dtype).state_dict())


def _svd(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Backbone:
    unet = _state(lambda: UNetSpatioTemporalConditionModel(**sizes.svd), device, dtype)
    vae = _state(lambda: AutoencoderKLTemporalDecoder(**sizes.svd_vae), device, dtype)
    tile = (sizes.tile.height, sizes.tile.width, sizes.tile.frames)
    return build_svd(SVDWeights(sizes.svd, sizes.svd_vae, None, unet, vae, None, tile, {}), device, dtype)


def _sd21(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Backbone:
    unet = _state(lambda: UNet2DConditionModel(**sizes.sd21), device, dtype)
    vae = _state(lambda: AutoencoderKL(**sizes.sd21_vae), device, dtype)
    tile = (sizes.tile.height, sizes.tile.width, sizes.tile.frames)
    return build_sd(SDWeights(sizes.sd21, "v_prediction", unet, tile, sizes.sd21_vae, vae), device, dtype)


@dataclass(frozen=True)
class Model:
    """A model of the table: its name there, and what builds it of a size on a device in a precision."""

    title: str
    build: Callable[[Sizes, torch.device, torch.dtype], Backbone]


MODELS = {"svd": Model("SVD", _svd), "sd21": Model("SD 2.1", _sd21)}
