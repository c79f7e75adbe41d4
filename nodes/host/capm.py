"""CAPM in a MODEL: after every level of its UNet's decoder, whatever else is wired to it."""

from __future__ import annotations

from typing import Any

from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...vsr_ops.errors import SettingError
from ...vsr_ops.modules.capm import CAPM, SD_UNET, SVD_UNET, HostCAPM, shared_weights
from ...vsr_ops.modules.capm_hints import check_strength
from ..session.run import KEY, Run
from .device import make_patcher
from .model import is_svd

#: Name of CAPM's hook, which works without the pack's others.
CAPM_KEY = f"{KEY}_capm"


def patch_capm(model: Any, prompted: HostCAPM) -> Any:
    """A MODEL with CAPM in its UNet's decoder, in the place of an earlier one; strength 0, and a file without a UNet's
    half, leave none.

    Raises SettingError for a MODEL of another backbone or other widths, and in the run for levels that are not one a
    frame of the LATENT.
    """
    check_strength(prompted.strength)
    capm = prompted.model
    if capm is not None:
        capm.check_fits(*_decoder_of(model))
    if capm is None or prompted.strength == 0:
        return _without(model)
    m = _without(model.clone())
    # The host moves it with the UNet, and counts its memory.
    beside = make_patcher(capm, m.load_device, m.offload_device)
    m.set_additional_models(CAPM_KEY, [beside])
    m.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, CAPM_KEY, _Hook(capm, prompted))
    return m


def _without(model: Any) -> Any:
    """The MODEL itself, or where a CAPM is on it a clone that has none."""
    if not model.get_wrappers(WrappersMP.DIFFUSION_MODEL, CAPM_KEY):
        return model
    m = model.clone()
    m.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, CAPM_KEY)
    m.remove_additional_models(CAPM_KEY)
    return m


def _decoder_of(model: Any) -> tuple[str, dict[str, int]]:
    """A MODEL's backbone, and the widths of its decoder's levels by CAPM's names for them."""
    unet = model.model.diffusion_model
    if not isinstance(unet, UNetModel):
        raise SettingError(
            f"CAPM got a {type(model.model).__name__} MODEL ({type(unet).__name__}): expected a UNet, Stable Video"
            " Diffusion's or Stable Diffusion's; wire the model it was trained on"
        )
    widths = [unet.model_channels * times for times in reversed(unet.channel_mult)]
    backbone = SVD_UNET if is_svd(model) else SD_UNET
    return backbone, {f"up_blocks.{index}": width for index, width in enumerate(widths)}


def _first_blocks(unet: Any) -> dict[int, str]:
    """Output blocks that begin with what a level gave, by their number; the last level's goes to `out`."""
    starts, number = dict[int, str](), 0
    for index, blocks in enumerate(reversed(unet.num_res_blocks)):
        number += blocks + 1
        starts[number] = f"up_blocks.{index}"
    return starts


class _Hook:
    """A wrapper of the UNet's call. It sets itself before other packs' patches of the same blocks, for the call alone:
    CAPM belongs to a level's output, so that the order of wiring cannot matter."""

    def __init__(self, capm: CAPM, prompted: HostCAPM) -> None:
        self._capm, self._prompted = capm, prompted

    def __call__(
        self,
        executor: Any,
        x: Tensor,
        timesteps: Any,
        context: Any,
        y: Any,
        control: Any,
        transformer_options: dict[str, Any],
        **rest: Any,
    ) -> Tensor:
        unet, options = executor.class_obj, transformer_options
        self._capm.to(x.device)
        levels = _first_blocks(unet)
        hint, tiles = _told(self._prompted, x, options)

        def change(number: int, h: Tensor) -> Tensor:
            name = levels.get(number)
            return h if name is None or name not in self._capm.shape.widths else self._changed(name, h, hint, tiles)

        def between(h: Tensor, skip: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
            return change(options["block"][1], h), skip

        patches = options.get("patches", {})
        blocks = [between, *patches.get("output_block_patch", ())]
        own = {**options, "patches": {**patches, "output_block_patch": blocks}}
        last = unet.out.register_forward_pre_hook(lambda module, given: (change(len(unet.output_blocks), given[0]),))
        try:
            return executor(x, timesteps, context, y, control, own, **rest)
        finally:
            last.remove()

    def _changed(self, name: str, h: Tensor, hint: Tensor | None, tiles: int) -> Tensor:
        weights = self._capm.weights(name, h, hint)
        if tiles > 1:
            weights = shared_weights(weights, tiles)
        return self._capm(name, h, weights=weights, strength=self._prompted.strength)


def _told(prompted: HostCAPM, x: Tensor, options: dict[str, Any]) -> tuple[Tensor | None, int]:
    """The levels of the frames that are evaluated, and how many tiles share their weights: those of a whole window,
    where they go through the UNet together."""
    settings = options.get(KEY, {})
    run: Run | None = settings.get("run")
    # The pack's tiles say which frames a call holds, and of how many tiles.
    frames, tiles = settings.get("call") or (slice(None), 1)
    count = x.shape[0] // len(options.get("cond_or_uncond") or (0,)) if run is None else run.plan.frames
    hint = prompted.hint(count)
    whole = run is not None and tiles == len(run.plan.spatial)
    # Left on the CPU: whether all levels are known is read there, without waiting for the device.
    return (None if hint is None else hint[frames]), tiles if whole else 1
