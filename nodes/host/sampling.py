"""Conditioning, guiders and samplers of the host."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch

from ...vsr_ops.backbones.svd import sigmas as svd_sigmas
from ...vsr_ops.errors import SettingError
from ...vsr_ops.sampling.interval import GuidanceInterval
from ..session.run import CFGPatch, GuidancePatch
from .device import intermediate_dtype
from .hooks import patch, patch_perturbed
from .model import CLIP_TOKENS, context_tokens_of, context_width

log = logging.getLogger(__name__)

#: Width of CLIP's pooled text where a UNet wants it beside the tokens, as SDXL's do.
POOLED_WIDTH = 1280

SAMPLERS, SCHEDULERS = list(comfy.samplers.SAMPLER_NAMES), list(comfy.samplers.SCHEDULER_NAMES)


def null_prompt(model: Any, scenes: Mapping[str, Any] = MappingProxyType({})) -> list[Any]:
    """CONDITIONING of zeros in the shape that a MODEL takes: `(1, tokens, width)`, and a pooled text where it wants
    one; `scenes` goes with it: where the video's scenes change. A UNet's attention gives zeros for zeros, so how many
    tokens there are changes nothing but what the host can batch with another prompt. Raises SettingError for a MODEL
    that takes no text in this shape."""
    width = context_width(model)
    if not isinstance(width, int):
        raise SettingError(
            f"Null Prompt (VSR) got a {type(model.model).__name__} MODEL: expected a UNet with cross-attention, as"
            " Stable Diffusion 1.5, 2.1 and XL have; encode an empty text with the MODEL's own CLIP"
        )
    count = context_tokens_of(model)
    if count == CLIP_TOKENS:
        log.warning(
            "Null Prompt (VSR) gives zeros to a MODEL of width %d, which was trained on its own CLIP's texts: expected"
            " CLIP Text Encode with an empty text; zeros work, and are no text to it",
            width,
        )
    tokens = torch.zeros(1, count, width)
    wanted = model.model.model_config.unet_config.get("adm_in_channels") is not None
    pooled = {"pooled_output": torch.zeros(1, POOLED_WIDTH)} if wanted else {}
    return [[tokens, {**pooled, **scenes}]]


def fps_key(fps: int) -> int:
    """What the host's conditioning must hold for the UNet to be told `fps`: the host takes 1 off."""
    return fps + 1


def guider(model: Any, positive: Any, negative: Any, cfg: float) -> Any:
    """The host's CFG guider. Raises SettingError for a cfg that has no negative."""
    if negative is None and cfg != 1:
        raise SettingError(f"cfg is {cfg} but no negative is wired: expected one; wire it, or set cfg to 1 (off)")
    made = comfy.samplers.CFGGuider(model)
    made.inner_set_conds({"positive": positive} if negative is None else {"positive": positive, "negative": negative})
    made.set_cfg(cfg)
    return made


def cfg_guider(model: Any, positive: Any, negative: Any, cfg: float, interval: GuidanceInterval) -> Any:
    """CFG, with no other guidance beside it, that acts where `interval` says."""
    return guider(model if interval.everywhere else patch(model, "cfg", CFGPatch(interval)), positive, negative, cfg)


def dssag_guider(model: Any, positive: Any, negative: Any, dssag: GuidancePatch) -> Any:
    """DC-VSR equation 8 without a negative; equation 9, where the host's cfg is 1 + s, with one."""
    patched = patch_perturbed(model, "dssag", dssag.scale, dssag.layers, dssag.rho, dssag.interval)
    return guider(patched, positive, negative, 1.0 if negative is None else 1.0 + dssag.scale)


def sample(
    made: Any,
    latent: dict[str, Any],
    seed: int,
    steps: int,
    sampler: str,
    scheduler: str,
    denoise: float,
    start_sigma: float | None = None,
) -> dict[str, Any]:
    """What KSampler does, with a guider: LATENT in, LATENT out. With a `start_sigma` an SVD's steps are spaced from
    that noise level on, whatever the scheduler, as the headless pipeline spaces them."""
    model, samples = made.model_patcher, latent["samples"]
    total = steps if denoise >= 1 else int(steps / denoise)
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, total)[-(steps + 1) :]
    if start_sigma is not None:
        sigmas = torch.tensor(svd_sigmas(steps, start_sigma))
    noise = comfy.sample.prepare_noise(samples, seed)
    callback = latent_preview.prepare_callback(model, steps)
    out = made.sample(
        noise,
        samples,
        comfy.samplers.sampler_object(sampler),
        sigmas,
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    return {**latent, "samples": out.to(comfy.model_management.intermediate_device(), intermediate_dtype())}
