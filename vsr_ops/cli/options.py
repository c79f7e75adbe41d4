"""The command line's options of sampling, and what they stand for: settings, parts and a model."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..backbones.sd import build_sd
from ..backbones.svd import DTYPES, Backbone, load_svd, pick_device, pick_dtype
from ..checkpoints.sd import LITE_SD, PREDICTIONS, read_sd
from ..checkpoints.unet_alone import find_unet
from ..errors import SettingError
from ..image.color import COLOR
from ..modules.capm_file import load_capms
from ..modules.capm_hints import check_strength
from ..modules.cfw import check_w, load_cfw
from ..modules.compression import level_of, load_compression
from ..modules.control import check_strength as check_control_strength
from ..modules.control import load_control
from ..modules.dcm import load_dcm
from ..modules.refiner import load_refiner
from ..modules.stam import load_stam
from ..pipeline.defaults import AUTO, DDPM_STEPS, DEFAULTS, PAPER_GUIDANCE
from ..pipeline.parts import CAPMSettings, PipelineModules
from ..pipeline.sampler import Settings
from ..sampling.align import MODES as ALIGN_MODES
from ..sampling.align import SCALES as ALIGN_SCALES
from ..sampling.guidance import GUIDANCE
from ..sampling.interval import GuidanceInterval
from ..sampling.layouts import LAYOUTS
from ..sampling.propagation import PROPAGATION, SAP_MODES, Propagation
from ..sampling.samplers import SAMPLERS
from ..sampling.tiling import TileSize
from ..system.outputs import files_of
from .chosen import color_of, guidance_of, layout_of, refiner_of, steps_of, upscaler_of
from .flow import add_flow, flow_of
from .text import add_texts, refuse_texts, texts_of

#: The options that may name a file of weights, and what stands there for no file of the user's.
_WEIGHTS = ("model", "upscaler", "refiner", "control", "capm", "cfw", "stam", "flow_weights", "text")
_NAMES = {"lite", "sd_lite", "none", "auto", "dcm", "bicubic"}

#: Whether the terminal SNR is zero; None: as the model says.
_ZSNR = {"auto": None, "on": True, "off": False}


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """The options of every command that samples."""
    add = parser.add_argument
    add(
        "--model",
        default="lite",
        metavar="lite|PATH",
        help="bundled weights, or an SVD .safetensors or diffusers folder; with --control a Stable Diffusion",
    )
    add(
        "--unet",
        default="none",
        metavar="none|PATH",
        help="in the place of the model's own: a UNet alone in diffusers' layout, DC-VSR's say",
    )
    each = ", ".join(f"{known.steps} with {name}" for name, known in DEFAULTS.items())
    add("--steps", type=int, help=f"{each}, {DDPM_STEPS} with the sampler ddpm; 0 is no diffusion")
    auto = f"auto ({PAPER_GUIDANCE} with a full SVD, or where a strength is given, else none)"
    add("--guidance", default=AUTO, help=", ".join([auto, *GUIDANCE]))
    add("--cfg", type=float, help="classifier-free guidance; 1 is off. With dssag it is DC-VSR equation 9's 1 + s")
    add("--guidance-scale", type=float, help="the s of dssag, pag and sag; 0 is off")
    add("--rho", type=float, default=Settings.rho, help="how fast dssag's blur fades over the steps; larger is sooner")
    add("--guidance-interval", metavar="MIN:MAX", help="guided at noise levels (sigmas) in it alone; all by default")
    add("--guidance-every", type=int, default=1, metavar="N", help="keep what guidance adds for N - 1 steps out of N")
    add("--tile", metavar="HxWxT", help="in latents (8 pixels each) and frames; the model's own by default")
    add("--overlap", type=float, default=0.5, help="share of a tile, 0 to 0.75")
    add(
        "--layout",
        default=AUTO,
        help=f"how tiles lie: {', '.join(LAYOUTS)} (the fewest tiles), or auto, the model's own",
    )
    add("--propagation", default="sap+tap", help=", ".join(PROPAGATION))
    add("--sap-mode", default="auto", help=", ".join(SAP_MODES))
    add("--sap-rate", type=int, help="every s-th token in y and x; by default 4, more where tiles are many")
    add("--tap-frames", type=int, default=4)
    add("--tap-rate", type=int, default=1, help="1 is the paper's setting, 4 is cheaper")
    add(
        "--upscaler",
        default=AUTO,
        metavar="auto|dcm|bicubic|PATH",
        help="enlarges the input; auto: what the model was trained with; PATH: a SwinIR, say",
    )
    add("--refiner", default=AUTO, metavar="auto|none|PATH", help="auto: the bundled one with the bundled weights")
    add("--refiner-w", type=float, default=0.0, help="0: as refined, 1: the upscaled input as it is")
    auto = "auto (none after a refiner and with a full SVD, adain with a full Stable Diffusion, else detail)"
    add("--color", default=AUTO, help=", ".join([auto, *COLOR]))
    add("--control", default="none", metavar="none|lite|PATH", help="a ControlNet on Stable Diffusion, in SVD's place")
    add("--control-strength", type=float, default=1.0)
    add_texts(parser)
    add("--prediction", default="auto", help=", ".join(["with --control: auto (as the model says)", *PREDICTIONS]))
    add(
        "--zsnr",
        default="auto",
        help="with --control: auto, on, off; on for a model of zero terminal SNR, DiffBIR 2.1's",
    )
    add("--capm", default="none", metavar="none|lite|sd_lite|PATH", help="compression prompts in UNet and decoder")
    add("--capm-strength", type=float, default=1.0, help="0 is off, 1 what was trained")
    add("--crf", type=float, default=-1.0, help="what CAPM is told of the input, 0 to 51; below 0: it is estimated")
    add("--decode-w", type=float, default=0.0, metavar="W", help="CFW's weight in the decoder; 0 is off, try 0.75")
    add("--cfw", default="lite", metavar="lite|PATH", help="the CFW that --decode-w weighs: StableSR's, or this pack's")
    add("--stam", default="none", metavar="none|lite|PATH", help="attention over time in the decoder")
    add(
        "--align",
        type=float,
        default=0.0,
        metavar="LAMBDA",
        help="along the input's motion; 0 is off, try 0.5 (propagate: 0.1)",
    )
    add("--align-mode", default="gradient", help=", ".join(ALIGN_MODES))
    add("--align-scale", default="bounded", help=f"of gradient's step: {', '.join(ALIGN_SCALES)} (the paper's)")
    add_flow(parser)
    add("--sampler", default=Settings.sampler, help=f"{', '.join(SAMPLERS)}; SDATC takes ddpm")
    add("--seed", type=int, default=0)
    add("--denoise", type=float, default=1.0, help="below 1: start from the LR latent at partial noise")
    add("--start-sigma", type=float, metavar="SIGMA", help="start from the LR latent at this noise level, in all steps")
    add("--batch", type=int, default=1, help="spatial tiles through the UNet together")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:0 ..., mps")
    add("--dtype", default="auto", help=", ".join(["auto", *DTYPES]))


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
        start_sigma=args.start_sigma,
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
    upscaler, refiner = upscaler_of(args), refiner_of(args)
    return PipelineModules(
        upscale_fn=None if upscaler == "bicubic" else load_dcm("lite" if upscaler == "dcm" else upscaler, device),
        refiner=None if refiner == "none" else load_refiner(refiner, device),
        refiner_w=args.refiner_w,
        cfw=load_cfw(args.cfw).to(device) if args.decode_w > 0 else None,
        decode_w=args.decode_w,
        stam=None if args.stam == "none" else load_stam(args.stam).to(device),
        prompts=_prompts(args),
        flow=flow_of(args, device),
    )


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
