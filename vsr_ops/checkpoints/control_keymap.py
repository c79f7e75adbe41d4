"""Names of a control's tensors: the original (LDM) layout against diffusers' own, and the configuration they show.

DiffBIR publishes its ControlNets for Stable Diffusion 2.1 under the original names: the UNet's encoder and middle
block, `zero_convs.N.0` after each of its blocks and `middle_block_out.0`. A first convolution of 8 channels takes
`[z_t ; hint]`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from .keymap import UNET, Names, pairs
from .ldm_unet import count, encoder_levels
from .safefile import Shapes
from .sd_keymap import sd_unet_map

#: The tensors of a control under the original names, alone or in a whole training checkpoint.
OWN = re.compile(
    r"^(?:module\.)?(?:control_model\.)?((?:input_blocks|zero_convs|middle_block|middle_block_out|time_embed)\..+)$"
)
#: What other files are told by, in order of how telling it is.
OTHERS = {
    r"(^|\.)input_hint_block\.": "a ControlNet whose hint is a picture (input_hint_block)",
    r"(^|\.)controlnet_cond_embedding\.": "a ControlNet whose hint is a picture (controlnet_cond_embedding)",
    r"lora_(up|down|A|B)\b|^lora_": "a LoRA",
    r"^model\.diffusion_model\.input_blocks\.0\.": "a Stable Diffusion checkpoint",
    r"^(double_blocks|joint_blocks|transformer_blocks)\.": "weights of a transformer, no UNet's",
    r"^(residual_group|layers)\.\d+\.|^conv_first\.": "an upscaler",
    r"^fusion_layer_\d+\.|\.fusion_layer_\d+\.": "a CFW",
    r"^(first_stage_model\.)?(encoder|decoder)\.conv_in\.": "a VAE",
    r"^down_blocks\.|^up_blocks\.": "a UNet or ControlNet of diffusers",
    r"^output_blocks\.": "a UNet",
}
#: What is read of a pickle: a control, and enough of anything else to say what it is.
WANTED = re.compile("|".join((OWN.pattern, *OTHERS)))
HEAD_WIDTH, HEADS = 64, 8

_ATTENDS, _PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"


def looks_like(names: Iterable[str]) -> str:
    """What a file with tensors of these names seems to be."""
    found = sorted(names)
    fits = (what for pattern, what in OTHERS.items() if any(re.search(pattern, name) for name in found))
    return next(fits, f"no known model, its {len(found)} tensors begin with {found[0] if found else 'nothing'}")


def control_map(config: Mapping[str, Any]) -> Names:
    """Original names, without prefix, to those of `Control`, for a UNet of diffusers' keyword arguments `config`."""
    up = [str(name).replace("Down", "Up") for name in reversed(config["down_block_types"])]
    whole = sd_unet_map({**config, "up_block_types": up})
    names = {old.removeprefix(UNET): new for old, new in whole.items()}
    names = {old: new for old, new in names.items() if OWN.match(old)}
    skips = 1 + max(int(old.split(".")[1]) for old in names if old.startswith("input_blocks."))
    zero = {f"zero_convs.{number}.0": f"controlnet_down_blocks.{number}" for number in range(skips)}
    return names | pairs({**zero, "middle_block_out.0": "controlnet_mid_block"})


def infer_config(shapes: Shapes) -> dict[str, Any]:
    """diffusers' keyword arguments of the UNet that a control under original names is a copy of.

    Heads are not to be seen in tensors: 64 channels each where projections are linear (Stable Diffusion 2), 8 of them
    where they are convolutions (1.5). Raises KeyError for a tensor that is not there, ValueError for impossible sizes.
    """
    widths, layers, depths = encoder_levels(shapes, "")
    if 0 in layers:
        raise ValueError(f"its levels have {layers} residual blocks, expected at least one each")
    down = [_ATTENDS if depth else _PLAIN for depth in depths]
    depths[-1] = count(shapes, "middle_block.1.transformer_blocks.{}.norm1.weight")
    linear = len(shapes["middle_block.1.proj_in.weight"]) == 2
    attended = {width for width, kind in zip(widths, down, strict=True) if kind == _ATTENDS} | {widths[-1]}
    unit = HEAD_WIDTH if linear else HEADS
    if any(width % unit for width in attended):
        what = f"{HEAD_WIDTH}-channel heads (linear projections)" if linear else f"{HEADS} heads"
        raise ValueError(f"attention is {sorted(attended)} wide, expected multiples of {unit} for {what}")
    return {
        "in_channels": shapes["input_blocks.0.0.weight"][1] // 2,
        "down_block_types": down,
        "block_out_channels": widths,
        "layers_per_block": layers,
        "transformer_layers_per_block": [depth or 1 for depth in depths],
        "attention_head_dim": [max(width // HEAD_WIDTH, 1) for width in widths] if linear else HEADS,
        "cross_attention_dim": shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
        "use_linear_projection": linear,
    }
