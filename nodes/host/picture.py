"""The host's VAE, device and progress bar around what the pack does to pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy.ldm.models.autoencoder import DiagonalGaussianRegularizer
from einops import rearrange
from torch import Tensor

from ...vsr_ops.errors import SettingError
from ...vsr_ops.image.upscale import of_factor
from ...vsr_ops.modules.capm import HostCAPM
from ...vsr_ops.modules.capm_hints import check_strength
from ...vsr_ops.modules.refiner import Refiner, refine
from ...vsr_ops.vae.budget import fitting_tile, modules_bytes, tile_side
from ...vsr_ops.vae.decoder_modules import DecoderModules
from ...vsr_ops.vae.encode import stream_encode
from ...vsr_ops.vae.latents import CELL, VAE_TILE, collect, decode_video, encode_frames
from ...vsr_ops.vae.layout import cell_of, encoding_steps, is_known, is_temporal
from ...vsr_ops.vae.stream import Streaming, stream_decode
from ...vsr_ops.vae.tiles import ComputedIn
from .device import intermediate_dtype, make_patcher
from .model import STOCK_TILE


@dataclass(frozen=True)
class HostVAE:
    """The host's VAE as `vsr_ops.vae.latents` wants one. Chunks are decoded whole, however much memory is free."""

    vae: Any

    @property
    def device(self) -> torch.device:
        """Where the host computes with it."""
        return self.vae.device

    @property
    def chunk(self) -> int:
        """Frames a temporal decoder was trained on."""
        return (self.vae.patcher.get_attachment("vsr_tile") or STOCK_TILE).frames

    def encode(self, frames: Tensor) -> Tensor:
        """Unscaled latents of frames `(n, 3, h, w)`."""
        return self.vae.encode(rearrange(frames, "t c h w -> t h w c")).float()

    def decode(self, latents: Tensor) -> Tensor:
        """Frames of one chunk of unscaled latents."""
        vae = self.vae
        needed = latents.shape[0] * vae.memory_used_decode((1, *latents.shape[1:]), vae.vae_dtype)
        comfy.model_management.load_models_gpu([vae.patcher], memory_required=needed)
        comfy.model_management.throw_exception_if_processing_interrupted()
        out = vae.first_stage_model.decode(latents.to(vae.vae_dtype).to(vae.device))
        return vae.process_output(out.to(latents.device).float())


def progress(total: int) -> Callable[[int], None]:
    """The node's progress bar: tell it of units of work done; raises when the artist has interrupted."""
    bar = comfy.utils.ProgressBar(total)

    def tick(done: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update(done)

    return tick


def managed(upscale_model: Any) -> Any:
    """An UPSCALE_MODEL that every host takes, the same object: with the patcher that hosts since July 2026 load and
    free it by, where its loader gave it none. Raises SettingError for what is no upscale model."""
    if getattr(upscale_model, "patcher", None) is None:
        module = getattr(upscale_model, "model", None)
        if not isinstance(module, torch.nn.Module) or not hasattr(upscale_model, "scale"):
            raise SettingError(
                f"upscale_model is a {type(upscale_model).__name__}: expected a model and its scale, as Load DCM (VSR)"
                " and Load Upscale Model give; wire one of these"
            )
        manage = comfy.model_management
        upscale_model.patcher = make_patcher(module, manage.get_torch_device(), manage.unet_offload_device())
    return upscale_model


def upscaler(upscale_model: Any) -> Callable[[Tensor], Tensor]:
    """A host upscale model on `(n, 3, h, w)`, by the host's own node: its tiles, memory and precision."""
    from comfy_extras.nodes_upscale_model import ImageUpscaleWithModel

    model = managed(upscale_model)

    def enlarge(frames: Tensor) -> Tensor:
        image = ImageUpscaleWithModel.execute(model, rearrange(frames, "t c h w -> t h w c")).args[0]
        return rearrange(image, "t h w c -> t c h w")

    return of_factor(enlarge, model.scale)


def refined(
    refiner: Refiner, decoded: Tensor, upscaled: Tensor, w: float, cuts: Sequence[int] = (), sateco_w: float = -1.0
) -> Tensor:
    """`refine` on the host's device, with the node's progress bar; the refiner goes back afterwards."""
    manage = comfy.model_management
    try:
        refiner.to(manage.get_torch_device())
        return refine(refiner, decoded, upscaled, w, cuts, progress(len(decoded)), intermediate_dtype(), sateco_w)
    finally:
        refiner.to(manage.unet_offload_device())


def with_capm(modules: DecoderModules, capm: HostCAPM | None, frames: int) -> tuple[DecoderModules, Tensor | None]:
    """Decoder modules with what acts of a CAPM, and the frames' levels. Raises SettingError for one without a VAE's
    half."""
    if capm is None:
        return modules, None
    check_strength(capm.strength)
    if capm.strength == 0:
        return modules, None
    if capm.model is None:
        raise SettingError(
            "the CAPM holds no half for a VAE's decoder: expected one; take it off Decode Video (VSR), or give CAPM"
            " (VSR) a file that has both"
        )
    return replace(modules, capm=capm.model, strength=capm.strength), capm.hint(frames)


def sees_time(vae: Any, modules: DecoderModules) -> bool:
    """Whether frames see each other while a VAE decodes them: only then do scene cuts matter there."""
    return modules.joins_frames or is_temporal(vae.first_stage_model)


def encoded(vae: Any, frames: Iterable[Tensor], height: int, width: int) -> Iterator[Tensor]:
    """Unscaled latents `(4, height, width)` of frames `(3, h, w)`, padded to fit, one by one, on the host's device: of
    one pass over each whole frame. A VAE of no known layout, or whose latents are no plain mode, takes `encode_frames`:
    the host's own encoding of blended tiles."""
    if encoding_steps(vae.first_stage_model) is None or not _gives_its_mode(vae.first_stage_model):
        return encode_frames(HostVAE(vae), frames, height, width)

    def needed(tile: int) -> float:
        return vae.memory_used_encode((1, 3, *(min(side, tile) * CELL for side in (height, width))), vae.vae_dtype)

    manage = comfy.model_management
    tile = fitting_tile(VAE_TILE, needed, manage.get_total_memory(vae.device) - vae.patcher.model_size())
    how = Streaming(
        tile=tile,
        check_interrupted=manage.throw_exception_if_processing_interrupted,
        computed_in=ComputedIn(vae.device, vae.vae_dtype),
    )
    # Whole: the streaming encoder calls the VAE's layers one by one, tile after tile.
    manage.load_models_gpu([vae.patcher], memory_required=needed(tile), force_full_load=True)
    latents = stream_encode(vae.first_stage_model, frames, height, width, how)
    return (z.to(vae.output_device) for z in latents)


def _gives_its_mode(autoencoder: Any) -> bool:
    """Whether the host takes a distribution's mode for an autoencoder's latents, and leaves it as it is."""
    regularised: Any = getattr(autoencoder, "regularization", None)
    plain = isinstance(regularised, DiagonalGaussianRegularizer) and not regularised.sample
    return plain and getattr(autoencoder, "bn", None) is None


def decoded(
    vae: Any,
    latents: Tensor,
    cuts: Sequence[int],
    size: tuple[int, int] | None,
    modules: DecoderModules,
    levels: Tensor | None,
    reference: Tensor | None,
    chunk: int,
    tile: int,
) -> Tensor:
    """Frames `(n, 3, height, width)`, streamed on the host's device, with the node's progress bar; modules go back
    afterwards. A VAE of no known layout takes `decode_video`, where no tile is asked for and no module acts. `chunk` 0
    is the VAE's own."""
    if latents.ndim == 4 and latents.shape[1] != vae.latent_channels:
        raise SettingError(
            f"the LATENT has {latents.shape[1]} channels, this VAE decodes {vae.latent_channels}: expected the VAE of"
            " the MODEL that sampled it; wire that one"
        )
    latents, modules = latents.float(), modules.acting
    adapter, manage = HostVAE(vae), comfy.model_management
    tick = progress(len(latents))
    if tile == 0 and not modules.found and not is_known(vae.first_stage_model):
        return decode_video(adapter, latents, chunk or adapter.chunk, cuts, size, tick, intermediate_dtype())
    chunk = chunk or adapter.chunk
    how = Streaming(
        chunk,
        tile or _fitting_tile(vae, latents, modules, chunk),
        check_interrupted=manage.throw_exception_if_processing_interrupted,
        computed_in=ComputedIn(vae.device, vae.vae_dtype),
    )
    # Whole: the streaming decoder calls the VAE's layers one by one, tile after tile.
    manage.load_models_gpu(
        [vae.patcher], memory_required=_needed(vae, latents, modules, chunk, how.tile), force_full_load=True
    )
    try:
        for module in modules.found:
            module.to(vae.device)
        latents = latents.to(vae.output_device)
        frames = stream_decode(vae.first_stage_model, latents, cuts, modules, reference, levels, how)
        return collect(frames, latents, cell_of(vae.first_stage_model), size, tick, intermediate_dtype())
    finally:
        for module in modules.found:
            module.to(manage.vae_offload_device())


def _fitting_tile(vae: Any, latents: Tensor, modules: DecoderModules, chunk: int) -> int:
    """The side in latents of the tiles that are decoded: VAE_TILE, or less where the device has no room for that, all
    else unloaded."""
    free = comfy.model_management.get_total_memory(vae.device) - vae.patcher.model_size()
    return fitting_tile(VAE_TILE, lambda tile: _needed(vae, latents, modules, chunk, tile), free)


def _needed(vae: Any, latents: Tensor, modules: DecoderModules, chunk: int, tile: int) -> float:
    """Bytes that a streamed decoding takes beside the VAE's weights."""
    sides = [min(side, tile_side(tile, modules)) for side in latents.shape[-2:]]
    at_once = min(len(latents), chunk) if sees_time(vae, modules) else 1
    needed = at_once * vae.memory_used_decode((1, 4, *sides), vae.vae_dtype)
    if modules.sees_reference:
        needed += at_once * vae.memory_used_encode((1, 3, *(side * CELL for side in sides)), vae.vae_dtype)
    needed += modules_bytes(vae.first_stage_model, modules, at_once, sides, vae.vae_dtype.itemsize)
    return needed + sum(comfy.model_management.module_size(module) for module in modules.found)
