"""SATeCo's adapters: the spatial and the temporal one, in the UNet and for the decoder."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..vsr_ops.modules.sateco import HostSATeCo, Strengths
from ..vsr_ops.modules.sateco_file import load_satecos
from . import host
from .common import CATEGORY, SATECO, number

#: The host's folder, under its `models`, where files of this kind are looked for.
SATECO_FOLDER = "vsr_sateco"
SUFFIXES = (".safetensors",)


class SATeCo(io.ComfyNode):
    """SFA and TFA under any sampler, and for the decoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VSRSATeCo",
            display_name="SATeCo (VSR)",
            category=f"{CATEGORY}/model",
            description=(
                "SATeCo's adapters after every level of the model's decoder: the spatial one (SFA) follows the upscaled"
                " video pixel by pixel, the temporal one (TFA) lets neighbouring frames agree."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model it was trained on: a Stable Diffusion."),
                io.Combo.Input(
                    "which",
                    options=host.weights_files(SATECO_FOLDER, SUFFIXES, ()),
                    tooltip="A .safetensors file from models/vsr_sateco.",
                ),
                io.Latent.Input(
                    "lr_latent", tooltip="The upscaled video's latent, from Encode Video (VSR): what guides it."
                ),
                number("strength", 1.0, 0.0, 2.0, "How far SFA goes: 0 is off, exactly; 1 is what was trained."),
                number("temporal", 1.0, 0.0, 2.0, "How far TFA goes: 0 is off, exactly; 1 is what was trained."),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model, adapted to the video."),
                SATECO.Output(display_name="sateco", tooltip="The same for the VAE, for Decode Video (VSR)."),
            ],
        )

    @classmethod
    def execute(
        cls, model: Any, which: str, lr_latent: dict[str, Any], strength: float, temporal: float
    ) -> io.NodeOutput:
        halves = load_satecos(host.weights_file(SATECO_FOLDER, which, SUFFIXES, ()))
        strengths = Strengths(strength, temporal)
        patched = host.patch_sateco(model, HostSATeCo(halves.unet, strengths), lr_latent)
        return io.NodeOutput(patched, HostSATeCo(halves.vae, strengths))
