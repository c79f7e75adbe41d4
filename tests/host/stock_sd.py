"""Files that the host and the pack take for Stable Diffusion 2.1, DiffBIR's control and StableSR's CFW: their layouts
and names, random weights.

The UNet is as narrow and shallow as the host's detection allows (320 channels, a text of 1024), and the control a copy
of it. The VAE and the text encoder have one size in the host: of the text encoder, zeros but for positions and the last
norm, a file with holes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.host.stock_svd import Shapes, layer_shapes, norms, random_state, write_with_holes
from vsr_ops.checkpoints.control_keymap import control_map
from vsr_ops.checkpoints.keymap import to_original
from vsr_ops.checkpoints.sd_keymap import picture_vae_map, sd_unet_map
from vsr_ops.modules.cfw import CFW, CFWShape
from vsr_ops.modules.control import Control

UNET: dict[str, Any] = {
    "block_out_channels": (320, 320),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": (5, 5),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
#: Of the VAE's widths, and little between them.
WRAPPING = CFWShape((1, 2), (256, 512), blocks=1, grow=8)
#: OpenCLIP's ViT-H/14, text: width, layers, the width of its hidden layers, words, tokens.
WIDTH, LAYERS, HIDDEN, WORDS, TOKENS = 1024, 24, 4096, 49408, 77
TEXT_PREFIX = "cond_stage_model.model."


def text_shapes() -> Shapes:
    """The text encoder's tensors, by OpenCLIP's names, without positions and the last norm."""
    layer = layer_shapes(WIDTH, HIDDEN)
    return {
        "token_embedding.weight": (WORDS, WIDTH),
        "text_projection": (WIDTH, WIDTH),
        **{f"transformer.resblocks.{k}.{key}": shape for k in range(LAYERS) for key, shape in layer.items()},
    }


def text_state() -> dict[str, Tensor]:
    """Positions, and a last norm that lets them through."""
    norm = {key: torch.full(shape, float(key.endswith("weight"))) for key, shape in norms(WIDTH, "ln_final").items()}
    return {"positional_embedding": torch.randn(TOKENS, WIDTH), **norm}


def sd_state() -> dict[str, Tensor]:
    """UNet and VAE under the original's names."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with torch.device("meta"):
        models = UNet2DConditionModel(**UNET), AutoencoderKL(**VAE)
    unet, vae = (random_state(model) for model in models)
    found = {old: unet[new] for old, new in sd_unet_map(models[0].config).items()}
    return found | {old: to_original(old, new, vae) for old, new in picture_vae_map(models[1].config).items()}


def place_stock_sd(models: Path, checkpoint: str, control: str, cfw: str) -> None:
    """The three, under the names that a graph asks for, in the host's folder of models."""
    torch.manual_seed(0)
    for folder in ("checkpoints", "controlnet", "vsr_cfw"):
        (models / folder).mkdir(parents=True, exist_ok=True)
    text = {TEXT_PREFIX + key: value for key, value in text_state().items()}
    holes = {TEXT_PREFIX + key: shape for key, shape in text_shapes().items()}
    write_with_holes(models / "checkpoints" / checkpoint, {**sd_state(), **text}, holes)
    with torch.device("meta"):
        seeing, wrapping = Control(UNET), CFW(WRAPPING)
    state = random_state(seeing)
    torch.save({old: state[new] for old, new in control_map(seeing.config).items()}, models / "controlnet" / control)
    torch.save({"state_dict": random_state(wrapping)}, models / "vsr_cfw" / cfw)
