"""One node for a first result; it only composes the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..vsr_ops.image.color import COLOR
from ..vsr_ops.sampling.propagation import PROPAGATION, SAP_MODES
from . import host
from .common import CATEGORY, REFINER, check_choice, choice, count, node_defaults, number
from .guiders import DSSAGGuider, PAGGuider, SAGGuider
from .latent import Decode, SVDConditioning
from .patches import DSSAG, TiledDiffusion
from .picture import ColorMatch, Refine, UpscaleLR


def _made(node: type[io.ComfyNode], **values: Any) -> Any:
    """What a node makes of these values, the others at its own defaults."""
    return node.execute(**{**node_defaults(node), **values}).args[0]


def _dssag(model: Any, positive: Any, negative: Any, cfg: float, scale: float) -> Any:
    if cfg == 1:
        return _made(DSSAGGuider, model=model, positive=positive, scale=scale)
    return host.guider(_made(DSSAG, model=model, scale=scale), positive, negative, cfg)


def _pag(model: Any, positive: Any, negative: Any, cfg: float, scale: float) -> Any:
    return _made(PAGGuider, model=model, positive=positive, negative=negative, cfg=cfg, scale=scale)


def _sag(model: Any, positive: Any, negative: Any, cfg: float, scale: float) -> Any:
    return _made(SAGGuider, model=model, positive=positive, negative=negative, cfg=cfg, scale=scale)


#: (model, positive, negative, cfg, scale) -> GUIDER
GUIDERS: dict[str, Callable[[Any, Any, Any, float, float], Any]] = {
    "dssag": _dssag,
    "cfg": lambda model, positive, negative, cfg, scale: host.guider(model, positive, negative, cfg),
    "pag": _pag,
    "sag": _sag,
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
        upscaled = _made(UpscaleLR, image=image, scale=scale, method="bicubic", upscale_model=upscale_model)
        tiled = _made(
            TiledDiffusion,
            model=model,
            tile_height=tile_height,
            tile_width=tile_width,
            tile_frames=tile_frames,
            overlap=overlap,
            propagation=propagation,
            sap_mode=sap_mode,
        )
        positive, negative, latent = SVDConditioning.execute(
            **{
                **node_defaults(SVDConditioning),
                "model": tiled,
                "vae": vae,
                "image": upscaled,
                "start": "noise" if denoise == 1 else "LR latent",
                "clip_vision_output": clip_vision_output,
            }
        ).args
        made = guide(tiled, positive, negative, cfg, guidance_scale)
        sampled = host.sample(made, latent, seed, steps, sampler_name, scheduler, denoise)
        decoded = _made(Decode, vae=vae, latent=sampled)
        if refiner is not None:
            decoded = _made(Refine, decoded=decoded, upscaled=upscaled, refiner=refiner)
        return io.NodeOutput(sampled, _made(ColorMatch, image=decoded, reference=upscaled, method=color))
