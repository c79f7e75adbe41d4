"""How hard a video was compressed, and SDATC's prompts, by which UNet and decoder adapt to it."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..vsr_ops.modules.capm import HostCAPM
from ..vsr_ops.modules.capm_file import BUNDLED, load_capms
from ..vsr_ops.modules.capm_hints import levels_or_crf
from ..vsr_ops.modules.compression import LITE_COMPRESSION, describe_levels, levels_or_given
from ..vsr_ops.video.scenes import find_cuts
from ..vsr_ops.views.levels import plot_levels
from . import host
from .common import CATEGORY, number, to_frames, to_image

#: Compression levels `(frames,)` in [0, 1], from Estimate Compression to what takes them as a hint.
COMPRESSION = io.Custom("VSR_COMPRESSION")
#: The VAE's half of a CAPM, to Decode Video.
CAPM = io.Custom("VSR_CAPM")
#: The host's folders, under its `models`, where files of these kinds are looked for.
CAPM_FOLDER, COMPRESSION_FOLDER = "vsr_capm", "vsr_compression"
SUFFIXES = (".safetensors",)


def bundled_heads() -> tuple[str, ...]:
    """The compression heads that the pack itself has."""
    return ("lite",) if LITE_COMPRESSION.is_file() else ()


def bundled_capms() -> tuple[str, ...]:
    """The CAPMs that the pack itself has."""
    return tuple(name for name, file in BUNDLED.items() if file.is_file())


class CompressionEstimate(io.ComfyNode):
    """The compression level of each frame."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VSRCompressionEstimate",
            display_name="Estimate Compression (VSR)",
            category=f"{CATEGORY}/picture",
            description=(
                "Sees how hard each frame was compressed, as the quality setting (CRF) of an H.264 encoder: draws it"
                " over the frames, and hands it on to parts that adapt to it."
            ),
            inputs=[
                io.Image.Input("image", tooltip="The low-resolution video as it came: neither resized nor cleaned."),
                io.Combo.Input(
                    "which",
                    options=host.weights_files(COMPRESSION_FOLDER, SUFFIXES, bundled_heads()),
                    tooltip="lite: the pack's own; or a .safetensors file from the host's models/vsr_compression.",
                ),
                number(
                    "crf",
                    -1.0,
                    -1.0,
                    51.0,
                    "-1: as estimated. 0 (clean) to 51 (coarsest): this CRF for every frame, whatever they look like.",
                    step=0.5,
                ),
            ],
            outputs=[
                COMPRESSION.Output(display_name="compression", tooltip="A level for each frame, for CAPM (VSR)."),
                io.Image.Output(display_name="plot", tooltip="The CRF over the frames."),
                io.String.Output(display_name="text", tooltip="The same in words: mean, lowest and highest CRF."),
            ],
        )

    @classmethod
    def execute(cls, image: Tensor, which: str, crf: float) -> io.NodeOutput:
        frames = to_frames(image)
        file = host.weights_file(COMPRESSION_FOLDER, which, SUFFIXES, bundled_heads())
        levels = levels_or_given(file, frames, crf, host.progress(len(frames)))
        plot = plot_levels(levels, find_cuts(iter(frames)))
        return io.NodeOutput(levels, to_image(plot[None]), describe_levels(levels))


class CompressionPrompts(io.ComfyNode):
    """CAPM under any sampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VSRCAPM",
            display_name="CAPM (VSR)",
            category=f"{CATEGORY}/model",
            description=(
                "Compression-aware prompts (SDATC): after every level of its decoder, the model adapts to how hard the"
                " video was compressed. It sees that in its features, or is told."
            ),
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model the CAPM was trained on: for lite, Load Lite's svd_lite; for sd_lite, its own.",
                ),
                io.Combo.Input(
                    "which",
                    options=host.weights_files(CAPM_FOLDER, SUFFIXES, bundled_capms()),
                    tooltip="lite: the pack's own, for its lite SVD; sd_lite: for its lite Stable Diffusion with its"
                    " control; or a .safetensors file from models/vsr_capm.",
                ),
                number("strength", 1.0, 0.0, 2.0, "How far it goes: 0 is off, exactly; 1 is what was trained."),
                COMPRESSION.Input(
                    "levels",
                    optional=True,
                    tooltip="From Estimate Compression (VSR), a level for each frame; without, it sees them itself.",
                ),
                number(
                    "crf",
                    -1.0,
                    -1.0,
                    51.0,
                    "-1: as levels say, or as it sees. 0 (clean) to 51 (coarsest): this CRF for every frame.",
                    step=0.5,
                    optional=True,
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model, adapting."),
                CAPM.Output(display_name="capm", tooltip="The same for the VAE, for Decode Video (VSR)."),
            ],
        )

    @classmethod
    def execute(
        cls, model: Any, which: str, strength: float, levels: Tensor | None = None, crf: float = -1.0
    ) -> io.NodeOutput:
        capms = load_capms(host.weights_file(CAPM_FOLDER, which, SUFFIXES, bundled_capms()))
        told = levels_or_crf(levels, crf)
        patched = host.patch_capm(model, HostCAPM(capms.unet, told, strength))
        return io.NodeOutput(patched, HostCAPM(capms.vae, told, strength))
