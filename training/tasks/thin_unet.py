"""An SVD's UNet made faster: some of its branches over time fall away, and the rest learns to say the same."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from training.data.latents import Latents, LatentSettings, LatentsTask
from training.loop.draws import uniform
from training.loop.recipe import Recipe, from_table
from training.loop.state import upscaler_note
from training.loop.task import Batch
from training.tasks.refiner import factor_of
from training.tasks.svd import middle_frames, read_start, velocity
from vsr_ops.backbones.svd import SVD, build_svd
from vsr_ops.checkpoints.svd import SVDWeights, write_svd
from vsr_ops.errors import SettingError


@dataclass(frozen=True)
class ThinUNetModelSettings:
    """`start`: the SVD whose UNet learns, a file or folder, "lite", or a run. `idle`: its layers that become zero, by
    their names in diffusers with wildcards, so that the branches which end with them add nothing."""

    start: str = ""
    idle: tuple[str, ...] = ()


@dataclass(frozen=True)
class ThinUNetLossSettings:
    """A `start_share` of the clips begins as the default does, at the LR latent with noise of `start_sigma`; the others
    have the truth's latents and log-normal noise (mean and deviation of ln sigma). A share `drop` comes without LR
    latents. `features` weighs how far each block's output, which CAPM reads, is off the old one's, in its variance."""

    start_sigma: float = 3.0
    start_share: float = 0.65
    log_mean: float = 0.0
    log_deviation: float = 2.0
    drop: float = 0.1
    features: float = 0.03


class ThinUNet(LatentsTask):
    """Task "thin_unet". A sample is one clip's noisy latents `x`, its LR latents, context and noise level."""

    def __init__(self, recipe: Recipe, data: Path, out: Path) -> None:
        self.shape = from_table(ThinUNetModelSettings, recipe.model, "model")
        self.weights = from_table(ThinUNetLossSettings, recipe.loss, "loss")
        self.data = from_table(LatentSettings, recipe.data, "data")
        if not self.shape.start:
            raise SettingError("model.start is empty: expected the SVD whose UNet learns (--set model.start=lite)")
        super().__init__(data, out, Latents, self.data)

    @cached_property
    def _before(self) -> SVDWeights:
        """The SVD before this training, float32."""
        return read_start(self.shape.start)

    @cached_property
    def _teacher(self) -> nn.Module:
        return unet_of(self._before).eval().requires_grad_(False)

    @property
    def _factor(self) -> float:
        return factor_of(self._before)

    def make_coder(self) -> SVD:
        return build_svd(own(self._before), torch.device("cpu"), torch.float32)

    def build(self) -> nn.Module:
        return unet_of(silenced_unet(self._before, self.shape.idle)).requires_grad_(True)

    def trains(self, name: str) -> bool:
        return True

    def sample(self, rng: torch.Generator) -> Batch:
        clip, weights = self._latents.draw(rng), self.weights
        free = (weights.log_mean + weights.log_deviation * torch.randn((), generator=rng)).exp().clamp(0.002, 700)
        starts = uniform(rng, 0, 1) < weights.start_share
        sigma = torch.tensor(weights.start_sigma) if starts else free
        noise = torch.randn(clip["clean"].shape, generator=rng)
        kept = float(uniform(rng, 0, 1) >= weights.drop)
        x = (clip["lr"] * self._factor if starts else clip["clean"]) + sigma * noise
        return {"x": x, "lr": clip["lr"] * kept, "context": clip["context"] * kept, "sigma": sigma}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        given = batch["x"], batch["lr"], batch["context"], batch["sigma"]
        teacher = self._teacher.to(batch["x"].device)
        with torch.no_grad(), features_of(teacher) as levels:
            wanted = velocity(teacher, *given).float()
        with features_of(model) as features:
            squared = (velocity(model, *given).float() - wanted).square().mean()
        apart = [(x - y).square().mean() / y.var() for x, y in zip(features, levels, strict=True)]
        kept = torch.stack(apart).mean()
        return squared + self.weights.features * kept, {
            "off": float(squared.detach().sqrt()),
            "features": float(kept.detach()),
        }

    def picture(self, model: nn.Module, batch: Batch) -> Tensor:
        """The middle frames of two clips, denoised in one step by the UNet as it was and as it is."""
        two = {key: value[:2] for key, value in batch.items()}
        sigma, shown = two["sigma"].view(-1, 1, 1, 1, 1), {"LR": two["lr"]}
        for name, unet in {"before": self._teacher.to(two["x"].device), "now": model}.items():
            v = velocity(unet, two["x"], two["lr"], two["context"], two["sigma"]).float()
            shown[name] = (two["x"] / (sigma**2 + 1) - v * sigma / (sigma**2 + 1).sqrt()) / self._factor
        return middle_frames(self.coder(torch.device("cpu")), shown)

    def export(self, model: nn.Module, path: Path, trained_on: str) -> None:
        weights = silenced_unet(self._before, self.shape.idle)
        noted = upscaler_note(self.data.upscaler)
        # What is idle is not in the model.
        write_svd(path, replace(weights, unet={**weights.unet, **model.state_dict()}, metadata=noted), trained_on)


def own(weights: SVDWeights) -> SVDWeights:
    """With a UNet's tensors that nobody else trains."""
    return replace(weights, unet={name: value.clone() for name, value in weights.unet.items()})


def unet_of(weights: SVDWeights) -> nn.Module:
    """The UNet as this pack runs it, what adds nothing left out."""
    return cast(nn.Module, build_svd(own(weights), torch.device("cpu"), torch.float32).unet)


def silenced_unet(weights: SVDWeights, patterns: tuple[str, ...]) -> SVDWeights:
    """The same SVD with the layers of its UNet at zero that fit one of `patterns`. Raises SettingError for a pattern
    that none fits."""
    layers = {name.rpartition(".")[0] for name in weights.unet}
    for pattern in patterns:
        if not any(fnmatchcase(layer, pattern) for layer in layers):
            raise SettingError(
                f"model.idle has {pattern}, which no layer of the UNet fits: expected names such as"
                " *.temporal_transformer_blocks.0.ff.net.2"
            )
    zeros = {
        name: torch.zeros_like(value)
        for name, value in weights.unet.items()
        if any(fnmatchcase(name.rpartition(".")[0], pattern) for pattern in patterns)
    }
    return replace(weights, unet={**weights.unet, **zeros})


@contextmanager
def features_of(unet: nn.Module) -> Generator[list[Tensor]]:
    """Within, what each of a UNet's blocks gives is noted, float32."""
    found: list[Tensor] = []
    parts = cast(Any, unet)

    def note(_: nn.Module, __: object, out: Tensor | tuple[Tensor, ...]) -> None:
        found.append((out[0] if isinstance(out, tuple) else out).float())

    hooks = [part.register_forward_hook(note) for part in (*parts.down_blocks, parts.mid_block, *parts.up_blocks)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
