"""A small Stable Diffusion that learns single frames of latents: the backbone of SDATC's parts at lite size.

It sees no LR video and no text (the context is zeros): what takes the LR video is the control, trained after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from training.data.latents import LatentsTask
from training.loop.curve import rows_of
from training.loop.draws import integer
from training.loop.recipe import Recipe, from_table
from training.loop.state import SD_WEIGHTS, upscaler_note, weights_of
from training.loop.task import Batch
from training.tasks.capm import CAPMDataSettings, CAPMLatents
from training.tasks.svd import read_start
from vsr_ops.backbones.sd import TIMESTEPS, model_sigmas
from vsr_ops.backbones.svd import SVD, Backbone, build_svd
from vsr_ops.checkpoints.sd import LITE_SD, SDWeights, read_sd, write_sd
from vsr_ops.errors import SettingError

#: Channels of an attention head.
HEAD = 32
#: Steps of the sampler in a run's sample pictures, and the timestep whose noise they show taken away.
PICTURE_STEPS, PICTURE_TIMESTEP = 20, 400


@dataclass(frozen=True)
class SDModelSettings:
    """`vae`: the SVD whose VAE the latents are of ("lite", a file or a run). Either `start`, an SD ("lite", a file or a
    run), or the shape of a new UNet: widths (multiples of the first, which is one of 32), residual blocks and, where
    `attends` is 1, attention at each level."""

    start: str = ""
    vae: str = "lite"
    block_out_channels: tuple[int, ...] = (32, 64, 32)
    layers_per_block: tuple[int, ...] = (2, 1, 1)
    attends: tuple[int, ...] = (0, 0, 1)
    cross_attention_dim: int = 32


@dataclass(frozen=True)
class SDDataSettings(CAPMDataSettings):
    """Clips as CAPM's recipe has them, and may share them; a sample is `crop` x `crop` latents of one frame."""

    crop: int = 16


@dataclass(frozen=True)
class SDLossSettings:
    """Nothing to set: the plain v loss at timesteps drawn evenly, as DDPM's."""


class FrameLatents(CAPMLatents):
    """Single frames of CAPMLatents' clips."""

    free = (*CAPMLatents.free, "crop")

    def __init__(self, folder: Path, settings: SDDataSettings) -> None:
        super().__init__(folder, settings)
        self._crop, size = settings.crop, settings.size // 8
        if not 4 <= self._crop <= size or self._crop % 4:
            raise SettingError(
                f"data.crop is {self._crop}: expected a multiple of 4 from 4 to data.size / 8, which is {size}"
            )

    def draw(self, rng: torch.Generator) -> Batch:
        """One frame's place: `clean` and `hint` (the LR latents) `(4, crop, crop)`, both times the VAE's factor, and
        the clip's `level`."""
        frame = self.draw_frames(rng, 1)
        return {"clean": frame["clean"][0], "hint": frame["hint"][0], "level": frame["level"]}

    def draw_frames(self, rng: torch.Generator, count: int) -> Batch:
        """The same of one place in `count` frames in a row: `clean` and `hint` `(count, 4, crop, crop)`."""
        data, crop = self.settings, self._crop
        shard, index = self._clip(integer(rng, data.clips))
        first, top, left = (integer(rng, n) for n in (data.frames - count + 1, *[data.size // 8 - crop + 1] * 2))
        place = (index, slice(first, first + count), slice(None), slice(top, top + crop), slice(left, left + crop))
        clean, hint = (shard[key][place].float() * shard["factor"] for key in ("clean", "lr"))
        return {"clean": clean, "hint": hint, "level": shard["level"][index].float()}


class SDTask(LatentsTask):
    """Task "sd". A sample is one frame's latents, a timestep and noise."""

    def __init__(self, recipe: Recipe, data: Path, out: Path) -> None:
        self.shape = from_table(SDModelSettings, recipe.model, "model")
        self.data = from_table(SDDataSettings, recipe.data, "data")
        from_table(SDLossSettings, recipe.loss, "loss")
        self._config = {} if self.shape.start else unet_shape(self.shape)
        super().__init__(data, out, FrameLatents, self.data)

    def make_coder(self) -> SVD:
        return build_svd(read_start(self.shape.vae), torch.device("cpu"), torch.float32)

    def build(self) -> nn.Module:
        start = self.shape.start
        return cast(nn.Module, unet_of(read_start_sd(start)) if start else UNet2DConditionModel(**self._config))

    def trains(self, name: str) -> bool:
        return True

    def sample(self, rng: torch.Generator) -> Batch:
        clean = self._latents.draw(rng)["clean"]
        timestep = torch.tensor(integer(rng, TIMESTEPS))
        return {"clean": clean, "timestep": timestep, "noise": torch.randn(clean.shape, generator=rng)}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        scaled, target = noised(batch["clean"], batch["noise"], batch["timestep"])
        return (velocity(model, scaled, batch["timestep"]) - target).square().mean(), {}

    def picture(self, model: nn.Module, batch: Batch) -> Tensor:
        """Two places: with much noise, that noise taken away, and what the model makes of noise alone."""
        clean, noise = batch["clean"][:2], batch["noise"][:2]
        timestep = torch.full_like(batch["timestep"][:2], PICTURE_TIMESTEP)
        scaled, _ = noised(clean, noise, timestep)
        v = velocity(model, scaled, timestep)
        wide = float(model_sigmas()[PICTURE_TIMESTEP])
        columns = {
            "noisy": scaled * (wide**2 + 1) ** 0.5,
            "denoised": (scaled - wide * v) / (wide**2 + 1) ** 0.5,
            "from noise": sampled(partial(velocity, model), noise),
            "truth": clean,
        }
        return decoded_rows(self.coder(torch.device("cpu")), columns)

    def export(self, model: nn.Module, path: Path, trained_on: str) -> None:
        unet, size = cast(Any, model), self.data.size // 8
        config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
        kept = {key: config[key] for key in (*unet_shape(self.shape), "attention_head_dim") if key in config}
        tile = (size, size, self.data.frames)
        weights = SDWeights(kept, "v_prediction", unet.state_dict(), tile)
        write_sd(path, weights, trained_on, notes=upscaler_note(self.data.upscaler))


def unet_shape(shape: SDModelSettings) -> dict[str, Any]:
    """diffusers' keyword arguments of a new UNet. Raises SettingError for widths that it, or the host, cannot have."""
    widths, levels = shape.block_out_channels, len(shape.block_out_channels)
    first = widths[0]
    if first % HEAD or any(width < 1 or width % first for width in widths):
        raise SettingError(
            f"model.block_out_channels is {list(widths)}: expected multiples of the first, itself a multiple of {HEAD}"
        )
    for name in ("layers_per_block", "attends"):
        if len(value := getattr(shape, name)) != levels:
            raise SettingError(f"model.{name} is {list(value)}: expected one number for each of {levels} levels")
    return {
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ["CrossAttnDownBlock2D" if on else "DownBlock2D" for on in shape.attends],
        "up_block_types": ["CrossAttnUpBlock2D" if on else "UpBlock2D" for on in reversed(shape.attends)],
        "block_out_channels": list(widths),
        "layers_per_block": list(shape.layers_per_block),
        "attention_head_dim": [width // HEAD for width in widths],
        "cross_attention_dim": shape.cross_attention_dim,
        "use_linear_projection": True,
    }


def decoded_rows(coder: Backbone, columns: Mapping[str, Tensor]) -> Tensor:
    """Labelled columns of scaled latents of single frames, decoded on the CPU."""
    pictures: list[tuple[str, Tensor]] = []
    with torch.autocast("cpu", enabled=False):
        for name, latents in columns.items():
            frames = [coder.decode(frame[None]) for frame in latents.float().cpu() / coder.scaling_factor]
            pictures.append((name, torch.cat(frames)))
    return rows_of(pictures)


def noised(clean: Tensor, noise: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """Latents `(n, 4, h, w)` with a timestep's noise as the UNet takes them (of deviation 1), and the v it should find:
    `(x0 + s eps) / sqrt(s^2 + 1)` (SDATC, equation 2) and `(eps - s x0) / sqrt(s^2 + 1)`."""
    wide = model_sigmas().to(clean)[timestep].view(-1, 1, 1, 1)
    scale = (wide**2 + 1).sqrt()
    return (clean + wide * noise) / scale, (noise - wide * clean) / scale


def nothing(unet: nn.Module, latents: Tensor) -> Tensor:
    """The empty context: one token of zeros for each of the latents."""
    return latents.new_zeros(len(latents), 1, cast(Any, unet).config["cross_attention_dim"])


def velocity(unet: nn.Module, scaled: Tensor, timestep: Tensor, tokens: Tensor | None = None, **more: Any) -> Tensor:
    """The network's answer for latents as it takes them, with a context `(1, tokens, dim)`, by default zeros."""
    context = nothing(unet, scaled) if tokens is None else tokens.to(scaled).expand(len(scaled), -1, -1)
    return cast(Any, unet)(scaled, timestep, context, **more).sample.float()


def sampled(velocity_at: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int = PICTURE_STEPS) -> Tensor:
    """Latents by Euler's method from noise of deviation 1, at timesteps spaced evenly; `velocity_at` takes latents as
    the UNet does and their timesteps."""
    times = torch.linspace(TIMESTEPS - 1, 0, steps).round().long()
    sigmas = [*model_sigmas()[times].tolist(), 0.0]
    x = noise * (sigmas[0] ** 2 + 1) ** 0.5
    for time, (sigma, following) in zip(times, pairwise(sigmas), strict=True):
        v = velocity_at(x / (sigma**2 + 1) ** 0.5, time.expand(len(x)).to(x.device))
        slope = (x * sigma / (sigma**2 + 1)) + v / (sigma**2 + 1) ** 0.5
        x = x + slope * (following - sigma)
    return x


def start_file(name: str) -> Path:
    """The file of the SD that a recipe starts from: "lite", a file, or an earlier run, of a control with the SD's
    decoder too."""
    return LITE_SD if name == "lite" else Path(weights_of(weights_of(name, SD_WEIGHTS)))


def read_start_sd(name: str) -> SDWeights:
    """What `start_file` has. Raises CheckpointError."""
    return read_sd(start_file(name))


def unet_of(weights: SDWeights) -> UNet2DConditionModel:
    unet = UNet2DConditionModel(**weights.unet_config)
    unet.load_state_dict(weights.unet)
    return unet
