"""Changes of a UNet decoder's levels, in a fixed order, whatever else is wired to the MODEL and in whatever order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ...vsr_ops.errors import SettingError
from ...vsr_ops.modules.capm import SD_UNET, SVD_UNET
from ..session.run import KEY
from .device import make_patcher
from .model import is_svd

#: Name of the one hook, which works without the pack's others.
LEVELS_KEY = f"{KEY}_levels"
#: The changes that there are, in the order in which they act on a level's output.
ORDER = ("capm", "sateco")

Change = Callable[[str, Tensor], Tensor]
"""(a level's name, its features) -> its features."""
Begin = Callable[[Tensor, dict[str, Any]], Change]
"""(what the UNet is given, the host's transformer options) -> what it does to the levels in this call."""


def with_change(model: Any, name: str, module: nn.Module, begin: Begin) -> Any:
    """A MODEL with a change in its UNet's decoder, in the place of an earlier one of the name. The host moves `module`
    with the UNet, and counts its memory."""
    m = model.clone()
    m.set_additional_models(f"{KEY}_{name}", [make_patcher(module, m.load_device, m.offload_device)])
    _set(m, {**_changes(model), name: begin})
    return m


def without_change(model: Any, name: str) -> Any:
    """The MODEL itself, or where such a change is on it a clone that has none."""
    changes = dict(_changes(model))
    if changes.pop(name, None) is None:
        return model
    m = model.clone()
    m.remove_additional_models(f"{KEY}_{name}")
    _set(m, changes)
    return m


def decoder_of(model: Any, name: str) -> tuple[str, dict[str, int]]:
    """A MODEL's backbone, and the widths of its decoder's levels by diffusers' names for them. Raises SettingError for
    one without a UNet, for the node called `name`."""
    unet = model.model.diffusion_model
    if not isinstance(unet, UNetModel):
        raise SettingError(
            f"{name} got a {type(model.model).__name__} MODEL ({type(unet).__name__}): expected a UNet, Stable Video"
            " Diffusion's or Stable Diffusion's; wire the model it was trained on"
        )
    widths = [unet.model_channels * times for times in reversed(unet.channel_mult)]
    backbone = SVD_UNET if is_svd(model) else SD_UNET
    return backbone, {f"up_blocks.{index}": width for index, width in enumerate(widths)}


def _changes(model: Any) -> Mapping[str, Begin]:
    """Those that are on a MODEL."""
    hooks = model.get_wrappers(WrappersMP.DIFFUSION_MODEL, LEVELS_KEY)
    return hooks[0].changes if hooks else {}


def _set(model: Any, changes: Mapping[str, Begin]) -> None:
    model.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, LEVELS_KEY)
    if changes:
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, LEVELS_KEY, LevelHook(changes))


def _first_blocks(unet: Any) -> dict[int, str]:
    """Output blocks that begin with what a level gave, by their number; the last level's goes to `out`."""
    starts, number = dict[int, str](), 0
    for index, blocks in enumerate(reversed(unet.num_res_blocks)):
        number += blocks + 1
        starts[number] = f"up_blocks.{index}"
    return starts


class LevelHook:
    """A wrapper of the UNet's call. It sets itself before other packs' patches of the same blocks, for the call alone:
    what it does belongs to a level's output, so that the order of wiring cannot matter."""

    def __init__(self, changes: Mapping[str, Begin]) -> None:
        self.changes = changes

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
        levels = _first_blocks(unet)
        acting = [self.changes[name](x, options) for name in ORDER if name in self.changes]

        def change(number: int, h: Tensor) -> Tensor:
            if (level := levels.get(number)) is not None:
                for act in acting:
                    h = act(level, h)
            return h

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
