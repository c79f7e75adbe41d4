"""DC-VSR's own fine-tuned UNet, or another one alone in diffusers' layout, with the rest of an SVD."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io

from . import host
from .common import CATEGORY, check_choice, choice

#: The host's folders, under its `models`, where UNets and the SVD beside them are looked for.
UNET_FOLDER, OWN_FOLDER = "diffusion_models", "vsr"
SVD_FOLDER = "checkpoints"


class LoadDCVSR(io.ComfyNode):
    """An SVD whose UNet lies alone, as DC-VSR's author published it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VSRLoadDCVSR",
            display_name="Load DC-VSR (VSR)",
            category=f"{CATEGORY}/loaders",
            description=(
                "The UNet that DC-VSR's author fine-tuned for upscaling, or another SVD's UNet alone in diffusers'"
                " layout; VAE and CLIP vision come from an SVD checkpoint. Nothing is downloaded."
            ),
            inputs=[
                io.Combo.Input(
                    "unet",
                    options=host.unet_names((UNET_FOLDER, OWN_FOLDER)),
                    tooltip="From models/diffusion_models or models/vsr: a folder with config.json and its weights, a"
                    " .safetensors, or the index of its shards.",
                ),
                choice(
                    "svd",
                    host.weights_files(SVD_FOLDER),
                    "lite",
                    "The SVD that the UNet was tuned from, svd.safetensors in models/checkpoints: VAE and CLIP vision"
                    " are taken from it. lite: the pack's own, for a UNet of its widths.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The UNet, as any other MODEL: LoRA and patches apply."),
                io.Vae.Output(display_name="vae", tooltip="The SVD's video VAE; decode with Decode Video (VSR)."),
                io.ClipVision.Output(
                    display_name="clip_vision",
                    tooltip="The SVD's, for CLIP Vision Encode on the first frame. lite has none: leave it unwired.",
                ),
            ],
        )

    @classmethod
    def execute(cls, unet: str, svd: str) -> io.NodeOutput:
        file = host.weights_file(SVD_FOLDER, check_choice("svd", svd, host.weights_files(SVD_FOLDER)))
        checkpoint = None if svd == "lite" else Path(file)
        return io.NodeOutput(*host.load_unet(unet, (UNET_FOLDER, OWN_FOLDER), checkpoint))
