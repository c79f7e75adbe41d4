"""SATeCo in a MODEL: SFA and TFA after every level of its UNet's decoder, guided by the LR latents."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...vsr_ops.errors import SettingError
from ...vsr_ops.modules.sateco import HostSATeCo, SATeCo
from ...vsr_ops.system.memory import to_device
from ...vsr_ops.vae.decoder_modules import DecoderModules
from ..session.run import call_of
from .cost import latent_cuts
from .levels import Begin, Change, decoder_of, with_change, without_change


def patch_sateco(model: Any, adapting: HostSATeCo, lr_latent: dict[str, Any]) -> Any:
    """A MODEL with SATeCo in its UNet's decoder, in the place of an earlier one; where both strengths are 0, and for a
    file without a UNet's half, with none.

    Raises SettingError for a MODEL of another backbone or other widths, latents that are not finite, and in the run
    for latents of another video.
    """
    half, lr = adapting.model, lr_latent["samples"]
    if half is not None:
        half.check_fits(*decoder_of(model, "SATeCo"))
    if not bool(torch.isfinite(lr).all()):
        raise SettingError("lr_latent holds NaN or infinity: expected Encode Video (VSR)'s lr_latent; check the VAE")
    if half is None or adapting.strengths.off:
        return without_change(model, "sateco")
    scaled = model.model.latent_format.process_in(lr).float()
    return with_change(model, "sateco", half, _adapting(half, adapting, scaled, latent_cuts(lr_latent)))


def _adapting(half: SATeCo, adapting: HostSATeCo, lr: Tensor, cuts: tuple[int, ...]) -> Begin:
    def begin(x: Tensor, options: dict[str, Any]) -> Change:
        half.to(x.device)
        run, call = call_of(options)
        part = lr[call.frames]
        tiles = torch.cat([part[..., rows, cols] for rows, cols in call.places]) if call.places else part
        _check(lr, x, len(tiles), None if run is None else (run.plan.frames, run.plan.height, run.plan.width))
        guides = half.guides(to_device(tiles, x.device))
        # The windows of tiles lie within scenes; whole videos are cut here.
        within = cuts if run is None or run.tiles is None else ()

        def change(level: str, h: Tensor) -> Tensor:
            if level not in half.shape.widths:
                return h
            return half.over_time(level, h, guides[level], len(part), adapting.strengths, within)

        return change

    return begin


def _check(lr: Tensor, x: Tensor, given: int, whole: tuple[int, int, int] | None) -> None:
    """Raises SettingError for LR latents of another video than the one that is sampled."""
    fits = given > 0 and x.shape[0] % given == 0 and (whole is None or whole == (len(lr), *lr.shape[-2:]))
    if not fits or (whole is None and x.shape[-2:] != lr.shape[-2:]):
        frames, height, width = whole or (len(x), *x.shape[-2:])
        raise SettingError(
            f"lr_latent is {len(lr)} frames of {lr.shape[-1]}x{lr.shape[-2]} latents, what is sampled {frames} of"
            f" {width}x{height}: expected the same video; wire Encode Video (VSR)'s lr_latent of it"
        )


def with_sateco(modules: DecoderModules, adapting: HostSATeCo | None) -> DecoderModules:
    """Decoder modules with what acts of a SATeCo. Raises SettingError for one without a VAE's half."""
    if adapting is None or adapting.strengths.off:
        return modules
    if adapting.model is None:
        raise SettingError(
            "the SATeCo holds no half for a VAE's decoder: expected one; take it off Decode Video (VSR), or give SATeCo"
            " (VSR) a file that has both"
        )
    return replace(modules, sateco=adapting.model, strengths=adapting.strengths)
