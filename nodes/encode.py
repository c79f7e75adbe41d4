"""A video as the latent that Stable Diffusion starts from, and AdaIN before the decoder."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..vsr_ops.image.color import adain
from ..vsr_ops.vae.latents import encode_video
from ..vsr_ops.video.scenes import find_cuts
from . import host
from .common import CATEGORY, check_choice, choice, number, to_frames
from .latent import CUTS, STARTS
from .session.known import KNOWN, KnownVideo


class Encode(io.ComfyNode):
    """A video to latents, frame by frame, each in one pass."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VSREncode",
            display_name="Encode Video (VSR)",
            category=f"{CATEGORY}/latent",
            description=(
                "Encodes a video of any length and size, frame by frame, for Stable Diffusion graphs: frames are the"
                " batch. Any size works, for it is padded, and Decode Video (VSR) crops again; the host's VAE Encode"
                " crops. SVD takes its latent from SVD Video Conditioning (VSR)."
            ),
            inputs=[
                io.Vae.Input("vae", tooltip="The VAE of the model that will sample."),
                io.Image.Input("image", tooltip="The video at the size of the result, from Upscale LR Video (VSR)."),
                choice(
                    "start",
                    STARTS,
                    "LR latent",
                    "LR latent: the video itself, for a denoise below 1. noise: an empty LATENT of its size, for 1.",
                ),
                choice("scene_cuts", CUTS, "detect", "Find scene cuts, which nothing may cross, or take one scene."),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="What the sampler starts from."),
                io.Latent.Output(display_name="lr_latent", tooltip="The video itself, whatever the start."),
            ],
        )

    @classmethod
    def execute(cls, vae: Any, image: Tensor, start: str, scene_cuts: str) -> io.NodeOutput:
        frames = to_frames(image)
        from_lr = STARTS[check_choice("start", start, STARTS)]
        cuts = find_cuts(iter(frames)) if CUTS[check_choice("scene_cuts", scene_cuts, CUTS)] else ()
        lr = encode_video(partial(host.encoded, vae), iter(frames), host.progress(len(frames)))
        known = {KNOWN: KnownVideo.of(frames, lr, cuts)}
        return io.NodeOutput(
            {"samples": lr if from_lr else torch.zeros_like(lr), **known},
            {"samples": lr, **known},
        )


class MatchLatent(io.ComfyNode):
    """AdaIN between latents, before the decoder; SDATC has it on the frames."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VSRMatchLatent",
            display_name="Match Latent (VSR)",
            category=f"{CATEGORY}/latent",
            description=(
                "Gives every channel of a sampled latent the mean and spread of the LR latent's, frame by frame:"
                " AdaIN before the decoder. Match Colour (VSR) does it after."
            ),
            inputs=[
                io.Latent.Input("latent", tooltip="The sampled video."),
                io.Latent.Input("reference", tooltip="The upscaled video's latent: as many frames."),
                number("strength", 1.0, 0.0, 1.0, "0 leaves the latent exactly as it is, 1 matches fully."),
                number(
                    "smoothing",
                    0.0,
                    0.0,
                    30.0,
                    "Smooths the correction over time, in frames, never across a cut; 0 is off.",
                    step=0.1,
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The latent with the reference's statistics.")],
        )

    @classmethod
    def execute(
        cls, latent: dict[str, Any], reference: dict[str, Any], strength: float, smoothing: float
    ) -> io.NodeOutput:
        cuts = host.latent_cuts(reference) if smoothing else ()
        samples = adain(latent["samples"], reference["samples"], strength, smoothing, cuts)
        return io.NodeOutput({**latent, "samples": samples})
