"""SDATC's compression-aware prompts, in the UNet and in what decodes its latents."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..vsr_ops.capm import Prompted
from ..vsr_ops.capm_file import BUNDLED, load_capms
from ..vsr_ops.capm_hints import levels_or_crf
from . import host
from .common import CATEGORY, number
from .compression import COMPRESSION

#: The VAE's half of a CAPM, to Decode Video.
CAPM = io.Custom("VSR_CAPM")
#: The host's folder, under its `models`, where files of this kind are looked for.
CAPM_FOLDER = "vsr_capm"
SUFFIXES = (".safetensors",)


def bundled() -> tuple[str, ...]:
    """What the pack itself has."""
    return tuple(name for name, file in BUNDLED.items() if file.is_file())


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
                    options=host.weights_files(CAPM_FOLDER, SUFFIXES, bundled()),
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
        capms = load_capms(host.weights_file(CAPM_FOLDER, which, SUFFIXES, bundled()))
        told = levels_or_crf(levels, crf)
        patched = host.patch_capm(model, Prompted(capms.unet, told, strength))
        return io.NodeOutput(patched, Prompted(capms.vae, told, strength))
