"""Nodes between pictures and latents: SVD's conditioning from a video, and the way back."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..vsr_ops.vae.decoder_modules import DecoderModules
from ..vsr_ops.vae.latents import encode_video, with_augmentation
from ..vsr_ops.video.scenes import find_cuts
from . import host
from .capm import CAPM
from .common import CATEGORY, SATECO, check_choice, choice, count, number, to_frames, to_image
from .load import CFW, STAM
from .session.known import KNOWN, KnownVideo, size_of

STARTS = {"noise": False, "LR latent": True}
CUTS = {"detect": True, "one scene": False}


class SVDConditioning(io.ComfyNode):
    """SVD's conditioning on every frame of a video, and the latent to start from."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VSRSVDConditioning",
            display_name="SVD Video Conditioning (VSR)",
            category=f"{CATEGORY}/conditioning",
            description=(
                "Conditions SVD on every frame of the upscaled video (DC-VSR), where the host's own node repeats one"
                " picture. Frames of any size work: they are padded to 8 pixels, and Decode Video (VSR) crops again."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The SVD that will sample: the conditioning must fit its width."),
                io.Vae.Input("vae", tooltip="SVD's VAE."),
                io.Image.Input("image", tooltip="The video at the size of the result, from Upscale LR Video (VSR)."),
                count("motion_bucket_id", 127, 1, 1023, "How much motion SVD expects; 127 is the paper's."),
                count("fps", 8, 1, 1024, "Frame rate that the UNet is told; 8 is the paper's."),
                number("augmentation", 0.0, 0.0, 10.0, "Noise on the conditioning pictures: hides their artefacts."),
                choice(
                    "start",
                    STARTS,
                    "noise",
                    "noise: an empty LATENT, for denoise 1. LR latent: the video itself, for a denoise below 1.",
                ),
                choice("scene_cuts", CUTS, "detect", "Find scene cuts, which nothing may cross, or take one scene."),
                io.ClipVisionOutput.Input(
                    "clip_vision_output",
                    optional=True,
                    tooltip="CLIP's view of a picture of your choice, for stock SVD; lite needs none.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="The MODEL's own, in clip_vision_output's place: sees the first frame of every scene.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="Conditioned on the video."),
                io.Conditioning.Output(display_name="negative", tooltip="The same without the video, for CFG."),
                io.Latent.Output(display_name="latent", tooltip="What the sampler starts from."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        vae: Any,
        image: Tensor,
        motion_bucket_id: int,
        fps: int,
        augmentation: float,
        start: str,
        scene_cuts: str,
        clip_vision_output: Any = None,
        clip_vision: Any = None,
    ) -> io.NodeOutput:
        host.require_svd(model, "SVD Video Conditioning")
        frames = to_frames(image)
        from_lr = STARTS[check_choice("start", start, STARTS)]
        cuts = find_cuts(iter(frames)) if CUTS[check_choice("scene_cuts", scene_cuts, CUTS)] else ()
        context = host.scene_contexts(model, clip_vision_output, clip_vision, frames, cuts)
        lr = encode_video(
            partial(host.encoded, vae), with_augmentation(frames, augmentation), host.progress(len(frames))
        )
        micro = {"motion_bucket_id": motion_bucket_id, "fps": host.fps_key(fps), "augmentation_level": augmentation}
        scenes = {"vsr_cuts": cuts, "vsr_frames": len(frames)}
        positive = [[context, {**micro, "concat_latent_image": lr, **scenes}]]
        negative = [[torch.zeros_like(context), {**micro, "concat_latent_image": torch.zeros_like(lr)}]]
        return io.NodeOutput(
            positive,
            negative,
            {"samples": lr if from_lr else torch.zeros_like(lr), KNOWN: KnownVideo.of(frames, lr, cuts)},
        )


class Decode(io.ComfyNode):
    """Latents to a video, in chunks and tiles."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VSRDecode",
            display_name="Decode Video (VSR)",
            category=f"{CATEGORY}/latent",
            description=(
                "Decodes a video of any length and size in flat memory: fixed chunks of frames, overlapped, and spatial"
                " tiles. The host's VAE Decode chooses chunks by the memory that is free, which changes the picture."
            ),
            inputs=[
                io.Vae.Input("vae", tooltip="The VAE of the MODEL that sampled: SVD's, or a Stable Diffusion's."),
                io.Latent.Input("latent", tooltip="The sampled video."),
                count("chunk_frames", 0, 0, 512, "Frames decoded together; 0: as many as the VAE was trained on."),
                io.Image.Input(
                    "reference",
                    optional=True,
                    tooltip="The upscaled video that was encoded: for cfw and sateco, and as the size to crop to.",
                ),
                CFW.Input("cfw", optional=True, tooltip="From Load CFW (VSR): detail of the reference, by w."),
                STAM.Input("stam", optional=True, tooltip="From Load STAM (VSR): frames see each other."),
                number("w", 0.75, 0.0, 1.0, "How far cfw goes: 0 as without it, 1 most faithful.", optional=True),
                count(
                    "tile",
                    0,
                    0,
                    512,
                    "Latents a side of tiles, which give the picture of one pass; 0: 64, or what there is room for.",
                    optional=True,
                ),
                CAPM.Input("capm", optional=True, tooltip="From CAPM (VSR): the decoder adapts to the compression."),
                SATECO.Input(
                    "sateco",
                    optional=True,
                    tooltip="From SATeCo (VSR): the decoder follows the reference; frames agree.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The decoded video.")],
        )

    @classmethod
    def execute(
        cls,
        vae: Any,
        latent: dict[str, Any],
        chunk_frames: int,
        reference: Tensor | None = None,
        cfw: Any = None,
        stam: Any = None,
        w: float = 0.75,
        tile: int = 0,
        capm: Any = None,
        sateco: Any = None,
    ) -> io.NodeOutput:
        seen = None if reference is None else to_frames(reference, "reference")
        size = size_of(latent) if seen is None else (seen.shape[-2], seen.shape[-1])
        samples = latent["samples"]
        modules, levels = host.with_capm(DecoderModules(cfw, w, stam), capm, len(samples))
        modules = host.with_sateco(modules, sateco)
        cuts = host.latent_cuts(latent) if host.sees_time(vae, modules) else ()
        return io.NodeOutput(
            to_image(host.decoded(vae, samples, cuts, size, modules, levels, seen, chunk_frames, tile))
        )


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
