"""The pack's control as a ControlNet of the host: its Apply ControlNet nodes, strength, range and chains hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.latent_formats
import comfy.model_management
import comfy.ops
import torch
from comfy.controlnet import ControlBase
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor

from ...vsr_ops.errors import SettingError
from ...vsr_ops.modules.control import Control, load_control
from ...vsr_ops.vae.latents import CELL
from ..session.run import KEY
from .device import make_patcher
from .picture import encoded

#: Where a call's controls wait in its transformer options for the tiles that they are evaluated in.
CONTROLS = "coherent_vsr_controls"
#: Latent pixels whose features are held at once: eight frames of 512 x 512.
TOGETHER = 8 * 64 * 64
_DTYPES = [torch.float16, torch.bfloat16, torch.float32]
_LAYERS: dict[type, type] = {
    getattr(torch.nn, name): getattr(comfy.ops.disable_weight_init, name)
    for name in ("Linear", "Conv2d", "GroupNorm", "LayerNorm")
}

#: What a UNet of the host takes: features for each of its stages.
Features = dict[str, list[Tensor]]


def load_host_control(path: str) -> HostControl:
    """The control at a path, in the host's choice of precision. Raises CheckpointError."""
    manage = comfy.model_management
    control, device = load_control(path), manage.get_torch_device()
    count = sum(parameter.numel() for parameter in control.parameters())
    dtype = manage.unet_dtype(model_params=count, supported_dtypes=_DTYPES)
    # What the device cannot compute in is not stored either.
    dtype = manage.unet_manual_cast(dtype, device, _DTYPES) or dtype
    lend_layers(control)
    return HostControl(make_patcher(control.to(dtype), device, manage.unet_offload_device()))


def lend_layers(module: torch.nn.Module) -> None:
    """Makes a module's layers the host's own kinds of the same, weights and all: those work while a part of the weights
    lies outside the device, where the host leaves it when memory is short."""
    for layer in module.modules():
        if type(layer) in _LAYERS:
            layer.__class__ = _LAYERS[type(layer)]


class HostControl(ControlBase):
    """A control under the host's memory management. Its picture is the upscaled video, which it encodes itself."""

    def __init__(self, patcher: Any) -> None:
        super().__init__()
        self.patcher = patcher
        self.model: Control = patcher.model
        # Of the MODEL that samples, while it does.
        self.sampling: Any = None
        # With one, the host keeps the VAE that it is given.
        self.latent_format = comfy.latent_formats.SD15()

    def set_cond_hint(
        self,
        cond_hint: Tensor,
        strength: float = 1.0,
        timestep_percent_range: tuple[float, float] = (0.0, 1.0),
        vae: Any = None,
        extra_concat: Sequence[Tensor] = (),
    ) -> HostControl:
        """Takes frames `(n, 3, height, width)`. Raises SettingError for others, and where no VAE is wired."""
        if vae is None:
            raise SettingError(
                "Apply ControlNet has no VAE: expected the MODEL's own, for this control sees the video's latents; wire"
                " it into the vae input (the deprecated Apply ControlNet has none, take the other)"
            )
        if cond_hint.ndim != 4 or cond_hint.shape[0] == 0 or cond_hint.shape[1] != 3:
            raise SettingError(
                f"Apply ControlNet's image has shape {tuple(cond_hint.shape)}: expected frames with three channels"
                " (RGB); wire Upscale LR Video (VSR)"
            )
        super().set_cond_hint(cond_hint.float().clamp(0, 1), strength, timestep_percent_range, vae, list(extra_concat))
        return self

    def copy(self) -> HostControl:
        """As the host asks for one for each conditioning."""
        made = HostControl(self.patcher)
        self.copy_to(made)
        return made

    def get_models(self) -> list[Any]:
        """What the host loads and frees with it."""
        return [*super().get_models(), self.patcher]

    def pre_run(self, model: Any, percent_to_timestep_function: Callable[[float], float]) -> None:
        """Raises SettingError for a MODEL that it was not made for, before anything is computed."""
        super().pre_run(model, percent_to_timestep_function)
        check_model(self.model, model)
        self.sampling, self.latent_format = model.model_sampling, model.latent_format

    def cleanup(self) -> None:
        """Forgets the run, as the host asks after it."""
        self.sampling = None
        super().cleanup()

    def get_control(
        self,
        x_noisy: Tensor,
        t: Tensor,
        cond: Mapping[str, Any],
        batched_number: int,
        transformer_options: dict[str, Any],
    ) -> Features | None:
        """What goes into the UNet: `x_noisy` holds the frames of `batched_number` branches, `t` their sigmas.

        In a tiled run nothing is computed here: the whole frame's features would be larger than the tiles that take
        them, so a `TileControl` waits in the call's own options until its tile comes. (Not in what is returned: a
        ControlNet of the host, applied later, would drop it there.)
        """
        before = None
        if self.previous_controlnet is not None:
            before = self.previous_controlnet.get_control(x_noisy, t, cond, batched_number, transformer_options)
        if self.strength == 0 or not self._in_range(float(t[0])):
            return before
        hint = self._encoded(x_noisy, x_noisy.shape[0] // batched_number)
        run = transformer_options.get(KEY, {}).get("run")
        if run is not None and run.tiles is not None:
            if "crossattn_controlnet" in cond:
                raise SettingError(
                    "a conditioning has a text of its own for ControlNets: expected one text in a tiled run; take that"
                    " text off, or Tiled Diffusion (VSR)"
                )
            transformer_options.setdefault(CONTROLS, []).append(TileControl(self, hint))
            return before
        context = cond.get("crossattn_controlnet", cond["c_crossattn"])
        frames = torch.arange(x_noisy.shape[0]) % hint.shape[0]
        return self.control_merge(self._features(x_noisy, t, context, hint, frames), before, None)

    def features(self, x: Tensor, t: Tensor, context: Tensor, hint: Tensor) -> Features:
        """What this control alone gives for noisy latents `x` and the hint's latents of the same place and frames."""
        return self.control_merge(self._features(x, t, context, hint, torch.arange(x.shape[0])), None, None)

    def _features(self, x: Tensor, t: Tensor, context: Tensor, hint: Tensor, frames: Tensor) -> Features:
        """Before the strength: a few frames at a time, so that what lies between is held of these alone."""
        dtype, device = self.model.dtype, x.device
        times, noisy = self.sampling.timestep(t).float(), self.sampling.calculate_input(t, x)
        tokens = comfy.model_management.cast_to_device(context, device, dtype)
        parts: list[list[Tensor]] = []
        for some in torch.arange(x.shape[0]).split(max(1, TOGETHER // (x.shape[-2] * x.shape[-1]))):
            comfy.model_management.throw_exception_if_processing_interrupted()
            of = slice(int(some[0]), int(some[-1]) + 1)
            seen = hint[frames[some].to(hint.device)].to(device, dtype)
            own = tokens if tokens.shape[0] == 1 else tokens[of]
            skips, middle = self.model(noisy[of].to(dtype), times[of], own, seen)
            parts.append([*skips, middle])
        whole = parts[0] if len(parts) == 1 else [torch.cat(level) for level in zip(*parts, strict=True)]
        return {"input": [], "middle": whole[-1:], "output": whole[:-1]}

    def _in_range(self, sigma: float) -> bool:
        if self.timestep_range is None:
            return True
        first, last = self.timestep_range
        return last <= sigma <= first

    def _encoded(self, x: Tensor, frames: int) -> Tensor:
        """The hint's latents `(frames or 1, 4, h, w)` as the UNet takes them, made once a run, frame by frame."""
        height, width = x.shape[-2:]
        picture: Tensor = self.cond_hint_original
        check_picture(picture, frames, height, width, 2 ** (len(self.model.widths) - 1))
        if self.cond_hint is None or self.cond_hint.shape[-2:] != x.shape[-2:]:
            manage = comfy.model_management
            loaded = manage.loaded_models(only_currently_used=True)
            latents: list[Tensor] = []
            for latent in encoded(self.vae, picture, height, width):
                manage.throw_exception_if_processing_interrupted()
                latents.append(self.latent_format.process_in(latent).to(self.model.dtype))
            # What has been let go of meanwhile is still on the host's list, as nothing.
            manage.load_models_gpu([model for model in loaded if model is not None])
            self.cond_hint = torch.stack(latents).to(x.device)
        return self.cond_hint


@dataclass(frozen=True)
class TileControl:
    """A control that waits for its tile: `hint` `(frames or 1, 4, h, w)` is the whole video's."""

    control: HostControl
    hint: Tensor

    def __call__(
        self, x: Tensor, t: Tensor, context: Tensor, tiles: Sequence[tuple[slice, slice]], frames: slice
    ) -> Features:
        """Features for one UNet call, in fresh lists: `x` `(tiles*n, 4, h, w)` is the noisy latent as apply_model gets
        it, tile after tile, `t` its sigmas, `context` its tokens; `tiles` are rows and columns of the whole frame's
        latents, `frames` the n of the whole video."""
        window = self.hint if self.hint.shape[0] == 1 else self.hint[frames]
        count = x.shape[0] // len(tiles)
        cut = [window[..., rows, cols].expand(count, -1, -1, -1) for rows, cols in tiles]
        return self.control.features(x, t, context, torch.cat(cut))


def merged(
    controls: Sequence[TileControl],
    before: Mapping[str, Sequence[Any]] | None,
    x: Tensor,
    t: Tensor,
    context: Tensor,
    tiles: Sequence[tuple[slice, slice]],
    frames: slice,
) -> dict[str, list[Any]] | None:
    """What one UNet call gets: the sum of its controls and of `before`, other ControlNets' features for this call."""
    whole = None if before is None else {stage: list(values) for stage, values in before.items()}
    for control in controls:
        added = control(x, t, context, tiles, frames)
        whole = added if whole is None else {stage: _sum(added[stage], whole.get(stage, [])) for stage in added}
    return whole


def _sum(a: Sequence[Any], b: Sequence[Any]) -> list[Any]:
    """Lists of features added place by place; where one is shorter or holds nothing, the other's."""
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    return [
        value if i >= len(shorter) or shorter[i] is None else shorter[i] if value is None else value + shorter[i]
        for i, value in enumerate(longer)
    ]


def check_model(control: Control, model: Any) -> None:
    """Raises SettingError for a host's model whose UNet the control is no copy of."""
    unet, config = model.diffusion_model, model.model_config.unet_config
    if not isinstance(unet, UNetModel) or config.get("in_channels", 4) != control.channels:
        takes = f"{config['in_channels']} channels" if "in_channels" in config else type(unet).__name__
        raise SettingError(
            f"the control is made for a UNet that takes {control.channels} channels, the MODEL is a"
            f" {type(model).__name__} ({takes}): give Stable Diffusion 1.5 or 2.1, whichever it was trained on"
        )
    mults, blocks = config["channel_mult"], config["num_res_blocks"]
    control.check_fits(
        [config["model_channels"] * mult for mult in mults],
        config["context_dim"],
        [blocks] * len(mults) if isinstance(blocks, int) else list(blocks),
    )


def check_picture(picture: Tensor, frames: int, height: int, width: int, factor: int) -> None:
    """Raises SettingError unless `(n, 3, h, w)` is a video of this many frames, or one, that `height` x `width` latents
    are of, padded to whole latents or to `factor` of them."""

    def fits(pixels: int, latents: int) -> bool:
        return latents in (-(-pixels // CELL), -(-pixels // (CELL * factor)) * factor)

    if picture.shape[0] not in (1, frames):
        raise SettingError(
            f"Apply ControlNet's image has {picture.shape[0]} frames, the LATENT {frames}: expected equal counts, or"
            " one for all; give it the video that the LATENT was made of"
        )
    if not (fits(picture.shape[-2], height) and fits(picture.shape[-1], width)):
        raise SettingError(
            f"Apply ControlNet's image is {picture.shape[-1]}x{picture.shape[-2]} (width x height), what is sampled"
            f" {width * CELL}x{height * CELL}: expected equal sizes; give it the video at the result's size from"
            " Upscale LR Video (VSR), and conditioning without an area"
        )
