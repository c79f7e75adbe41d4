"""Noise that follows a frame wherever its video is cut."""

from __future__ import annotations

from comfy_api.latest import io

from .common import CATEGORY, count
from .session.noise import FrameNoise


class NoiseByFrame(io.ComfyNode):
    """A frame's noise follows from the seed and its number."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VSRNoiseByFrame",
            display_name="Noise by Frame (VSR)",
            category=f"{CATEGORY}/sampling",
            description=(
                "For SamplerCustomAdvanced, in the place of Random Noise: every frame's noise follows from the seed and"
                " the frame's number, so that a part of a video gets the noise that it has in the whole."
            ),
            inputs=[
                count(
                    "noise_seed",
                    0,
                    0,
                    0xFFFFFFFFFFFFFFFF,
                    "Another seed gives another take.",
                    control_after_generate=True,
                ),
                count(
                    "first_frame",
                    0,
                    0,
                    0xFFFFFFFF,
                    "The number of the video's first frame in the whole: of a part that begins at frame 48, 48.",
                ),
            ],
            outputs=[io.Noise.Output(display_name="noise", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, noise_seed: int, first_frame: int) -> io.NodeOutput:
        return io.NodeOutput(FrameNoise(noise_seed, first_frame))
