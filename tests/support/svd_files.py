"""Real but small SVD weights and their files, for the tests of reading and writing them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from vsr_ops.checkpoints.svd import SVDWeights, read_svd, write_svd
from vsr_ops.errors import CheckpointError

UNET_CONFIG: dict[str, Any] = {
    "block_out_channels": (32, 64, 64, 64),
    "layers_per_block": 1,
    "num_attention_heads": (2, 4, 4, 4),
    "cross_attention_dim": 16,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24,
}
VAE_CONFIG: dict[str, Any] = {
    "block_out_channels": (32, 64, 64, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "layers_per_block": 1,
    "scaling_factor": 0.3,
}
CLIP_CONFIG: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 28,
    "projection_dim": 16,
    "hidden_act": "gelu",
}


def randomised(model: nn.Module) -> nn.Module:
    """Every weight away from its usual start, so that no two tensors of a shape agree."""
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def image_encoder(config: dict[str, Any]) -> nn.Module:
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**config)).eval()


def make(unet: dict[str, Any], vae: dict[str, Any], tile: tuple[int, int, int] = (16, 24, 6)) -> SVDWeights:
    torch.manual_seed(0)
    return SVDWeights(
        unet_config=unet,
        vae_config=vae,
        image_encoder_config=CLIP_CONFIG,
        unet=randomised(UNetSpatioTemporalConditionModel(**unet)).state_dict(),
        vae=randomised(AutoencoderKLTemporalDecoder(**vae)).state_dict(),
        image_encoder=randomised(image_encoder(CLIP_CONFIG)).state_dict(),
        tile=tile,
        metadata={"vsr.note": "kept", "modelspec.title": "of another file"},
    )


def make_stock() -> SVDWeights:
    """Small, but by stock SVD's conventions, so that its configuration can be read off the shapes."""
    return make(
        {"block_out_channels": (64, 64), "layers_per_block": 1, "num_attention_heads": (1, 1)}
        | {"down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal")}
        | {"up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal")}
        | {
            "cross_attention_dim": 16,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24,
        },
        {
            "block_out_channels": (32, 32),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "layers_per_block": 2,
        },
    )


def stock_file(path: Path, stock: SVDWeights) -> dict[str, Tensor]:
    """What an original file without our metadata holds; written at `path`."""
    write_svd(path, stock, "test noise", torch.float32)
    return load_file(path)


def save_folder(path: Path, stock: SVDWeights) -> None:
    """A diffusers folder as diffusers and transformers save it."""
    for name, model, state in (
        ("unet", UNetSpatioTemporalConditionModel(**stock.unet_config), stock.unet),
        ("vae", AutoencoderKLTemporalDecoder(**stock.vae_config), stock.vae),
        ("image_encoder", image_encoder(CLIP_CONFIG), stock.image_encoder),
    ):
        model.load_state_dict(state)
        model.save_pretrained(path / name)


def outputs(weights: SVDWeights) -> list[Tensor]:
    """Denoised, decoded and encoded tensors of fixed inputs, and an image embedding."""
    unet = UNetSpatioTemporalConditionModel(**weights.unet_config).eval()
    vae = AutoencoderKLTemporalDecoder(**weights.vae_config).eval()
    clip = image_encoder(weights.image_encoder_config or {})
    unet.load_state_dict(weights.unet)
    vae.load_state_dict(weights.vae)
    clip.load_state_dict(weights.image_encoder or {})
    random = torch.Generator().manual_seed(1)
    x, context = torch.randn(1, 3, 8, 8, 8, generator=random), torch.randn(1, 1, 16, generator=random)
    picture = torch.randn(1, 3, 28, 28, generator=random)
    with torch.no_grad():
        return [
            unet(x, torch.tensor(0.5), context, torch.tensor([[7.0, 127.0, 0.02]])).sample,
            vae.decode(x[0, :, :4], num_frames=3).sample,
            clip(picture).image_embeds,
            vae.encode(picture[..., :16, :16]).latent_dist.parameters,
        ]


def same(a: dict[str, Tensor] | None, b: dict[str, Tensor] | None) -> bool:
    return a is not None and b is not None and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def refusal(path: Path, dtype: torch.dtype = torch.float32) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_svd(path, dtype)
    message = str(caught.value)
    assert "\n" not in message
    return message


def edited(lite_file: Path, path: Path, edit: Callable[[dict[str, Tensor], dict[str, str]], None]) -> Path:
    tensors = load_file(lite_file)
    with safe_open(lite_file, "pt") as file:
        metadata = file.metadata()
    edit(tensors, metadata)
    save_file(tensors, path, metadata=metadata)
    return path
