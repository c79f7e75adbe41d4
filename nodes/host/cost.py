"""What a tiled run will take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import comfy.latent_formats
import comfy.ops
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, Upsample
from einops import rearrange
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ...vsr_ops.errors import SettingError
from ...vsr_ops.pipeline.plan_cost import Bank, describe_plan, lagged_bytes, matmul_speed, tap_bytes
from ...vsr_ops.sampling.layouts import TileLayout
from ...vsr_ops.sampling.tiling import TileSize
from ...vsr_ops.vae.latents import CELL
from ...vsr_ops.video.scenes import find_cuts
from ..session.known import cuts_of
from ..session.run import Scenes, sap_lagged
from .model import context_tokens_of, layout_for, spatial_layers, tiles_of, together


def latent_picture(model: Any, samples: Tensor) -> Tensor:
    """`(n, 3, 8h, 8w)` in [0, 1]: the host's rough preview colours of a latent video."""
    factors = torch.tensor(model.model.latent_format.latent_rgb_factors)
    scaled = model.model.process_latent_in(samples.float().cpu())
    picture = torch.einsum("t c h w, c r -> t r h w", scaled, factors)
    return torch.nn.functional.interpolate((picture / 2 + 0.5).clamp(0, 1), scale_factor=8, mode="nearest")


def latent_cuts(latent: Mapping[str, Any]) -> tuple[int, ...]:
    """Where scenes change among a LATENT's frames: as it says, or seen in its rough colours where nothing is known, as
    after Rebatch Latents. Raises SettingError where they cannot be told."""
    known = cuts_of(latent)
    if known is not None:
        return known
    samples: Tensor = latent["samples"]
    formats = comfy.latent_formats.SD15()
    if samples.ndim != 4 or samples.shape[1] != formats.latent_channels:
        return ()
    colours = torch.tensor(formats.latent_rgb_factors)
    scaled = formats.process_in(samples.float().cpu())
    return find_cuts(iter(torch.einsum("t c h w, c r -> t r h w", scaled, colours) / 2 + 0.5))


def latent_scenes(latent: Mapping[str, Any]) -> Scenes:
    """A LATENT's frames, and where scenes change among them. Raises SettingError where that cannot be told."""
    return Scenes(latent["samples"].shape[0], latent_cuts(latent))


def preview_layout(model: Any, frames: Tensor, cuts: Sequence[int]) -> TileLayout:
    """The tiles of a tiled MODEL for a video `(n, 3, height, width)`. Raises SettingError for a MODEL without tiles."""
    tiles = tiles_of(model)
    if tiles is None:
        raise SettingError("this MODEL has no tiles: expected one from Tiled Diffusion (VSR); wire it in between")
    height, width = (-(-side // CELL) for side in frames.shape[-2:])
    return layout_for(model, tiles, frames.shape[0], height, width, cuts)


def banks(model: Any, layers: str, tile: TileSize) -> list[Bank]:
    """The layers propagation acts in, for tiles of one size."""
    unet, found, shrink = model.model.diffusion_model, list[Bank](), 1
    chosen = {name for name, layer in spatial_layers(model).items() if layers in layer.places}
    for stage, blocks in (
        ("input", unet.input_blocks),
        ("middle", [unet.middle_block]),
        ("output", unet.output_blocks),
    ):
        for number, block in enumerate(blocks):
            shrink *= 2 if any(isinstance(part, Downsample) for part in block) else 1
            for part in block:
                for index, layer in enumerate(getattr(part, "transformer_blocks", ())):
                    if f"{stage}.{number}.{index}" in chosen:
                        width = layer.attn1.to_k.weight.shape[0] + layer.attn1.to_v.weight.shape[0]
                        found.append(Bank(-(-tile.height // shrink), -(-tile.width // shrink), width))
            shrink //= 2 if any(isinstance(part, Upsample) for part in block) else 1
    return found


def tile_flops(model: Any, tile: TileSize) -> float:
    """Operations of one tile's UNet call, counted on a copy without data."""
    config = {**model.model.model_config.unet_config, "device": "meta", "dtype": torch.float32}
    with torch.device("meta"):
        unet = type(model.model.diffusion_model)(**config, operations=comfy.ops.disable_weight_init)
        x = torch.empty(tile.frames, config["in_channels"], tile.height, tile.width)
        context = torch.empty(tile.frames, context_tokens_of(model), config["context_dim"])
        y = torch.empty(tile.frames, config["adm_in_channels"]) if config.get("num_classes") is not None else None

    def attention(_: object, q: Tensor, k: Tensor, v: Tensor, heads: int, *rest: object, **more: object) -> Tensor:
        q, k, v = (rearrange(z, "b n (h d) -> b h n d", h=heads) for z in (q, k, v))
        return rearrange(torch.nn.functional.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")

    options = {"optimized_attention_override": attention}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(x, x[:, 0, 0, 0], context, y, transformer_options=options, num_video_frames=tile.frames)
    return float(counter.get_total_flops())


def describe(model: Any, layout: TileLayout, steps: int, passes: int, guided: int = 0) -> str:
    """The plan as text: tiles, UNet calls, memory, and an estimate of time good to a factor of about 2. Of the steps
    `guided` take all the passes (0: all do), the others one."""
    tiles = tiles_of(model)
    assert tiles is not None
    plan = layout.largest
    at_once = together(model, tiles, plan)
    carried = replace(tiles.propagation, sap_lagged=sap_lagged(tiles, plan, at_once))
    tile = max((plan.tile_size(n) for n in range(len(plan.windows))), key=lambda size: size.frames)
    layers, dtype = banks(model, carried.layers, tile), model.model_dtype()
    flops = tile_flops(model, tile)
    needed = model.model.memory_required([at_once * tile.frames, 4, tile.height, tile.width])
    return describe_plan(
        layout,
        carried,
        steps,
        passes,
        guided=guided or None,
        lagged=lagged_bytes(plan, carried, passes, layers, dtype.itemsize),
        tap=tap_bytes(plan, carried, at_once, layers, dtype.itemsize),
        weights=model.model_size(),
        activations=needed,
        flops=flops,
        speed=matmul_speed(model.load_device, dtype),
    )
