"""A prompt that says nothing, for graphs without a text encoder."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..vsr_ops.scenes import find_cuts
from . import host
from .common import CATEGORY, to_frames


class NullPrompt(io.ComfyNode):
    """Zeros in the shape of a prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VSRNullPrompt",
            display_name="Null Prompt (VSR)",
            category=f"{CATEGORY}/conditioning",
            description=(
                "A prompt of zeros in the MODEL's own width: no text encoder is needed. Zeros are not what CLIP makes"
                " of an empty text, which checkpoints trained on prompts may prefer."
            ),
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip=(
                        "The model that will sample, such as SD 1.5, SD 2.1 or the lite SD. Zeros are not CLIP's empty"
                        " prompt: where the checkpoint's CLIP is at hand, try CLIP Text Encode with an empty text too."
                    ),
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="The video: its scene cuts travel with the prompt, and no window of tiles crosses one.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="conditioning", tooltip="For positive, negative, or both at cfg 1.")
            ],
        )

    @classmethod
    def execute(cls, model: Any, image: Tensor | None = None) -> io.NodeOutput:
        frames = None if image is None else to_frames(image)
        scenes = {} if frames is None else {"vsr_cuts": find_cuts(iter(frames)), "vsr_frames": len(frames)}
        return io.NodeOutput(host.null_prompt(model, scenes))
