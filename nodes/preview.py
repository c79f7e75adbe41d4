"""A look at a plan before it is paid for."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..vsr_ops.errors import SettingError
from ..vsr_ops.overlay import preview
from ..vsr_ops.scenes import find_cuts
from . import host
from .common import CATEGORY, count, to_frames, to_image


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
            ],
            outputs=[
                io.Image.Output(display_name="preview", tooltip="Every frame with its tiles and windows."),
                io.String.Output(display_name="plan", tooltip="Tiles, UNet passes, memory and time as text."),
            ],
        )

    @classmethod
    def execute(
        cls, model: Any, steps: int, passes: int, image: Tensor | None = None, latent: dict[str, Any] | None = None
    ) -> io.NodeOutput:
        if image is None and latent is None:
            raise SettingError("neither image nor latent is wired: expected one of them; wire the upscaled video")
        frames = host.latent_picture(model, latent["samples"]) if image is None else to_frames(image)
        cuts = find_cuts(iter(frames)) if latent is None else host.latent_cuts(latent)
        plan = host.preview_plan(model, frames, cuts)
        return io.NodeOutput(to_image(preview(plan, frames)), host.describe(model, plan, steps, passes))
