"""What is known of a MODEL: its layers, its tile and the plan a tiled run follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_base
import comfy.model_management
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from ...vsr_ops.errors import SettingError
from ...vsr_ops.pipeline.defaults import DEFAULTS, Defaults
from ...vsr_ops.sampling.layers import Layer, place_layers
from ...vsr_ops.sampling.tiling import TilePlan, TileSize, plan_tiles
from ..session.run import KEY, Tiles, resolve_tile

#: What SVD was published with; it suits Stable Diffusion too.
STOCK_TILE = TileSize(64, 64, 14)
#: Tokens of CLIP's text, and the widths in which SD 1.5, SD 2.1, SDXL's refiner and SDXL take them.
CLIP_TOKENS, CLIP_WIDTHS = 77, (768, 1024, 1280, 2048)
#: Share of the device's memory beside the weights that a window's tiles may take together.
SYNCHRONOUS_SHARE = 0.7


def is_svd(model: Any) -> bool:
    """Whether a MODEL is of SVD's family: per-frame batches and concat latents."""
    return isinstance(model.model, comfy.model_base.SVD_img2vid)


def require_svd(model: Any, node: str) -> None:
    """Raises SettingError for a MODEL that is not of SVD's family."""
    if not is_svd(model):
        raise SettingError(
            f"{node} got a {type(model.model).__name__} MODEL: expected Stable Video Diffusion; wire Load Lite SVD, or"
            " Image Only Checkpoint Loader with svd.safetensors or svd_xt.safetensors"
        )


def require_unet(model: Any, node: str) -> None:
    """Raises SettingError for a MODEL whose UNet cannot run in tiles: its latents must be frames in a batch, and
    spatial self-attention must be there for propagation to act in."""
    unet = model.model.diffusion_model
    flat = model.model.latent_format.latent_dimensions == 2
    if not (isinstance(unet, UNetModel) and flat and spatial_layers(model)):
        raise SettingError(
            f"{node} got a {type(model.model).__name__} MODEL ({type(unet).__name__}): expected a UNet with spatial"
            " self-attention, as Stable Video Diffusion and Stable Diffusion 1.5, 2.1 and XL have; wire one of these"
        )


def factor(model: Any) -> int:
    """By how much the UNet shrinks a latent."""
    return 2 ** (len(model.model.model_config.unet_config.get("channel_mult", (1, 2, 4, 4))) - 1)


def own_tile(model: Any) -> TileSize:
    """The tile a checkpoint was trained on: its metadata's, else SVD's. For Stable Diffusion, which knows no time, its
    frames are the length of a window, between which TAP acts."""
    return model.get_attachment("vsr_tile") or STOCK_TILE


def defaults_of(model: Any) -> Defaults:
    """What a MODEL is sampled with where nothing else is asked for: as its loader says, else as its kind is."""
    return model.get_attachment("vsr_defaults") or DEFAULTS["svd" if is_svd(model) else "sd"]


def context_width(model: Any) -> int | None:
    """Width of the cross-attention tokens a MODEL takes; nothing for architectures that say it otherwise."""
    return model.model.model_config.unet_config.get("context_dim")


def context_tokens_of(model: Any) -> int:
    """How many cross-attention tokens a MODEL is used to: one where it was trained on a picture's embedding or without
    a text encoder, as SVD and the pack's own are, and else those of CLIP's text."""
    return CLIP_TOKENS if context_width(model) in CLIP_WIDTHS and not is_svd(model) else 1


def spatial_layers(model: Any) -> dict[str, Layer]:
    """Every spatial self-attention layer of a UNet by `stage.block.index`; empty for other architectures."""
    unet = model.model.diffusion_model
    stages = [
        ("input", getattr(unet, "input_blocks", ())),
        ("middle", [unet.middle_block] if getattr(unet, "middle_block", None) is not None else ()),
        ("output", getattr(unet, "output_blocks", ())),
    ]
    names = [
        f"{stage}.{number}.{index}"
        for stage, blocks in stages
        for number, block in enumerate(blocks)
        for part in (block if isinstance(block, torch.nn.Sequential) else ())
        for index, layer in enumerate(getattr(part, "transformer_blocks", ()))
        if not getattr(layer, "disable_self_attn", False)
    ]
    return place_layers(names, [name for name in names if name.startswith("middle.")])


def tiles_of(model: Any) -> Tiles | None:
    """The tile settings that a MODEL was patched with."""
    return model.model_options["transformer_options"].get(KEY, {}).get("tiles")


def plan_for(model: Any, tiles: Tiles, frames: int, height: int, width: int, cuts: Sequence[int] = ()) -> TilePlan:
    """The plan that a run on a latent video of this size follows. Raises SettingError."""
    tile = resolve_tile(tiles.tile, own_tile(model))
    return plan_tiles(frames, height, width, tile, tiles.overlap, cuts, factor(model))


def together(model: Any, tiles: Tiles, plan: TilePlan) -> int:
    """How many spatial tiles go through the UNet at once at most; all of them for synchronous SAP where it fits."""
    count = len(plan.spatial)
    if "sap" not in tiles.propagation.kinds or tiles.sap_mode == "lagged":
        return min(tiles.batch, count)
    if tiles.sap_mode == "synchronous":
        return count
    size = plan.tile_size(0)
    needed = model.model.memory_required([count * size.frames, 4, size.height, size.width])
    memory = comfy.model_management.get_total_memory(model.load_device) - model.model_size()
    return count if needed < SYNCHRONOUS_SHARE * memory else min(tiles.batch, count)
