"""CAPM in a MODEL: after every level of its UNet's decoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...vsr_ops.modules.capm import CAPM, HostCAPM, shared_weights
from ...vsr_ops.modules.capm_hints import check_strength
from ..session.run import call_of
from .levels import Begin, Change, decoder_of, with_change, without_change


def patch_capm(model: Any, prompted: HostCAPM) -> Any:
    """A MODEL with CAPM in its UNet's decoder, in the place of an earlier one; strength 0, and a file without a UNet's
    half, leave none.

    Raises SettingError for a MODEL of another backbone or other widths, and in the run for levels that are not one a
    frame of the LATENT.
    """
    check_strength(prompted.strength)
    capm = prompted.model
    if capm is not None:
        capm.check_fits(*decoder_of(model, "CAPM"))
    if capm is None or prompted.strength == 0:
        return without_change(model, "capm")
    return with_change(model, "capm", capm, _prompting(capm, prompted))


def _prompting(capm: CAPM, prompted: HostCAPM) -> Begin:
    def begin(x: Tensor, options: dict[str, Any]) -> Change:
        capm.to(x.device)
        hint, tiles = _told(prompted, x, options)

        def change(level: str, h: Tensor) -> Tensor:
            if level not in capm.shape.widths:
                return h
            weights = capm.weights(level, h, hint)
            if tiles > 1:
                weights = shared_weights(weights, tiles)
            return capm(level, h, weights=weights, strength=prompted.strength)

        return change

    return begin


def _told(prompted: HostCAPM, x: Tensor, options: dict[str, Any]) -> tuple[Tensor | None, int]:
    """The levels of the frames that are evaluated, and how many tiles share their weights: those of a whole window,
    where they go through the UNet together."""
    run, call = call_of(options)
    count = x.shape[0] // len(options.get("cond_or_uncond") or (0,)) if run is None else run.plan.frames
    hint = prompted.hint(count)
    whole = run is not None and call.tiles == call.of
    # Left on the CPU: whether all levels are known is read there, without waiting for the device.
    return (None if hint is None else hint[call.frames]), call.tiles if whole else 1
