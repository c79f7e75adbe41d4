"""One node for a first result; it only composes the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..vsr_ops.image.color import COLOR
from ..vsr_ops.sampling.propagation import PROPAGATION, SAP_MODES
from . import host
from .common import CATEGORY, REFINER, check_choice, choice, count, number
from .guiders import DSSAGGuider, PAGGuider, SAGGuider
from .latent import Decode, SVDConditioning
from .patches import TiledDiffusion
from .picture import ColorMatch, Refine, UpscaleLR


def _dssag(model: Any, positive: Any, negative: Any, cfg: float, scale: float) -> Any:
    if cfg == 1:
        return DSSAGGuider.execute(model, positive, scale, 0.5, "ends").args[0]
    return host.guider(host.patch_perturbed(model, "dssag", scale, "ends", 0.5), positive, negative, cfg)


#: (model, positive, negative, cfg, scale) -> GUIDER
GUIDERS: dict[str, Callable[[Any, Any, Any, float, float], Any]] = {
    "dssag": _dssag,
    "cfg": lambda model, positive, negative, cfg, scale: host.guider(model, positive, negative, cfg),
    "pag": lambda model, positive, negative, cfg, scale: PAGGuider.execute(
        model, positive, cfg, scale, "middle", negative
    ).args[0],
    "sag": lambda model, positive, negative, cfg, scale: SAGGuider.execute(model, positive, cfg, scale, negative).args[
        0
    ],
    "none": lambda model, positive, negative, cfg, scale: host.guider(model, positive, None, 1.0),
}


class TiledSVDSampler(io.ComfyNode):
    """Video in, larger video out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VSRTiledSVDSampler",
            display_name="Upscale Video with SVD (VSR)",
            category=CATEGORY,
            description=(
                "The whole of DC-VSR in one node: upscale, condition, sample in tiles, decode, refine, match colours."
                " The other nodes of the pack are its parts, to be wired differently."
            ),
            inputs=[
                io.Model.Input("model", tooltip="Stable Video Diffusion: Load Lite SVD to start with."),
                io.Vae.Input("vae", tooltip="SVD's VAE."),
                io.Image.Input("image", tooltip="The low-resolution video, as a batch of frames."),
                number("scale", 4.0, 0.01, 16.0, "How many times larger; 1 for a video that is upscaled already."),
                count("steps", 10, 1, 1000, "Sampling steps."),
                number(
                    "cfg", 1.0, 0.0, 100.0, "Classifier-free guidance; 1 is off. With dssag another value is 1 + s."
                ),
                count("seed", 0, 0, 0xFFFFFFFFFFFFFFFF, "The noise.", control_after_generate=True),
                choice("guidance", GUIDERS, "dssag", "What steers away from weak estimates; none is fastest."),
                number("guidance_scale", 1.0, 0.0, 100.0, "Strength s of dssag (at cfg 1), pag and sag."),
                choice("sampler_name", host.SAMPLERS, "euler", "The host's sampler."),
                choice("scheduler", host.SCHEDULERS, "karras", "The host's schedule; karras is SVD's."),
                number("denoise", 1.0, 0.01, 1.0, "Below 1 it starts from the video: for stock SVD about 0.3."),
                count("tile_height", 0, 0, 512, "In latents of 8 pixels; 0: the checkpoint's own.", step=8),
                count("tile_width", 0, 0, 512, "In latents of 8 pixels; 0: the checkpoint's own.", step=8),
                count("tile_frames", 0, 0, 512, "Frames in a window; 0: the checkpoint's own."),
                number("overlap", 0.5, 0.0, 0.75, "Share of a tile that its neighbour covers too."),
                choice("propagation", PROPAGATION, "sap+tap", "What is carried between tiles."),
                choice("sap_mode", SAP_MODES, "auto", "How SAP reaches all tiles; see Tiled Diffusion."),
                choice("color", COLOR, "detail", "How colours are matched to the input; see Match Colour."),
                io.ClipVisionOutput.Input(
                    "clip_vision_output", optional=True, tooltip="CLIP's view of a frame, for stock SVD."
                ),
                io.UpscaleModel.Input(
                    "upscale_model",
                    optional=True,
                    tooltip="Enlarges the input instead of bicubic resizing: Load DCM with Load Lite SVD.",
                ),
                REFINER.Input(
                    "refiner",
                    optional=True,
                    tooltip="From Load Refiner: puts the result and the upscaled input together; set color to none.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The sampled video, to decode or refine."),
                io.Image.Output(display_name="image", tooltip="The larger video."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        vae: Any,
        image: Tensor,
        scale: float,
        steps: int,
        cfg: float,
        seed: int,
        guidance: str,
        guidance_scale: float,
        sampler_name: str,
        scheduler: str,
        denoise: float,
        tile_height: int,
        tile_width: int,
        tile_frames: int,
        overlap: float,
        propagation: str,
        sap_mode: str,
        color: str,
        clip_vision_output: Any = None,
        upscale_model: Any = None,
        refiner: Any = None,
    ) -> io.NodeOutput:
        guide = GUIDERS[check_choice("guidance", guidance, GUIDERS)]
        check_choice("color", color, COLOR)
        check_choice("sampler_name", sampler_name, host.SAMPLERS)
        check_choice("scheduler", scheduler, host.SCHEDULERS)
        upscaled = UpscaleLR.execute(image, scale, 0, 0, "bicubic", upscale_model).args[0]
        tiled = TiledDiffusion.execute(
            *(model, tile_height, tile_width, tile_frames, overlap, propagation, sap_mode),
            *(0, 4, 1, "ends", 0.0, 1.0, 1),
        ).args[0]
        start = "noise" if denoise == 1 else "LR latent"
        positive, negative, latent = SVDConditioning.execute(
            tiled, vae, upscaled, 127, 8, 0.0, start, "detect", clip_vision_output
        ).args
        made = guide(tiled, positive, negative, cfg, guidance_scale)
        sampled = host.sample(made, latent, seed, steps, sampler_name, scheduler, denoise)
        decoded = Decode.execute(vae, sampled, 0).args[0]
        if refiner is not None:
            decoded = Refine.execute(decoded, upscaled, refiner, 0.0).args[0]
        return io.NodeOutput(sampled, ColorMatch.execute(decoded, upscaled, color, 1.0, 0.0).args[0])
