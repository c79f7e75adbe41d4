"""One node for a first result; it only composes the others."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..vsr_ops.image.color import COLOR
from ..vsr_ops.names import SAP_MODES
from ..vsr_ops.pipeline.defaults import AUTO, Defaults
from ..vsr_ops.sampling.interval import ALL_NOISE, GuidanceInterval, check_guided
from ..vsr_ops.sampling.layouts import LAYOUTS
from ..vsr_ops.sampling.propagation import PROPAGATION
from . import host
from .common import (
    CATEGORY,
    REFINER,
    VIDEO_UPSCALER,
    check_choice,
    choice,
    count,
    interval_inputs,
    node_defaults,
    number,
)
from .guiders import DSSAGGuider, PAGGuider, SAGGuider
from .latent import Decode, SVDConditioning
from .load import LoadDCM, LoadVideoUpscaler
from .patches import DSSAG, TiledDiffusion
from .picture import ColorMatch, Refine, UpscaleLR

log = logging.getLogger(__name__)


def _made(node: type[io.ComfyNode], **values: Any) -> Any:
    """What a node makes of these values, the others at its own defaults."""
    return node.execute(**{**node_defaults(node), **values}).args[0]


def _dssag(model: Any, positive: Any, negative: Any, cfg: float, scale: float, interval: GuidanceInterval) -> Any:
    own = {"scale": scale, **asdict(interval)}
    if cfg == 1:
        return _made(DSSAGGuider, model=model, positive=positive, **own)
    return host.guider(_made(DSSAG, model=model, **own), positive, negative, cfg)


def _pag(model: Any, positive: Any, negative: Any, cfg: float, scale: float, interval: GuidanceInterval) -> Any:
    own = {"cfg": cfg, "scale": scale, **asdict(interval)}
    return _made(PAGGuider, model=model, positive=positive, negative=negative, **own)


def _sag(model: Any, positive: Any, negative: Any, cfg: float, scale: float, interval: GuidanceInterval) -> Any:
    own = {"cfg": cfg, "scale": scale, **asdict(interval)}
    return _made(SAGGuider, model=model, positive=positive, negative=negative, **own)


#: (model, positive, negative, cfg, scale, interval) -> GUIDER
GUIDERS: dict[str, Callable[[Any, Any, Any, float, float, GuidanceInterval], Any]] = {
    "dssag": _dssag,
    "cfg": lambda model, positive, negative, cfg, scale, interval: host.cfg_guider(
        model, positive, negative, cfg, interval
    ),
    "pag": _pag,
    "sag": _sag,
    "none": lambda model, positive, negative, cfg, scale, interval: host.guider(model, positive, None, 1.0),
}


UPSCALERS = (AUTO, "bicubic", "dcm", "video")
#: What loads an upscaler by name, by the input of Upscale LR Video that it goes to; bicubic needs none.
LOADERS: dict[str, dict[str, type[io.ComfyNode]]] = {
    "dcm": {"upscale_model": LoadDCM},
    "video": {"video_upscaler": LoadVideoUpscaler},
}


def _enlarged(own: Defaults, asked: str, wired: dict[str, Any], image: Tensor, scale: float) -> Tensor:
    """The input at the result's size: by what is `wired`, else by the upscaler `asked` for. A video of that size
    already has been enlarged. Logs what speaks against it."""
    there = {name: value for name, value in wired.items() if value is not None}
    if not there and scale == 1 and asked == AUTO:
        return _made(UpscaleLR, image=image, scale=scale)
    # Which model is wired cannot be told, only that it is one.
    name = next(iter(there), None) or own.enlarged_by(asked)
    if (against := own.objection(name)) and not (there and own.upscaler != "bicubic"):
        log.warning("Upscale Video with SVD (VSR): the input is enlarged by %s, but %s", name, against)
    given = there or {input: _made(loader) for input, loader in LOADERS.get(name, {}).items()}
    return _made(UpscaleLR, image=image, scale=scale, **given)


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
                count("steps", 0, 0, 1000, "Sampling steps; 0: as many as suit the MODEL, 1 for lite, else 25."),
                number(
                    "cfg", 1.0, 0.0, 100.0, "Classifier-free guidance; 1 is off. With dssag another value is 1 + s."
                ),
                count("seed", 0, 0, 0xFFFFFFFFFFFFFFFF, "The noise.", control_after_generate=True),
                choice(
                    "guidance",
                    (*GUIDERS, AUTO),
                    AUTO,
                    "What steers away from weak estimates; none is fastest. auto: none for lite, unless cfg is not 1,"
                    " else dssag.",
                ),
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
                choice(
                    "color",
                    (*COLOR, AUTO),
                    AUTO,
                    "How colours are matched to the input; see Match Colour. auto: detail for lite, unless refined,"
                    " else none.",
                ),
                io.ClipVisionOutput.Input(
                    "clip_vision_output", optional=True, tooltip="CLIP's view of a frame, for stock SVD."
                ),
                io.UpscaleModel.Input(
                    "upscale_model",
                    optional=True,
                    tooltip="Enlarges the input in the upscaler's place: Load DCM, or any of Load Upscale Model.",
                ),
                REFINER.Input(
                    "refiner",
                    optional=True,
                    tooltip="From Load Refiner: the result and the upscaled input in one; color auto is then none.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="The MODEL's own, in clip_vision_output's place: sees the first frame of every scene.",
                ),
                choice(
                    "upscaler",
                    UPSCALERS,
                    AUTO,
                    "What enlarges the input where no upscaler is wired. auto: what the MODEL was trained with,"
                    " the pack's DCM for lite, bicubic for DC-VSR; at scale 1 nothing does. video: the DCM and, on top"
                    " of it, the pack's video upscaler.",
                    optional=True,
                ),
                choice("layout", (*LAYOUTS, AUTO), AUTO, "How tiles lie; see Tiled Diffusion.", optional=True),
                *interval_inputs(),
                VIDEO_UPSCALER.Input(
                    "video_upscaler",
                    optional=True,
                    tooltip="From Load Video Upscaler: enlarges the input in upscale_model's and upscaler's place.",
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
        clip_vision: Any = None,
        upscaler: str = AUTO,
        layout: str = AUTO,
        sigma_min: float = 0.0,
        sigma_max: float = ALL_NOISE,
        every: int = 1,
        video_upscaler: Any = None,
    ) -> io.NodeOutput:
        own = host.defaults_of(model)
        chosen = own.guided(check_choice("guidance", guidance, (*GUIDERS, AUTO)), strength=cfg != 1)
        interval = GuidanceInterval(sigma_min, sigma_max, every)
        check_guided(chosen, interval)
        color = own.colored(check_choice("color", color, (*COLOR, AUTO)), refined=refiner is not None)
        check_choice("upscaler", upscaler, UPSCALERS)
        check_choice("layout", layout, (*LAYOUTS, AUTO))
        check_choice("sampler_name", sampler_name, host.SAMPLERS)
        check_choice("scheduler", scheduler, host.SCHEDULERS)
        start = own.start_of(sampler_name, asked=steps != 0 or denoise != 1)
        wired = {"upscale_model": upscale_model, "video_upscaler": video_upscaler}
        upscaled = _enlarged(own, upscaler, wired, image, scale)
        tiled = _made(
            TiledDiffusion,
            model=model,
            tile_height=tile_height,
            tile_width=tile_width,
            tile_frames=tile_frames,
            overlap=overlap,
            propagation=propagation,
            sap_mode=sap_mode,
            layout=layout,
        )
        positive, negative, latent = SVDConditioning.execute(
            **{
                **node_defaults(SVDConditioning),
                "model": tiled,
                "vae": vae,
                "image": upscaled,
                "start": "noise" if denoise == 1 and start is None else "LR latent",
                "clip_vision_output": clip_vision_output,
                "clip_vision": clip_vision,
            }
        ).args
        made = GUIDERS[chosen](tiled, positive, negative, cfg, guidance_scale, interval)
        sampled = host.sample(
            made, latent, seed, steps or own.steps_of(sampler_name), sampler_name, scheduler, denoise, start
        )
        decoded = _made(Decode, vae=vae, latent=sampled)
        if refiner is not None:
            decoded = _made(Refine, decoded=decoded, upscaled=upscaled, refiner=refiner)
        return io.NodeOutput(sampled, _made(ColorMatch, image=decoded, reference=upscaled, method=color))
