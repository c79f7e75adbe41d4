"""Stable Video Diffusion without a host, on diffusers' own classes, with our self-attention in its spatial layers.

`Backbone` is what it shares with Stable Diffusion (sd.py). Frames are `(frames, 3, h, w)` RGB in [0, 1], latents
`(frames, 4, h/8, w/8)`; noise levels are EDM sigmas.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import AutoencoderKLTemporalDecoder
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from einops import rearrange
from torch import Tensor, nn

from ..checkpoints.svd import LITE, SVDWeights, match_host_epsilon, read_svd
from ..errors import DeviceError
from ..modules.idle import Nothing, leave_out_idle
from ..sampling.calls import Call
from ..sampling.layers import Layer, place_layers
from ..sampling.passes import SideBySide
from ..sampling.propagation import TileRun
from ..sampling.tiling import TileSize
from ..system.no_data import without_data
from ..system.precision import decoded_within, dtype_of, narrow
from .attention import ChunkedAttention, OneTokenAttention, PatchedAttention
from .feed_forward import keep_in_caches

#: What the UNet is told beside the picture: frame rate (the paper's 8, as the UNet sees it), motion bucket, noise.
MICRO_CONDITIONS = (8.0, 127.0, 0.0)

#: Stock SVD's sampler: EDM, Karras spacing between these sigmas.
SIGMA_MAX, SIGMA_MIN = 700.0, 0.002

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def spatial_self_attention(unet: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, attention) of every spatial self-attention layer, in the order the UNet runs them."""
    stages = [("down_blocks", "down_blocks"), ("mid_block", "mid_block"), ("up_blocks", "up_blocks")]
    return [
        (f"{stage}.{name}", module)
        for stage, attribute in stages
        for name, module in cast("Iterable[tuple[str, nn.Module]]", getattr(unet, attribute).named_modules())
        if ".transformer_blocks." in name and name.endswith(".attn1") and "temporal" not in name
    ]


def find_layers(unet: nn.Module) -> dict[str, Layer]:
    """Every spatial self-attention layer by name, with the choices it belongs to."""
    names = [name for name, _ in spatial_self_attention(unet)]
    return place_layers(names, [name for name in names if name.startswith("mid_block.")])


@dataclass
class Backbone(ABC):
    """A loaded UNet and VAE. `active` is the run and call that the attention layers serve; None outside `serving`.

    Takes over the UNet's attention processors: one UNet belongs to one Backbone.
    """

    unet: Any
    vae: Any
    image_encoder: Any
    tile: TileSize
    device: torch.device
    dtype: torch.dtype
    active: tuple[TileRun | SideBySide, Call] | None = None

    #: Whether CFG's branch without a condition sees the LR latents too.
    always_sees_lr: ClassVar[bool] = False

    def __post_init__(self) -> None:
        layers = find_layers(self.unet)
        for name, module in spatial_self_attention(self.unet):
            cast(Any, module).set_processor(PatchedAttention(self, layers[name]))
        for name, module in cast("Iterable[tuple[str, nn.Module]]", self.unet.named_modules()):
            if name.endswith(".attn2"):
                cast(Any, module).set_processor(OneTokenAttention())
            elif name.endswith(".attn1") and name not in layers and not isinstance(module, Nothing):
                cast(Any, module).set_processor(ChunkedAttention())
        keep_in_caches(self.unet)

    @property
    def scaling_factor(self) -> float:
        """What a latent is multiplied by for the UNet."""
        return float(self.vae.config["scaling_factor"])

    @property
    def factor(self) -> int:
        """By how much the UNet shrinks a latent: tiles and frames must be multiples of it."""
        return 2 ** (len(self.unet.config["block_out_channels"]) - 1)

    @property
    @abstractmethod
    def sigma_max(self) -> float:
        """The most noise that the model was trained on."""

    @property
    @abstractmethod
    def sigma_min(self) -> float:
        """The least."""

    @abstractmethod
    def sigmas(self, steps: int, start: float | None = None) -> list[float]:
        """`steps` falling noise levels and a final 0, spaced as the model's own sampler has them, from `start` (None:
        the most noise) to the least."""

    @abstractmethod
    def denoise(self, x: Tensor, sigma: float, lr_latents: Tensor, context: Tensor, frames: int) -> Tensor:
        """Denoised estimate of tiles `(videos*frames, 4, h, w)` float32 at noise level `sigma`, given `lr_latents`
        (unscaled) and `context` `(1, tokens, dim)`, or a row for each of equal shares of the tiles."""

    @contextmanager
    def serving(self, run: TileRun | SideBySide, call: Call) -> Generator[None]:
        """Lets the attention layers know what is being evaluated."""
        run.serve(call)
        self.active = (run, call)
        try:
            yield
        finally:
            self.active = None

    def context(self, image: Tensor | None) -> Tensor:
        """Cross-attention tokens `(1, 1, dim)`: CLIP's embedding of one frame `(1, 3, h, w)`, or zeros without an
        encoder or an image."""
        if self.image_encoder is None or image is None:
            return torch.zeros(1, 1, context_width(self.unet), device=self.device, dtype=self.dtype)
        return rearrange(
            self.image_encoder(clip_pixels(image).to(self.device, self.dtype)).image_embeds, "b d -> b 1 d"
        )

    def negative_context(self) -> Tensor:
        """The cross-attention tokens of CFG's branch without the condition."""
        return self.context(None)

    def encode(self, frames: Tensor) -> Tensor:
        """Unscaled latents `(n, 4, h/8, w/8)` float32 (the distribution's mode) of frames; h, w multiples of 8."""
        moments = self.vae.quant_conv(self.vae.encoder((frames * 2 - 1).to(self.device, dtype_of(self.vae.encoder))))
        return moments[:, :4].float().to(frames.device)

    def decode(self, latents: Tensor) -> Tensor:
        """Frames of one chunk of unscaled latents; not clamped. A float16 decoder that overflows is widened."""
        return decoded_within(self.vae, lambda: self._decode(latents))

    def _decode(self, latents: Tensor) -> Tensor:
        z = latents.to(self.device, dtype_of(self.vae.decoder))
        if isinstance(self.vae, AutoencoderKLTemporalDecoder):
            indicator = torch.zeros(1, z.shape[0], device=z.device, dtype=z.dtype)
            out = self.vae.decoder(z, num_frames=z.shape[0], image_only_indicator=indicator)
        else:
            out = self.vae.decoder(self.vae.post_quant_conv(z))
        return (out.float() / 2 + 0.5).to(latents.device)


class SVD(Backbone):
    """Stable Video Diffusion."""

    @property
    def sigma_max(self) -> float:
        return SIGMA_MAX

    @property
    def sigma_min(self) -> float:
        return SIGMA_MIN

    def sigmas(self, steps: int, start: float | None = None) -> list[float]:
        return sigmas(steps, start)

    def denoise(self, x: Tensor, sigma: float, lr_latents: Tensor, context: Tensor, frames: int) -> Tensor:
        """Denoised estimate of tiles `(videos*frames, 4, h, w)` float32: DC-VSR equation 12, EDM's preconditioning, of
        a v-prediction UNet.

        c_in = 1/sqrt(s^2+1), c_skip = 1/(s^2+1), c_out = -s/sqrt(s^2+1), c_noise = ln(s)/4. `lr_latents` holds the LR
        latents (unscaled, as SVD's are).
        """
        videos = x.shape[0] // frames
        scaled = (x.float() / (sigma**2 + 1) ** 0.5).to(self.device, self.dtype)
        model_input = torch.cat([scaled, lr_latents.to(self.device, self.dtype)], dim=1)
        # Filled in on the device: nothing crosses over within a call.
        timestep = torch.full((), 0.25 * math.log(sigma), dtype=torch.float32, device=self.device)
        conditions = [torch.full((videos, 1), x, dtype=self.dtype, device=self.device) for x in MICRO_CONDITIONS]
        v = self.unet(
            rearrange(model_input, "(b t) c h w -> b t c h w", t=frames),
            timestep,
            shared_out(context, videos),
            torch.cat(conditions, dim=1),
            return_dict=False,
        )[0]
        v = rearrange(v, "b t c h w -> (b t) c h w").float().to(x.device)
        return x.float() / (sigma**2 + 1) - v * (sigma / (sigma**2 + 1) ** 0.5)


def shared_out(context: Tensor, rows: int) -> Tensor:
    """A context `(n, tokens, dim)` for each of so many rows, in n equal shares; of a single one a view."""
    if len(context) == 1:
        return context.expand(rows, -1, -1)
    return context.repeat_interleave(rows // len(context), dim=0)


def context_width(unet: Any) -> int:
    """Width of the tokens that a UNet's cross-attention takes."""
    width = unet.config["cross_attention_dim"]
    return width if isinstance(width, int) else width[0]


def clip_pixels(image: Tensor) -> Tensor:
    """A frame as SVD's CLIP takes it: 224 x 224 by the resize it was trained with, CLIP's mean and deviation."""
    from kornia.geometry.transform import resize  # slow to import

    small = resize(image.float() * 2 - 1, (224, 224), interpolation="bicubic", align_corners=True, antialias=True)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
    return (small / 2 + 0.5 - mean.to(small)) / deviation.to(small)


def sigmas(steps: int, start: float | None = None) -> list[float]:
    """`steps` falling noise levels from `start` (None: SIGMA_MAX), and a final 0: diffusers' scheduler, set up as stock
    SVD's."""
    return list(_sigmas(steps, start))


@lru_cache(maxsize=64)  # a plan asks dozens of times
def _sigmas(steps: int, start: float | None) -> tuple[float, ...]:
    scheduler: Any = EulerDiscreteScheduler(
        prediction_type="v_prediction",
        use_karras_sigmas=True,
        sigma_min=SIGMA_MIN,
        sigma_max=SIGMA_MAX if start is None else start,
        timestep_type="continuous",
        timestep_spacing="leading",
        steps_offset=1,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        interpolation_type="linear",
    )
    scheduler.set_timesteps(steps)
    return tuple(float(sigma) for sigma in scheduler.sigmas)


def pick_device(name: str) -> torch.device:
    """The device called `name` ("auto": CUDA, else Apple's, else the CPU). Raises DeviceError if it is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"device is {name!r}: expected auto, cpu, cuda, cuda:0 ... or mps") from None
    there = available.get(device.type, False)
    if not there or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise DeviceError(
            f"device {name!r} is not there on this machine: use --device cpu, or install a torch that sees it"
        )
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision called `name`; "auto" is float32 on the CPU and float16 elsewhere. Raises DeviceError."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    if name not in DTYPES:
        raise DeviceError(f"dtype is {name!r}: expected auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def build_svd(weights: SVDWeights, device: torch.device, dtype: torch.dtype) -> SVD:
    """The models of `weights` (which are `dtype` already), built without a second copy of the tensors."""
    with without_data():
        unet = UNetSpatioTemporalConditionModel(**weights.unet_config)
    unet.load_state_dict(weights.unet, assign=True)
    match_host_epsilon(unet)
    leave_out_idle(unet)
    image_encoder = None
    if weights.image_encoder is not None:
        image_encoder = _build_image_encoder(weights).to(device).eval().requires_grad_(False)
    cast(nn.Module, unet).to(device).eval().requires_grad_(False)
    vae = build_vae(AutoencoderKLTemporalDecoder, weights.vae_config, weights.vae, device, dtype)
    return SVD(unet, vae, image_encoder, TileSize(*weights.tile), device, dtype)


def build_vae(
    kind: Callable[..., Any],
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> Any:
    """A VAE of diffusers' class `kind`, frozen; its encoder wider than `dtype` where it must be."""
    with without_data():
        vae = kind(**config)
    vae.load_state_dict(state, assign=True)
    leave_out_idle(vae)
    narrow(vae, dtype)
    return vae.to(device).eval().requires_grad_(False)


def _build_image_encoder(weights: SVDWeights) -> nn.Module:
    # transformers is needed for stock SVD's CLIP alone, and slow to import.
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**(weights.image_encoder_config or {})))
    encoder.load_state_dict(weights.image_encoder or {}, strict=False)
    return cast(nn.Module, encoder).to(next(iter((weights.image_encoder or {}).values())).dtype)


def load_svd(path: Path | str, device: torch.device, dtype: torch.dtype, unet: Path | None = None) -> SVD:
    """The bundled weights for "lite", else the SVD at `path`; `unet` is a UNet alone that takes the place of its own.
    Raises CheckpointError."""
    return build_svd(read_svd(LITE if str(path) == "lite" else Path(path), dtype, unet), device, dtype)
