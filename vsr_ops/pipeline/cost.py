"""What a run will take before it is spent: tiles, UNet passes, banks, memory. What time it takes: part_times.py.

Counts are exact; bytes of banks are exact for the plan; activation memory is an estimate and labelled so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

from torch import nn

from ..backbones.sd import SD
from ..backbones.svd import Backbone, find_layers, spatial_self_attention
from ..sampling.calls import calls
from ..sampling.guidance import COND, guide
from ..sampling.layouts import TileLayout
from ..sampling.tiling import TileSize
from ..system.memory import free_bytes
from ..units import readable
from .job import Job
from .plan_cost import Bank, grids, lagged_bytes, tap_bytes
from .sampler import NoiseRange, Settings, run_steps, strengths, tile_passes, unet_calls

#: Live copies of the widest activation at the peak of a UNet call: rough, good to a factor of about 2.
ACTIVATION_COPIES = 24


@dataclass(frozen=True)
class Estimate:
    """Numbers of a planned run."""

    unet_calls: int
    tile_passes: int
    weights_bytes: int
    lagged_bytes: int
    tap_bytes: int
    activation_bytes: int


def banks(model: Backbone, tile: TileSize, layers: str = "ends") -> list[Bank]:
    """The layers of a choice of LAYERS, for tiles of one size."""
    chosen = {name for name, layer in find_layers(model.unet).items() if layers in layer.places}
    found: list[Bank] = []
    for name, module in spatial_self_attention(model.unet):
        attention = cast(Any, module)
        if name in chosen:
            shrink = 2 ** _depth(name, len(model.unet.config["block_out_channels"]))
            width = int(attention.to_k.out_features + attention.to_v.out_features)
            found.append(Bank(-(-tile.height // shrink), -(-tile.width // shrink), width))
    return found


def _depth(name: str, levels: int) -> int:
    """How often the latent has been halved where a layer stands, from its name."""
    stage, number = name.split(".")[:2]
    return int(number) if stage == "down_blocks" else levels - 1 - int(number)


def activation_bytes(model: Backbone, tile: TileSize, tiles: int) -> int:
    """Roughly what one UNet call of `tiles` tiles needs beside the weights."""
    width = model.unet.config["block_out_channels"][0]
    return ACTIVATION_COPIES * tiles * tile.frames * tile.height * tile.width * width * model.dtype.itemsize


def resolve_sap(model: Backbone, layout: TileLayout, settings: Settings, mode: str) -> Settings:
    """Settings with SAP's mode decided: "auto" is synchronous where a window's tiles fit in half the free memory."""
    if mode == "auto":
        plan = layout.largest
        needed = activation_bytes(model, plan.tile_size(0), len(plan.spatial))
        lagged = needed > free_bytes(model.device) / 2
    else:
        lagged = mode == "lagged"
    return replace(settings, propagation=replace(settings.propagation, sap_lagged=lagged))


def networks(model: Backbone) -> list[nn.Module]:
    """What runs at a tile pass: the UNet, and a control of it."""
    control = model.control if isinstance(model, SD) else None
    return [model.unet] if control is None else [model.unet, control]


def largest_call(layout: TileLayout, settings: Settings, noise: NoiseRange) -> tuple[int, int]:
    """How many tiles the largest UNet call of a run takes of each branch, and of how many branches: (0, 1) without
    steps."""
    synchronous, chosen = not settings.propagation.sap_lagged, guide(settings.guidance)
    tiles = (
        len(call.tiles)
        for step in run_steps(settings, noise)
        for call in calls(layout.at(step.index), step, COND, settings.batch, synchronous=synchronous)
    )
    branches = (len(chosen.branches(power)) for power in strengths(settings, noise) if settings.together)
    return max(tiles, default=0), max(branches, default=1)


def resolve_branches(model: Backbone, layout: TileLayout, settings: Settings, mode: str) -> Settings:
    """Settings, their SAP mode decided, with it decided whether a step's branches go through the UNet in one call:
    "auto" is together on a GPU, where they fit in half the free memory, and apart elsewhere."""
    together = replace(settings, together=True)
    if mode != "auto":
        return together if mode == "together" else replace(settings, together=False)
    tiles, branches = largest_call(layout, together, NoiseRange.of(model))
    needed = activation_bytes(model, layout.largest.tile_size(0), tiles * branches)
    fits = model.device.type == "cuda" and needed <= free_bytes(model.device) / 2
    return together if fits else replace(settings, together=False)


def estimate(model: Backbone, layout: TileLayout, settings: Settings) -> Estimate:
    """Counts and bytes for tiles whose SAP mode and calls are decided (`resolve_sap`, `resolve_branches`)."""
    plan = layout.largest
    tile = max((plan.tile_size(n) for n in range(len(plan.windows))), key=lambda t: t.frames)
    layers = banks(model, tile, settings.propagation.layers)
    noise = NoiseRange.of(model)
    tiles, joined = largest_call(layout, settings, noise)
    weights = sum(p.nbytes for module in [*networks(model), model.vae] for p in module.parameters())
    size = model.dtype.itemsize
    branches = max(map(guide(settings.guidance).passes, strengths(settings, noise)), default=1)
    return Estimate(
        unet_calls=unet_calls(layout, settings, noise),
        tile_passes=tile_passes(layout, settings, noise),
        weights_bytes=weights,
        lagged_bytes=lagged_bytes(plan, settings.propagation, branches, layers, size),
        tap_bytes=tap_bytes(plan, settings.propagation, settings.batch * joined, layers, size),
        activation_bytes=activation_bytes(model, tile, tiles * joined),
    )


def describe(job: Job, layout: TileLayout, settings: Settings, numbers: Estimate, scenes: str) -> str:
    """Counts and bytes of a plan as text for a person; `scenes` says what is known of its scenes."""
    height, width = job.size
    plan = layout.settled
    mode = "lagged" if settings.propagation.sap_lagged else "synchronous"
    kinds = " + ".join(settings.propagation.kinds) or "none"
    lines = [
        f"input        {job.info.width}x{job.info.height}, {job.frames} of {job.info.frames} frames",
        f"scenes       {scenes}",
        f"output       {width}x{height}; latents {plan.width}x{plan.height}",
        f"tiles        {grids(layout)} of {plan.tile_size(0)} latents ({settings.layout})",
        f"propagation  {kinds}" + (f" (SAP {mode})" if "sap" in settings.propagation.kinds else ""),
        f"UNet         {numbers.tile_passes:,} tile passes in {numbers.unet_calls:,} calls ({settings.guidance},"
        f" {settings.steps} steps)",
        f"memory       weights {readable(numbers.weights_bytes)}, activations about"
        f" {readable(numbers.activation_bytes)},"
        f" TAP banks {readable(numbers.tap_bytes)}; in host memory: SAP's lagged banks"
        f" {readable(numbers.lagged_bytes)},"
        f" latents {readable(5 * 4 * 4 * plan.frames * plan.height * plan.width)}",
    ]
    return "\n".join(lines)
