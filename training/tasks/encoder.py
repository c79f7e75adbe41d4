"""A VAE's encoder made faster: some of its blocks fall away, and the rest learns to give the same latents."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import AutoencoderKLTemporalDecoder
from torch import Tensor, nn

from training.data.folder import Folder, check_degradation, degraded
from training.loop.curve import rows_of
from training.loop.draws import uniform
from training.loop.recipe import Recipe, from_table
from training.loop.state import upscaler_note
from training.loop.task import Batch
from training.losses.losses import charbonnier
from training.tasks.enlarging import Enlarging
from training.tasks.refiner import factor_of, silenced
from training.tasks.svd import read_start
from vsr_ops.checkpoints.svd import SVDWeights, write_svd
from vsr_ops.errors import SettingError
from vsr_ops.modules.idle import leave_out_idle

SCALE = 4


@dataclass(frozen=True)
class EncoderModelSettings:
    """`start`: the SVD whose encoder learns, a file or folder, "lite", or a run; `idle`: layers of its VAE that become
    zero, so that the blocks which end with them add nothing; `dcm`: the file or run that enlarges."""

    start: str = ""
    idle: tuple[str, ...] = ()
    dcm: str = "lite"


@dataclass(frozen=True)
class EncoderDataSettings:
    """Pictures of `size` x `size` pixels (a multiple of 8): enlarged ones, but for a `true_share` of the truth."""

    size: int = 256
    degradation: str = "lite"
    clean_share: float = 0.3
    video_share: float = 0.4
    true_share: float = 0.2


@dataclass(frozen=True)
class EncoderLossSettings:
    """Weights of Charbonnier's and of the squared distance to the latents as they were, in their deviations, and of
    the same for the features after each level but the first, which CFW reads (`features`)."""

    charbonnier: float = 1.0
    squared: float = 1.0
    features: float = 0.3


class EncoderTask(Enlarging):
    """Task "encoder". A sample is lr `(1, 3, h/4, w/4)`, truth `(1, 3, h, w)` in [0, 1], and which of them is seen."""

    def __init__(self, recipe: Recipe, data: Path, out: Path) -> None:
        self.shape = from_table(EncoderModelSettings, recipe.model, "model")
        self.data = from_table(EncoderDataSettings, recipe.data, "data")
        self.weights = from_table(EncoderLossSettings, recipe.loss, "loss")
        if not self.shape.start:
            raise SettingError("model.start is empty: expected the SVD whose encoder learns (--set model.start=lite)")
        if self.data.size % 8 or self.data.size < 32:
            raise SettingError(f"data.size is {self.data.size}: expected a multiple of 8 of at least 32 pixels")
        check_degradation(self.data.degradation)
        super().__init__(Folder(data), self.shape.dcm)

    @cached_property
    def _before(self) -> SVDWeights:
        """The SVD before this training, float32."""
        return read_start(self.shape.start)

    @cached_property
    def _teacher(self) -> nn.Module:
        return encoder_of(self._before).eval().requires_grad_(False)

    def build(self) -> nn.Module:
        encoder = encoder_of(silenced(self._before, self.shape.idle))
        leave_out_idle(encoder)
        return encoder

    def trains(self, name: str) -> bool:
        return True

    def sample(self, rng: torch.Generator) -> Batch:
        data = self.data
        truth = self._folder.clip(1, data.size, rng, data.video_share)
        low = degraded(data.degradation, truth, rng, SCALE, data.clean_share)
        return {"lr": low, "truth": truth, "true": torch.tensor(float(uniform(rng, 0, 1) < data.true_share))}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        seen = self._seen(batch)
        with torch.no_grad():
            *levels, wanted = outputs_of(self._teacher.to(seen.device), seen)
        *features, given = outputs_of(model, seen)
        weights, factor = self.weights, factor_of(self._before)
        squared = (factor * (given - wanted)).square().mean()
        apart = [charbonnier(x / y.std(), y / y.std()) for x, y in zip(features[1:], levels[1:], strict=True)]
        loss = weights.charbonnier * charbonnier(factor * given, factor * wanted) + weights.squared * squared
        loss = loss + weights.features * torch.stack(apart).mean()
        numbers = {f"level {level}": float(value.detach()) for level, value in enumerate(apart, 1)}
        return loss, {"off": float(squared.detach().sqrt()), **numbers}

    def _seen(self, batch: Batch) -> Tensor:
        """What is encoded, `(n, 3, h, w)` in [-1, 1]."""
        lr, truth = (batch[key].flatten(0, 1) for key in ("lr", "truth"))
        with torch.no_grad():
            enlarged = self.enlarged(lr)
        return 2 * torch.where(batch["true"].view(-1, 1, 1, 1) > 0, truth, enlarged) - 1

    def picture(self, model: nn.Module, batch: Batch) -> Tensor:
        """The first latent channels as colours."""
        seen = self._seen(batch)
        columns = {"seen": seen / 2 + 0.5}
        for name, encoder in {"before": self._teacher.to(seen.device), "now": model}.items():
            z = outputs_of(encoder, seen)[-1] * factor_of(self._before)
            columns[name] = nn.functional.interpolate(z[:, :3] / 6 + 0.5, size=seen.shape[-2:])
        return rows_of(list(columns.items()))

    def export(self, model: nn.Module, path: Path, trained_on: str) -> None:
        weights = silenced(self._before, self.shape.idle)
        state = {f"encoder.{name}": value for name, value in model.state_dict().items()}
        noted = upscaler_note(self.shape.dcm)
        write_svd(path, replace(weights, vae={**weights.vae, **state}, metadata=noted), trained_on)


def encoder_of(weights: SVDWeights) -> nn.Module:
    """The encoder; gives unscaled latents, the mean first. (The factor stands in its last layer, as it is.)"""
    encoder = cast(nn.Module, AutoencoderKLTemporalDecoder(**weights.vae_config).encoder)
    state = {name.removeprefix("encoder."): value for name, value in weights.vae.items() if name[:8] == "encoder."}
    encoder.load_state_dict(state)
    return encoder


def outputs_of(encoder: nn.Module, frames: Tensor) -> list[Tensor]:
    """The features after each level's residual blocks, finest first, and the latents' mean, of frames in [-1, 1]."""
    parts, x = cast(Any, encoder), cast(Any, encoder).conv_in(frames)
    found: list[Tensor] = []
    for down in parts.down_blocks:
        for block in down.resnets:
            x = block(x, None)
        found.append(x.float())
        for downsampler in down.downsamplers or ():
            x = downsampler(x)
    x = parts.conv_out(nn.functional.silu(parts.conv_norm_out(parts.mid_block(x))))
    return [*found, x[:, :4].float()]
