"""What the command line's options leave to the model: its defaults, known before it is loaded."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ..checkpoints.safefile import UPSCALER_KEY, stored
from ..checkpoints.unet_alone import find_unet
from ..errors import SettingError
from ..modules.video_upscaler import KIND as VIDEO_UPSCALER
from ..modules.video_upscaler import check_base
from ..pipeline.defaults import AUTO, DEFAULTS, Defaults


def defaults_of(args: argparse.Namespace) -> Defaults:
    """The defaults of the model that the options name, with the upscaler that its file says it was trained on. Raises
    CheckpointError for a UNet that is not there."""
    alone, bundled = args.unet != "none", args.model == "lite" and args.unet == "none"
    if args.control != "none":
        known = DEFAULTS["sd_lite" if bundled else "sd"]
    else:
        known = DEFAULTS["svd_lite" if bundled else "dc_vsr" if alone else "svd"]
    return known.stored(next(filter(None, (stored(file, UPSCALER_KEY) for file in _seeing(args))), None))


def _seeing(args: argparse.Namespace) -> Iterable[Path]:
    """The files of what sees the upscaled video: the control of a Stable Diffusion, else the UNet."""
    if args.control == "none" and args.unet != "none":
        return find_unet(Path(args.unet)).weights
    name = args.model if args.control == "none" else args.control
    return [] if name == "lite" else [Path(name)]


def steps_of(args: argparse.Namespace) -> int:
    """The steps asked for, else the model's own, or what the sampler wants."""
    return defaults_of(args).steps_of(args.sampler) if args.steps is None else int(args.steps)


def start_of(args: argparse.Namespace) -> float | None:
    """The noise level to start from that is asked for, else the model's own, which goes with its own steps."""
    asked = args.steps is not None or args.denoise != 1
    return args.start_sigma if args.start_sigma is not None else defaults_of(args).start_of(args.sampler, asked)


def guidance_of(args: argparse.Namespace) -> str:
    """The guidance asked for, else the model's own; a strength alone asks for the paper's."""
    strength = args.cfg is not None or args.guidance_scale is not None
    return defaults_of(args).guided(args.guidance, strength)


def refiner_of(args: argparse.Namespace) -> str:
    """The refiner asked for, else the one that was made for the model: "none", "lite" or a path."""
    return defaults_of(args).refiner if args.refiner == AUTO else str(args.refiner)


def layout_of(args: argparse.Namespace) -> str:
    """The layout of tiles asked for, else the model's own."""
    return defaults_of(args).laid_out(args.layout)


def color_of(args: argparse.Namespace) -> str:
    """The colour correction asked for, else the model's own."""
    return defaults_of(args).colored(args.color, refined=refiner_of(args) != "none")


class Upscalers(NamedTuple):
    """What enlarges one picture: "bicubic", "dcm" or a path; and what sees time on top of it: "video", a path or
    None."""

    base: str
    video: str | None


def enlarging_of(args: argparse.Namespace) -> Upscalers:
    """The upscalers asked for. Raises SettingError where what a video upscaler stands on is not named, or is named
    without one."""
    name, base = upscaler_of(args), str(args.upscaler_base)
    if name != "video" and stored(Path(name), "vsr.kind") != VIDEO_UPSCALER:
        if base != AUTO:
            raise SettingError(
                f"--upscaler-base is {base} and --upscaler {name}: expected a video upscaler to stand on it; give video"
                " or its file as --upscaler"
            )
        return Upscalers(name, None)
    if base == AUTO and name != "video":
        check_base(name)
    return Upscalers("dcm" if base == AUTO else base, name)


def upscaler_of(args: argparse.Namespace) -> str:
    """The upscaler asked for, else the one that the model was trained with: "bicubic", "dcm", "video" or a path. Warns
    of another than that. Raises SettingError where it is a file that is not named."""
    own = defaults_of(args)
    name = own.enlarged_by(args.upscaler)
    if against := own.objection(name):
        warnings.warn(f"--upscaler is {args.upscaler}: {against}; --upscaler auto takes its own", stacklevel=2)
    return name
