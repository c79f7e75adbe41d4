"""Nodes from MODEL to MODEL: tiles with propagation, and DSSAG for samplers without a guider."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..vsr_ops.errors import SettingError
from ..vsr_ops.pipeline.defaults import AUTO
from ..vsr_ops.sampling.interval import ALL_NOISE, GuidanceInterval
from ..vsr_ops.sampling.layouts import LAYOUTS
from ..vsr_ops.sampling.propagation import PROPAGATION, SAP_MODES, Propagation
from ..vsr_ops.sampling.tiling import TileSize
from ..vsr_ops.video.scenes import find_cuts
from ..vsr_ops.views.tile_overlay import preview
from . import host
from .common import (
    CATEGORY,
    check_choice,
    choice,
    count,
    interval_inputs,
    layers_input,
    number,
    to_frames,
    to_image,
)


class TiledDiffusion(io.ComfyNode):
    """DC-VSR's tiles, SAP and TAP under any sampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VSRTiledDiffusion",
            display_name="Tiled Diffusion (VSR)",
            category=f"{CATEGORY}/model",
            description=(
                "Samples a video of any size and length in overlapping tiles that stay coherent: SAP carries detail"
                " between tiles in space, TAP between windows in time (DC-VSR). Works under every sampler and guider,"
                " for SVD and for Stable Diffusion, whose frames are a batch; ControlNets are cut along."
            ),
            inputs=[
                io.Model.Input("model", tooltip="Stable Video Diffusion, or Stable Diffusion 1.5, 2.1 or XL."),
                count("tile_height", 0, 0, 512, "Tile height in latents of 8 pixels; 0: the checkpoint's own.", step=8),
                count("tile_width", 0, 0, 512, "Tile width in latents of 8 pixels; 0: the checkpoint's own.", step=8),
                count("tile_frames", 0, 0, 512, "Frames in a window; 0: the checkpoint's own, else 14."),
                number("overlap", 0.5, 0.0, 0.75, "Share of a tile that its neighbour covers too; 0.5 is the paper's."),
                choice("propagation", PROPAGATION, "sap+tap", "What is carried between tiles; the two take turns."),
                choice(
                    "sap_mode",
                    SAP_MODES,
                    "auto",
                    "synchronous: all tiles of a window at once (the paper's, needs memory); lagged: one by one, with"
                    " what the last step left; auto: synchronous where it fits.",
                ),
                count(
                    "sap_rate", 0, 0, 64, "SAP takes every n-th token in x and y; 0: at most half a tile's, 4 or up."
                ),
                count("tap_frames", 4, 1, 64, "Frames that TAP hands from window to window; 4 is the paper's."),
                count("tap_rate", 1, 1, 64, "TAP takes every n-th token of them; 1 is the paper's, 2 to 4 is cheaper."),
                layers_input("ends"),
                number("start_percent", 0.0, 0.0, 1.0, "Where in sampling propagation begins."),
                number("end_percent", 1.0, 0.0, 1.0, "Where in sampling propagation ends."),
                count("tile_batch", 1, 1, 256, "Tiles that go through the UNet together; halved when memory runs out."),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="What the sampler starts from: no window crosses its scene cuts. Wire it where the"
                    " prompt is a text, which knows of none; SVD Video Conditioning and Null Prompt do.",
                ),
                choice(
                    "layout",
                    (*LAYOUTS, AUTO),
                    AUTO,
                    "How tiles lie. paper: overlap between all. balanced: evenly, with less overlap, half the tiles."
                    " shifted: barely touching, borders elsewhere from step to step, a quarter of the tiles. auto: as"
                    " measured for the MODEL.",
                    optional=True,
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model, sampling in tiles.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        tile_height: int,
        tile_width: int,
        tile_frames: int,
        overlap: float,
        propagation: str,
        sap_mode: str,
        sap_rate: int,
        tap_frames: int,
        tap_rate: int,
        layers: str,
        start_percent: float,
        end_percent: float,
        tile_batch: int,
        latent: dict[str, Any] | None = None,
        layout: str = AUTO,
    ) -> io.NodeOutput:
        carried = Propagation.named(
            propagation, sap_rate=sap_rate or None, tap_frames=tap_frames, tap_rate=tap_rate, layers=layers
        )
        tiles = host.Tiles(
            TileSize(tile_height, tile_width, tile_frames),
            overlap,
            carried,
            check_choice("sap_mode", sap_mode, SAP_MODES),
            start_percent,
            end_percent,
            tile_batch,
            None if latent is None else host.latent_scenes(latent),
            host.defaults_of(model).laid_out(check_choice("layout", layout, (*LAYOUTS, AUTO))),
        )
        return io.NodeOutput(host.patch_tiles(model, tiles))


SCALE_TIP = "Strength s of the guidance; 0 is off, exactly."
RHO_TIP = "How fast the blur fades over the steps (DC-VSR equation 10); 0.5 is the paper's, larger fades sooner."


class DSSAG(io.ComfyNode):
    """DSSAG for KSampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VSRDSSAG",
            display_name="DSSAG for KSampler (VSR)",
            category=f"{CATEGORY}/model",
            description=(
                "Detail-suppression self-attention guidance for samplers without a guider socket. At the sampler's cfg"
                " 1 it guides by its scale (DC-VSR equation 8); at another that cfg is 1 + s (equation 9), and scale"
                " only switches it on. Two UNet passes a step either way."
            ),
            inputs=[
                io.Model.Input(
                    "model", tooltip="A model with spatial self-attention, such as SVD or Stable Diffusion."
                ),
                number("scale", 1.0, 0.0, 100.0, SCALE_TIP),
                number("rho", 0.5, 0.01, 100.0, RHO_TIP),
                layers_input("ends"),
                *interval_inputs(),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model, guided.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        scale: float,
        rho: float,
        layers: str,
        sigma_min: float = 0.0,
        sigma_max: float = ALL_NOISE,
        every: int = 1,
    ) -> io.NodeOutput:
        interval = GuidanceInterval(sigma_min, sigma_max, every)
        return io.NodeOutput(host.patch_perturbed(model, "dssag", scale, layers, rho, interval))


class TilePreview(io.ComfyNode):
    """The tiles of a tiled MODEL on a video, and what a run will cost."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VSRTilePreview",
            display_name="Preview Tiles (VSR)",
            category=f"{CATEGORY}/model",
            description="Draws the tiles of Tiled Diffusion on the video, and says what a run will take.",
            inputs=[
                io.Model.Input("model", tooltip="A model from Tiled Diffusion."),
                count("steps", 10, 1, 1000, "Sampling steps of the run to estimate."),
                count("passes", 2, 1, 4, "UNet passes a step: none 1; CFG or DSSAG 2; PAG or SAG 2, with CFG 3."),
                io.Image.Input("image", optional=True, tooltip="The video at the size of the result."),
                io.Latent.Input("latent", optional=True, tooltip="Or its latent."),
                count(
                    "guided_steps",
                    0,
                    0,
                    1000,
                    "Steps that take those passes, where guidance has an interval; the others take one. 0: all.",
                    optional=True,
                ),
            ],
            outputs=[
                io.Image.Output(display_name="preview", tooltip="Every frame with its tiles and windows."),
                io.String.Output(display_name="plan", tooltip="Tiles, UNet passes, memory and time as text."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        steps: int,
        passes: int,
        image: Tensor | None = None,
        latent: dict[str, Any] | None = None,
        guided_steps: int = 0,
    ) -> io.NodeOutput:
        if image is not None:
            frames = to_frames(image)
        elif latent is not None:
            frames = host.latent_picture(model, latent["samples"])
        else:
            raise SettingError("neither image nor latent is wired: expected one of them; wire the upscaled video")
        cuts = find_cuts(iter(frames)) if latent is None else host.latent_cuts(latent)
        layout = host.preview_layout(model, frames, cuts)
        plan = host.describe(model, layout, steps, passes, guided_steps)
        return io.NodeOutput(to_image(preview(layout.phases[0], frames)), plan)
