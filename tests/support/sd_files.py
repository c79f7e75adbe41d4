"""A real but small Stable Diffusion 2 with a picture VAE, in the layouts that are published."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import TINY_VAE, randomise
from tests.support.text_files import WIDTH
from vsr_ops.checkpoints.keymap import to_original
from vsr_ops.checkpoints.sd_keymap import picture_vae_map, sd_unet_map

#: Heads of 64 channels and linear projections, as Stable Diffusion 2 has them.
UNET: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (64, 128),
    "layers_per_block": 1,
    "attention_head_dim": (1, 2),
    "cross_attention_dim": WIDTH,
    "use_linear_projection": True,
}
VAE = TINY_VAE | {"up_block_types": ["UpDecoderBlock2D"] * 4, "layers_per_block": 2}
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@dataclass(frozen=True)
class StableDiffusion:
    """diffusers' models."""

    unet: Any
    vae: Any

    def tensors(self) -> dict[str, Tensor]:
        """As the original single file has them."""
        unet, vae = self.unet.state_dict(), self.vae.state_dict()
        found = {old: unet[new] for old, new in sd_unet_map(self.unet.config).items()}
        found |= {old: to_original(old, new, vae) for old, new in picture_vae_map(self.vae.config).items()}
        return {key: value.contiguous() for key, value in found.items()}

    def save(self, folder: Path, **scheduler: Any) -> Path:
        """A diffusers folder without a text encoder, as one was published: its VAE under the names of that time."""
        self.unet.save_pretrained(folder / "unet")
        self.vae.save_pretrained(folder / "vae")
        DDIMScheduler(**BETAS | scheduler).save_pretrained(folder / "scheduler")
        file = folder / "vae/diffusion_pytorch_model.safetensors"
        save_file({once(key): value for key, value in load_file(file).items()}, file)
        return folder


def once(key: str) -> str:
    """A VAE's name in diffusers today, as it was in 2022."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    return re.sub(r"(attentions\.0)\.(to_q|to_k|to_v|to_out\.0)\.", lambda m: f"{m[1]}.{names[m[2]]}.", key)


def stable_diffusion() -> StableDiffusion:
    torch.manual_seed(0)
    unet, vae = UNet2DConditionModel(**UNET), AutoencoderKL(**VAE)
    for seed, model in enumerate((unet, vae)):
        model.eval().requires_grad_(False)
        randomise(model, 3 + seed)
    return StableDiffusion(unet, vae)
