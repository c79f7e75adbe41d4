"""The command line's texts: what a Stable Diffusion is told, and the command that keeps what an encoder makes of it."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..backbones.svd import pick_device
from ..backbones.text import encode_texts
from ..checkpoints.sd import is_own
from ..checkpoints.text_encoder import read_text_encoder
from ..checkpoints.text_file import Texts, read_texts, write_texts
from ..errors import CheckpointError, SettingError
from ..system.outputs import files_of, refuse_inputs, refuse_taken
from .options import EMBED


def refuse_texts(args: argparse.Namespace) -> None:
    """Raises SettingError for a text where no Stable Diffusion samples."""
    if args.prompt or args.negative or args.text != "none":
        raise SettingError(
            "a text is given and no control: expected a Stable Diffusion, for SVD reads none; add"
            " --control, or leave --prompt, --negative and --text out"
        )


def texts_of(args: argparse.Namespace, device: torch.device) -> Texts | None:
    """What the Stable Diffusion of `--model` is told; None for this pack's own, which learnt from zeros.

    Raises SettingError where a published one has neither a text encoder nor `--text`, and CheckpointError.
    """
    if args.text != "none":
        if args.prompt or args.negative:
            raise SettingError(
                f"text is {args.text!r} and a prompt or negative is given too: expected one of them; the file holds"
                " both already, leave them out"
            )
        return read_texts(Path(args.text))
    path = Path(args.model)
    own = str(args.model) == "lite" or is_own(path)
    encoder = None if own else read_text_encoder(path)
    if encoder is not None:
        return encode_texts(encoder, args.prompt, args.negative, device)
    if not own:
        raise SettingError(
            f"{path}: has no text encoder, and a published Stable Diffusion was trained with one: expected the encoded"
            f" empty text; make it with `{EMBED}` from the model's own encoder, and give it as --text"
        )
    if args.prompt or args.negative:
        raise SettingError(
            f"prompt is {args.prompt!r} and negative {args.negative!r}: expected none, for model {args.model!r} has no"
            " text encoder; leave them out"
        )
    return None


def embed(args: argparse.Namespace) -> None:
    """Writes what a text encoder makes of the two texts. Raises VSRError."""
    out: Path = args.out
    path = Path(args.model)
    if out.suffix != ".safetensors":
        raise SettingError(f"{out}: suffix {out.suffix!r}, expected '.safetensors'; rename it")
    if path.exists():
        refuse_inputs(out, files_of(path))
    refuse_taken(out, args.overwrite)
    encoder = read_text_encoder(path)
    if encoder is None:
        raise CheckpointError(f"{path}: holds no text encoder of CLIP; give Stable Diffusion 1.5 or 2.1 with its own")
    texts = encode_texts(encoder, args.prompt, args.negative, pick_device(args.device))
    write_texts(out, texts, (args.prompt, args.negative), f"nothing: the text encoder of {path.name}")
    print(f"{out}: {texts.prompt.shape[1]} tokens of width {texts.width}; give it as --text")
