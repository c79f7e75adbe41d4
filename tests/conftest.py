"""What the tests share: one torch thread (the tensors are tiny), and a real but small Stable Video Diffusion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

if TYPE_CHECKING:
    from vsr_ops.backbones.svd import SVD

torch.set_num_threads(1)

#: Three levels, so that an 8x8 latent still has 2x2 tokens in the middle block.
TINY_UNET: dict[str, Any] = {
    "in_channels": 8,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlockSpatioTemporal"] * 2 + ["DownBlockSpatioTemporal"],
    "up_block_types": ["UpBlockSpatioTemporal"] + ["CrossAttnUpBlockSpatioTemporal"] * 2,
    "block_out_channels": [32, 64, 64],
    "layers_per_block": 1,
    "transformer_layers_per_block": 1,
    "num_attention_heads": [2, 2, 2],
    "cross_attention_dim": 16,
    "addition_time_embed_dim": 16,
    "projection_class_embeddings_input_dim": 48,
    "num_frames": 4,
}
TINY_VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "block_out_channels": [32, 32, 32, 32],
    "layers_per_block": 1,
    "latent_channels": 4,
    "sample_size": 64,
    "scaling_factor": 0.18215,
}


def randomise(module: nn.Module, seed: int) -> None:
    """Fills every parameter, also those that diffusers starts at a constant, so that every path matters."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            noise = torch.randn(weight.shape, generator=rng)
            if weight.ndim > 1:
                # Sharper attention than a fresh model's, so that what is attended to shows in the output; not so sharp
                # that the network amplifies rounding (it does by 60 at a gain of 3, by 2.5 at this one).
                gain = 1.5 if name.endswith(("to_q.weight", "to_k.weight")) else 1.0
                weight.copy_(gain * noise / weight[0].numel() ** 0.5)
            elif name.endswith("mix_factor"):
                weight.copy_(noise)
            else:
                centre = 1.0 if name.endswith("weight") else 0.0
                weight.copy_(centre + 0.2 * noise)


@pytest.fixture(scope="session")
def tiny() -> SVD:
    """An SVD of about 2.4 million random parameters: diffusers' own UNet and temporal VAE; tiles 8x8x4, no CLIP."""
    from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel

    from vsr_ops.backbones.svd import build_svd
    from vsr_ops.checkpoints.svd import SVDWeights

    unet, vae = UNetSpatioTemporalConditionModel(**TINY_UNET), AutoencoderKLTemporalDecoder(**TINY_VAE)
    randomise(unet, 1)
    randomise(vae, 2)
    weights = SVDWeights(TINY_UNET, TINY_VAE, None, unet.state_dict(), vae.state_dict(), None, (8, 8, 4), {})
    return build_svd(weights, torch.device("cpu"), torch.float32)
