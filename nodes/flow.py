"""Nodes of motion: estimate it, look at it, make the diffusion follow it."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..vsr_ops.flow.field import ESTIMATORS
from ..vsr_ops.sampling.align import MODES, SCALES
from ..vsr_ops.video.scenes import find_cuts
from ..vsr_ops.views.flow import preview
from . import host
from .common import CATEGORY, check_choice, choice, number, to_frames, to_image
from .latent import CUTS

#: What goes from Estimate Flow to its preview and to the alignment.
FLOW = io.Custom("VSR_FLOW")


class EstimateFlow(io.ComfyNode):
    """How the video moves, both ways, and where it can be followed."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VSREstimateFlow",
            display_name="Estimate Flow (VSR)",
            category=f"{CATEGORY}/flow",
            description=(
                "Optical flow of a video from frame to frame and back, and which pixels both frames show; nothing is"
                " followed across a scene cut."
            ),
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip="The upscaled low-resolution video, at the size of the result: it moves as it should.",
                ),
                choice(
                    "estimator",
                    ESTIMATORS,
                    "dis",
                    "dis: no weights, fast, on the CPU. raft_large: the papers', better on large motion, needs its"
                    " weights and a GPU; raft_small: lighter.",
                ),
                choice("scene_cuts", CUTS, "detect", "Find scene cuts, which nothing may cross, or take one scene."),
            ],
            outputs=[FLOW.Output(display_name="flow", tooltip="For Preview Flow (VSR) and Flow-Guided Latents (VSR).")],
        )

    @classmethod
    def execute(cls, image: Tensor, estimator: str, scene_cuts: str) -> io.NodeOutput:
        frames = to_frames(image)
        check_choice("estimator", estimator, ESTIMATORS)
        cuts = find_cuts(iter(frames)) if CUTS[check_choice("scene_cuts", scene_cuts, CUTS)] else ()
        return io.NodeOutput(host.estimated_flow(frames, estimator, cuts))


class FlowPreview(io.ComfyNode):
    """Flow as colours."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VSRFlowPreview",
            display_name="Preview Flow (VSR)",
            category=f"{CATEGORY}/flow",
            description="Shows what the flow holds: where everything moves to, and what the next frame still shows.",
            inputs=[FLOW.Input("flow", tooltip="From Estimate Flow (VSR).")],
            outputs=[
                io.Image.Output(
                    display_name="colours",
                    tooltip="Hue is the direction, white stands still, full colour is the fastest of the whole video.",
                ),
                io.Image.Output(
                    display_name="visibility",
                    tooltip="White: the next frame shows this pixel too. Black: covered, left the picture, or a cut.",
                ),
            ],
        )

    @classmethod
    def execute(cls, flow: Any) -> io.NodeOutput:
        colours, visible = preview(flow)
        return io.NodeOutput(to_image(colours), to_image(visible))


class FlowGuidedLatents(io.ComfyNode):
    """SDATC's alignment under any sampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VSRFlowGuidedLatents",
            display_name="Flow-Guided Latents (VSR)",
            category=f"{CATEGORY}/model",
            description=(
                "Makes the sampled video move as the low-resolution one does: at every step the model's picture of the"
                " whole video is aligned along the flow (SDATC), outside the tiles. Works with SVD, Stable Diffusion"
                " and every model whose latents are a batch of frames."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model that will sample, tiled or not."),
                FLOW.Input("flow", tooltip="From Estimate Flow (VSR), of the video at the size of the result."),
                number(
                    "strength",
                    0.5,
                    0.0,
                    100.0,
                    "Lambda; 0 is off, exactly. gradient: how far a step moves latents. propagate: the share, up to 1,"
                    " that a frame takes from its neighbour.",
                    step=0.005,
                ),
                number("start_percent", 0.0, 0.0, 1.0, "Where in sampling alignment begins."),
                number("end_percent", 1.0, 0.0, 1.0, "Where in sampling alignment ends."),
                choice(
                    "mode",
                    MODES,
                    "gradient",
                    "gradient: SDATC's, a step against the motion error, smaller as noise goes. propagate: frames hand"
                    " on what they show along the flow; stronger, softer.",
                ),
                choice(
                    "scale",
                    SCALES,
                    "bounded",
                    "What a gradient step is scaled by. bounded: the share of noise, from 1 down to 0. ddpm: the"
                    " paper's, the variance of a DDPM step. propagate takes bounded alone.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model, aligned in time.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        flow: Any,
        strength: float,
        start_percent: float,
        end_percent: float,
        mode: str,
        scale: str = "bounded",
    ) -> io.NodeOutput:
        check_choice("mode", mode, MODES)
        check_choice("scale", scale, SCALES)
        return io.NodeOutput(host.patch_alignment(model, flow, strength, start_percent, end_percent, mode, scale))
