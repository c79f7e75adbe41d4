"""How hard a video was compressed: seen, drawn, and told to the parts that adapt to it."""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor

from ..vsr_ops.compression import LITE_COMPRESSION, describe_levels, levels_or_given, plot_levels
from ..vsr_ops.scenes import find_cuts
from . import host
from .common import CATEGORY, number, to_frames, to_image

#: Compression levels `(frames,)` in [0, 1], from Estimate Compression to what takes them as a hint.
COMPRESSION = io.Custom("VSR_COMPRESSION")
#: The host's folder, under its `models`, where files of this kind are looked for.
COMPRESSION_FOLDER = "vsr_compression"
SUFFIXES = (".safetensors",)


def bundled() -> tuple[str, ...]:
    """What the pack itself has."""
    return ("lite",) if LITE_COMPRESSION.is_file() else ()


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
                    options=host.weights_files(COMPRESSION_FOLDER, SUFFIXES, bundled()),
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
        file = host.weights_file(COMPRESSION_FOLDER, which, SUFFIXES, bundled())
        levels = levels_or_given(file, frames, crf, host.progress(len(frames)))
        plot = plot_levels(levels, find_cuts(iter(frames)))
        return io.NodeOutput(levels, to_image(plot[None]), describe_levels(levels))
