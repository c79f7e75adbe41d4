"""Refuses what cannot be sampled, saying what it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...vsr_ops.errors import SettingError
from .run import Scenes


def check_options(guider: Any) -> None:
    """Raises SettingError for what a MODEL was given that VSR's patches cannot work with."""
    if guider.model_options.get("context_handler") is not None:
        raise SettingError(
            "this MODEL has context windows (Context Windows nodes): expected none, for VSR's patches need whole"
            " videos, and Tiled Diffusion (VSR) covers long ones; remove the context windows"
        )
    clones = guider.model_patcher.get_additional_models_with_key("multigpu")
    if clones or guider.model_options.get("multigpu_clones"):
        raise SettingError(
            "this MODEL is spread over several GPUs (MultiGPU CFG Split): expected one, for the tiles of a run hand on"
            " to each other what they found; take that node off"
        )


def check_run(guider: Any, shape: Sequence[int], latent: Tensor, width: int | None, svd: bool) -> None:
    """Raises SettingError for what cannot be sampled: `width` is what the UNet's cross-attention takes, and for SVD the
    host would resize, repeat or crop a conditioning silently."""
    check_options(guider)
    if bool(torch.isnan(latent).any()):
        raise SettingError("the LATENT holds NaN: expected finite numbers; check the node that made it")
    if len(shape) != 4:
        raise SettingError(
            f"the LATENT has shape {tuple(shape)}: expected frames as a batch, (frames, channels, height, width);"
            " encode the video with this MODEL's own VAE"
        )
    for name, conds in guider.conds.items():
        for cond in conds:
            tokens = cond.get("cross_attn")
            if tokens is not None and width is not None and tokens.shape[-1] != width:
                raise SettingError(
                    f"the {name} conditioning is {tokens.shape[-1]} wide, this MODEL takes {width}: expected one made"
                    " for it; encode text with the MODEL's own CLIP, or wire Null Prompt (VSR)"
                )
    if not svd:
        return
    frames, _, height, width = shape
    for name, conds in guider.conds.items():
        for cond in conds:
            concat = cond.get("concat_latent_image")
            if concat is None and name == "positive":
                raise SettingError(
                    "the positive conditioning has no concat latents: expected the LR video's; wire SVD Video"
                    " Conditioning (VSR) or SVD_img2vid_Conditioning into it"
                )
            if concat is not None and concat.shape[0] not in (1, frames):
                raise SettingError(
                    f"the {name} conditioning has {concat.shape[0]} frames, the LATENT {frames}: expected equal counts;"
                    " take both from one SVD Video Conditioning (VSR)"
                )
            if concat is not None and tuple(concat.shape[-2:]) != (height, width):
                raise SettingError(
                    f"the {name} conditioning is {concat.shape[-2]}x{concat.shape[-1]} latents, the LATENT"
                    f" {height}x{width}: expected equal sizes; take both from one SVD Video Conditioning (VSR)"
                )


def run_cuts(conds: Mapping[str, Any], frames: int, wired: Scenes | None = None) -> tuple[int, ...] | None:
    """Where the video's scenes change: as the LATENT says that is wired into its tiles, else as its conditioning does;
    None where neither knows. Raises SettingError for what knows a longer or shorter video."""
    if wired is not None:
        if wired.frames != frames:
            raise SettingError(
                f"the LATENT of Tiled Diffusion (VSR) has {wired.frames} frames, the one that is sampled {frames}:"
                " expected the same LATENT; wire it into both"
            )
        return wired.cuts
    for name, parts in conds.items():
        for cond in parts:
            if "vsr_cuts" not in cond:
                continue
            if cond.get("vsr_frames", frames) != frames:
                raise SettingError(
                    f"the {name} conditioning knows the scene cuts of {cond['vsr_frames']} frames, the LATENT has"
                    f" {frames}: expected the same video; cut the pictures before SVD Video Conditioning (VSR), Null"
                    " Prompt (VSR) and Encode Video (VSR), not the LATENT after them"
                )
            return tuple(cond["vsr_cuts"])
    return None
