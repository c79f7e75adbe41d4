"""What is known of a MODEL: its layers, its tile and the plan a tiled run follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_base
import comfy.model_management
import torch

from ...vsr_ops.errors import SettingError
from ...vsr_ops.layers import Layer, place_layers
from ...vsr_ops.tiling import TilePlan, TileSize, plan_tiles
from ..run import KEY, Tiles, resolve_tile

#: What SVD was published with.
STOCK_TILE = TileSize(64, 64, 14)
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


def factor(model: Any) -> int:
    """By how much the UNet shrinks a latent."""
    return 2 ** (len(model.model.model_config.unet_config.get("channel_mult", (1, 2, 4, 4))) - 1)


def own_tile(model: Any) -> TileSize:
    """The tile a checkpoint was trained on: its metadata's, else SVD's."""
    return model.get_attachment("vsr_tile") or STOCK_TILE


def context_width(model: Any) -> int:
    """Width of the cross-attention tokens a MODEL takes."""
    return model.model.model_config.unet_config["context_dim"]


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
