"""What the command line's options of sampling stand for: settings, parts and a model."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..backbones.sd import build_sd
from ..backbones.svd import Backbone, load_svd, pick_device, pick_dtype
from ..checkpoints.sd import LITE_SD, read_sd
from ..checkpoints.unet_alone import find_unet
from ..errors import SettingError
from ..modules.capm_file import load_capms
from ..modules.capm_hints import check_strength
from ..modules.cfw import check_w, load_cfw
from ..modules.compression import level_of, load_compression
from ..modules.control import check_strength as check_control_strength
from ..modules.control import load_control
from ..modules.dcm import load_dcm
from ..modules.refiner import load_refiner
from ..modules.sateco import Strengths
from ..modules.sateco_file import load_satecos
from ..modules.stam import load_stam
from ..modules.video_upscaler import load_video_upscaler
from ..names import BRANCH_MODES, SAP_MODES
from ..pipeline.parts import CAPMSettings, PipelineModules, SATeCoSettings
from ..pipeline.sampler import Settings
from ..sampling.interval import GuidanceInterval
from ..sampling.propagation import Propagation
from ..sampling.tiling import TileSize
from ..system.outputs import files_of
from .chosen import color_of, enlarging_of, guidance_of, layout_of, refiner_of, start_of, steps_of
from .flow import flow_of
from .text import refuse_texts, texts_of

#: The options that may name a file of weights, and what stands there for no file of the user's.
_WEIGHTS = (
    "model",
    "upscaler",
    "upscaler_base",
    "refiner",
    "control",
    "capm",
    "sateco",
    "cfw",
    "stam",
    "flow_weights",
    "text",
)
_NAMES = {"lite", "sd_lite", "none", "auto", "dcm", "video", "bicubic"}

#: Whether the terminal SNR is zero; None: as the model says.
_ZSNR = {"auto": None, "on": True, "off": False}


def files_read(args: argparse.Namespace) -> list[Path]:
    """The files that the options of weights name: no output may be one of them. Raises CheckpointError for a UNet that
    is not there."""
    given = {str(getattr(args, name)) for name in _WEIGHTS} - _NAMES
    found = [file for path in map(Path, sorted(given)) if path.exists() for file in files_of(path)]
    return found + ([] if args.unet == "none" else find_unet(Path(args.unet)).files())


def interval_of(text: str | None, every: int) -> GuidanceInterval:
    """Where and how often guidance acts, of MIN:MAX in sigmas; an end that is left out is open. Raises SettingError."""
    if text is None:
        return GuidanceInterval(every=every)
    low, colon, high = text.partition(":")
    try:
        if not colon:
            raise ValueError
        ends = float(low or 0), float(high or "inf")
    except ValueError:
        raise SettingError(
            f"guidance interval is {text!r}: expected MIN:MAX in sigmas, such as 0.1:50, 0.1: or :50"
        ) from None
    return GuidanceInterval(*ends, every)


def settings_of(args: argparse.Namespace) -> Settings:
    """The options of sampling as settings, gaps filled by what the weights were trained with. Raises SettingError."""
    if args.sap_mode not in SAP_MODES:
        raise SettingError(f"SAP mode is {args.sap_mode!r}: expected one of {', '.join(SAP_MODES)}")
    if args.branches not in BRANCH_MODES:
        raise SettingError(f"branches is {args.branches!r}: expected one of {', '.join(BRANCH_MODES)}")
    propagation = Propagation.named(
        args.propagation,
        sap_lagged=args.sap_mode == "lagged",
        sap_rate=args.sap_rate,
        tap_frames=args.tap_frames,
        tap_rate=args.tap_rate,
    )
    return Settings(
        steps=steps_of(args),
        guidance=guidance_of(args),
        cfg=args.cfg,
        guidance_scale=args.guidance_scale,
        rho=args.rho,
        interval=interval_of(args.guidance_interval, args.guidance_every),
        tile=None if args.tile is None else TileSize.parse(args.tile),
        overlap=args.overlap,
        layout=layout_of(args),
        propagation=propagation,
        color=color_of(args),
        seed=args.seed,
        denoise=args.denoise,
        start_sigma=start_of(args),
        batch=args.batch,
        align=args.align,
        align_mode=args.align_mode,
        align_scale=args.align_scale,
        sampler=args.sampler,
    )


def parts_of(args: argparse.Namespace) -> PipelineModules:
    """What stands around the diffusion, loaded. Raises VSRError."""
    if not 0 <= args.refiner_w <= 1:
        raise SettingError(f"refiner w is {args.refiner_w}: expected a share from 0 to 1")
    check_w(args.decode_w)
    device = pick_device(args.device)
    refiner = refiner_of(args)
    upscaler = enlarging_of(args)
    return PipelineModules(
        upscale_fn=None if upscaler.base == "bicubic" else load_dcm(_own(upscaler.base, "dcm"), device),
        video=None if upscaler.video is None else load_video_upscaler(_own(upscaler.video, "video"), device),
        video_strength=args.upscaler_strength,
        refiner=None if refiner == "none" else load_refiner(refiner, device),
        refiner_w=args.refiner_w,
        sateco_w=args.sateco_w,
        cfw=load_cfw(args.cfw).to(device) if args.decode_w > 0 else None,
        decode_w=args.decode_w,
        stam=None if args.stam == "none" else load_stam(args.stam).to(device),
        prompts=_prompts(args),
        sateco=_sateco(args, device),
        flow=flow_of(args, device),
    )


def _own(name: str, bundled: str) -> str:
    """A file's name, or what loaders call the bundled one."""
    return "lite" if name == bundled else name


def _prompts(args: argparse.Namespace) -> CAPMSettings | None:
    """CAPM and what it is told; None where it is off."""
    check_strength(args.capm_strength)
    if args.crf >= 0:
        level_of(args.crf)
    if args.capm == "none" or args.capm_strength == 0:
        return None
    device = pick_device(args.device)
    head = load_compression(device=device) if args.crf < 0 else None
    return CAPMSettings(load_capms(args.capm, device), args.capm_strength, head, args.crf)


def _sateco(args: argparse.Namespace, device: torch.device) -> SATeCoSettings | None:
    """SATeCo and how far it goes; None where it is off."""
    strengths = Strengths(args.sateco_strength, args.sateco_temporal)
    if args.sateco == "none" or strengths.off:
        return None
    return SATeCoSettings(load_satecos(args.sateco, device), strengths)


def model_of(args: argparse.Namespace) -> Backbone:
    """SVD, or with a control Stable Diffusion. Raises VSRError."""
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    if args.control == "none":
        refuse_texts(args)
        return load_svd(args.model, device, dtype, None if args.unet == "none" else Path(args.unet))
    if args.unet != "none":
        raise SettingError(f"unet is {args.unet!r} and control {args.control!r}: expected one of them; leave one out")
    check_control_strength(args.control_strength)
    if args.zsnr not in _ZSNR:
        raise SettingError(f"zsnr is {args.zsnr!r}: expected one of {', '.join(_ZSNR)}")
    control, texts = load_control(args.control), texts_of(args, device)
    weights = read_sd(LITE_SD if args.model == "lite" else Path(args.model), dtype)
    weights = weights.told(None if args.prediction == "auto" else args.prediction, _ZSNR[args.zsnr])
    return build_sd(weights, device, dtype, control, args.control_strength, texts)
