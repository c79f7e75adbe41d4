"""Stable Diffusion 1.5, 2.1 and the lite one without a host, on diffusers' own classes: the frames of a video are its
batch.

Frames are `(frames, 3, h, w)` RGB in [0, 1], latents `(frames, 4, h/8, w/8)`; noise levels are EDM sigmas.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import ClassVar, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import AutoencoderKLTemporalDecoder
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from ..checkpoints.sd import BETAS, LITE_SD, TIMESTEPS, SDWeights, read_sd
from ..checkpoints.svd import LITE, read_svd
from ..checkpoints.text_file import Texts
from ..errors import SettingError
from ..modules.control import Control, check_strength
from ..sampling.tiling import TileSize
from ..system.no_data import without_data
from .attention import use_chunks
from .svd import Backbone, build_vae, context_width, shared_out

#: What is left of the signal's variance at the last timestep of a schedule of zero terminal SNR: the host's number, for
#: zero itself has no finite noise level.
ZERO = 4.8973451890853435e-08


@cache
def model_sigmas(zero_snr: bool = False) -> Tensor:
    """The noise levels `(1000,)` float64, rising, that Stable Diffusion learned: betas linear in their square root
    (SDATC, equations 1 and 2).

    With `zero_snr` the square root of the signal's variance is shifted and scaled so that it ends at 0 and begins where
    it did (Lin et al., arXiv 2305.08891, algorithm 1); the last level is that of ZERO.
    """
    first, last = (beta**0.5 for beta in BETAS)
    kept = (1 - torch.linspace(first, last, TIMESTEPS, dtype=torch.float64) ** 2).cumprod(0)
    if zero_snr:
        root = kept.sqrt()
        kept = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        kept[-1] = ZERO
    return ((1 - kept) / kept).sqrt()


def timestep_of(sigma: float, zero_snr: bool = False) -> int:
    """The timestep whose noise level is nearest, by logarithm: what the UNet is told, as the host tells it."""
    levels = model_sigmas(zero_snr).log()
    return int((levels - torch.tensor(sigma, dtype=torch.float64).log()).abs().argmin())


def sigma_at(timestep: float, zero_snr: bool = False) -> float:
    """The noise level of a timestep in [0, 999]; between two, by logarithm."""
    low = min(int(timestep), TIMESTEPS - 2)
    levels = model_sigmas(zero_snr)[low : low + 2].log()
    return float((levels[0] + (levels[1] - levels[0]) * (timestep - low)).exp())


def time_at(sigma: float, zero_snr: bool = False) -> float:
    """The timestep in [0, 999] of a noise level within the model's: what `sigma_at` leads back from."""
    levels, level = model_sigmas(zero_snr).log(), torch.tensor(sigma, dtype=torch.float64).log()
    low = min(max(int(torch.searchsorted(levels, level)) - 1, 0), TIMESTEPS - 2)
    return low + float((level - levels[low]) / (levels[low + 1] - levels[low]))


@dataclass
class SD(Backbone):
    """Stable Diffusion with, where there is one, a `control` that sees the LR latents. At `control_strength` 0 it is as
    without. Raises SettingError for a control or texts of another UNet, or a strength outside [0, 10].

    `prediction` is what the UNet was trained to find: "v_prediction" or "epsilon"; `zero_snr`: its last timestep was
    noise alone. Without `texts` the prompt is one token of zeros, which the lite one was trained with.
    """

    prediction: str = field(default="v_prediction", kw_only=True)
    zero_snr: bool = field(default=False, kw_only=True)
    texts: Texts | None = field(default=None, kw_only=True)
    control: Control | None = field(default=None, kw_only=True)
    control_strength: float = field(default=1.0, kw_only=True)

    #: A control's hint is no condition of CFG's: DiffBIR gives it to both branches.
    always_sees_lr: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_strength(self.control_strength)
        width = context_width(self.unet)
        if self.texts is not None and self.texts.width != width:
            raise SettingError(
                f"the text is {self.texts.width} wide, the UNet's cross-attention takes {width} (cross_attention_dim):"
                " give one that the model's own text encoder made (768: SD 1.5, 1024: SD 2.1)"
            )
        if self.control is not None:
            use_chunks(self.control)
            config = self.unet.config
            blocks = config["layers_per_block"]
            widths = list(config["block_out_channels"])
            self.control.check_fits(widths, width, [blocks] * len(widths) if isinstance(blocks, int) else list(blocks))

    @property
    def sigma_max(self) -> float:
        return float(model_sigmas(self.zero_snr)[-1])

    @property
    def sigma_min(self) -> float:
        return float(model_sigmas(self.zero_snr)[0])

    def sigmas(self, steps: int, start: float | None = None) -> list[float]:
        """At timesteps spaced evenly from the last, or that of `start`, to the first: the host's scheduler "normal"."""
        first = TIMESTEPS - 1 if start is None else time_at(start, self.zero_snr)
        times = torch.linspace(first, 0, steps, dtype=torch.float64)
        return [*(sigma_at(float(time), self.zero_snr) for time in times), 0.0]

    def context(self, image: Tensor | None) -> Tensor:
        """The prompt's tokens `(1, tokens, dim)`; zeros without a text. An image tells it nothing."""
        return super().context(None) if self.texts is None else self.texts.prompt

    def negative_context(self) -> Tensor:
        """The tokens `(1, tokens, dim)` of CFG's other branch: the negative text's, by default the empty one's."""
        return self.context(None) if self.texts is None else self.texts.negative

    def denoise(self, x: Tensor, sigma: float, lr_latents: Tensor, context: Tensor, frames: int) -> Tensor:
        """Denoised estimate of tiles `(videos*frames, 4, h, w)` float32.

        The UNet takes `x / sqrt(s^2+1)` and the nearest timestep; x0 is `x/(s^2+1) - v s/sqrt(s^2+1)`, or `x - s eps`.
        `lr_latents` holds the LR latents (unscaled): the control's hint.
        """
        scaled = (x.float() / (sigma**2 + 1) ** 0.5).to(self.device, self.dtype)
        # Filled in on the device: nothing crosses over within a call.
        timestep = torch.full((), timestep_of(sigma, self.zero_snr), device=self.device)
        tokens = shared_out(context.to(self.device, self.dtype), x.shape[0])
        skips, middle = self._controlled(scaled, timestep, tokens, lr_latents)
        found: Tensor = self.unet(
            scaled,
            timestep,
            tokens,
            down_block_additional_residuals=skips,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]
        found = found.float().to(x.device)
        if self.prediction == "epsilon":
            return x.float() - sigma * found
        return x.float() / (sigma**2 + 1) - found * (sigma / (sigma**2 + 1) ** 0.5)

    def _controlled(
        self, scaled: Tensor, timestep: Tensor, tokens: Tensor, lr_latents: Tensor
    ) -> tuple[tuple[Tensor, ...] | None, Tensor | None]:
        """What the control adds to the skips and the middle; None where nothing."""
        strength = self.control_strength
        if self.control is None or strength == 0:
            return None, None
        hint = lr_latents.to(self.device, torch.float32) * self.scaling_factor
        skips, middle = self.control(scaled, timestep, tokens, hint.to(self.dtype))
        return tuple(skip * strength for skip in skips), middle * strength


def build_sd(
    weights: SDWeights,
    device: torch.device,
    dtype: torch.dtype,
    control: Control | None = None,
    control_strength: float = 1.0,
    texts: Texts | None = None,
) -> SD:
    """The models of `weights` (which are `dtype` already); the VAE is the bundled SVD's where they have none. The
    control goes to `device` and `dtype`. Raises SettingError as SD does."""
    with without_data():
        unet = UNet2DConditionModel(**weights.unet_config)
    unet.load_state_dict(weights.unet, assign=True)
    cast(nn.Module, unet).to(device).eval().requires_grad_(False)
    if weights.vae_config is None or weights.vae is None:
        bundled = read_svd(LITE, dtype)
        vae = build_vae(AutoencoderKLTemporalDecoder, bundled.vae_config, bundled.vae, device, dtype)
    else:
        vae = build_vae(AutoencoderKL, weights.vae_config, weights.vae, device, dtype)
    return SD(
        unet,
        vae,
        None,
        TileSize(*weights.tile),
        device,
        dtype,
        prediction=weights.prediction,
        zero_snr=weights.zero_snr,
        texts=texts,
        control=None if control is None else control.to(device, dtype).eval(),
        control_strength=control_strength,
    )


def load_sd(
    path: Path | str,
    device: torch.device,
    dtype: torch.dtype,
    control: Control | None = None,
    control_strength: float = 1.0,
) -> SD:
    """The bundled weights for "lite", else the Stable Diffusion at `path`. Raises CheckpointError."""
    weights = read_sd(LITE_SD if str(path) == "lite" else Path(path), dtype)
    return build_sd(weights, device, dtype, control, control_strength)
