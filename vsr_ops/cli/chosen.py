"""What the command line's options leave to the model: its defaults, known before it is loaded."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterable
from pathlib import Path

from ..checkpoints.safefile import UPSCALER_KEY, stored
from ..checkpoints.unet_alone import find_unet
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


def upscaler_of(args: argparse.Namespace) -> str:
    """The upscaler asked for, else the one that the model was trained with: "bicubic", "dcm" or a path. Warns of
    another than that. Raises SettingError where it is a file that is not named."""
    own = defaults_of(args)
    name = own.enlarged_by(args.upscaler)
    if against := own.objection(name):
        warnings.warn(f"--upscaler is {args.upscaler}: {against}; --upscaler auto takes its own", stacklevel=2)
    return name
