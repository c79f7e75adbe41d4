"""Picture VAE and refiner together: latents that keep what a DCM's picture lacks, and a refiner that adds it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from training.data.patches import Patches, PatchSettings
from training.loop.curve import rows_of
from training.loop.recipe import Recipe, from_table
from training.loop.task import Batch
from training.losses.losses import psnr
from training.losses.perceptual import haar_loss
from training.tasks.enlarging import Enlarging
from training.tasks.vae import (
    MEASURED,
    PICTURE,
    SCALE,
    TEMPORAL,
    VAEModelSettings,
    cut_middle,
    detail,
    encoded,
    latent_spread,
    picture_vae,
    read_vae,
    reconstruction_loss,
    scale_penalty,
    scaled_vae,
    shape_of,
    temporal_vae,
)
from vsr_ops.checkpoints.module_file import write_module
from vsr_ops.errors import SettingError
from vsr_ops.modules.refiner import Refiner, RefinerShape, write_refiner


@dataclass(frozen=True)
class RefinedModelSettings(VAEModelSettings):
    """`picture` may be empty: a new VAE. `dcm`, the guide's file or run ("lite": the bundled one); the refiner's
    `width`, `blocks` and `mixes` over time, which stay as they start: there is no time in pictures; its `form` and, of
    SATeCo's ("paper"), the `w0` that it learns at."""

    dcm: str = "lite"
    width: int = RefinerShape.width
    blocks: int = RefinerShape.blocks
    mixes: int = RefinerShape.mixes
    form: str = RefinerShape.form
    w0: float = RefinerShape.w0


@dataclass(frozen=True)
class RefinedLossSettings:
    """`latent_noise` in latent deviations. Beside the refined picture's reconstruction loss: the same of the decoded
    detail (`decoded`), 1 - HaarPSI of the refined picture (`haar`), the pull of the latents' deviation to 1 (`scale`).
    """

    latent_noise: float = 0.1
    decoded: float = 0.3
    haar: float = 0.1
    scale: float = 0.01


class RefinedVAE(Enlarging):
    """Task "vae_refined". A sample is `crops` patches, lr `(crops, 3, p, p)` and truth `(crops, 3, 4p, 4p)` in [0, 1],
    and noise for their latents.

    Its file is a temporal VAE whose temporal layers do nothing yet; the refiner's lies beside it.
    """

    def __init__(self, recipe: Recipe, data: Path, out: Path) -> None:
        self.shape = from_table(RefinedModelSettings, recipe.model, "model")
        self.weights = from_table(RefinedLossSettings, recipe.loss, "loss")
        self._patches = Patches(data, from_table(PatchSettings, recipe.data, "data"))
        if (patch := self._patches.settings.patch) % 2 or patch < 4:
            # HaarPSI wants 16 pixels, and a latent is 8 x 8 of them.
            raise SettingError(f"data.patch is {patch}: expected an even number of at least 4 LR pixels")
        super().__init__(self._patches.folder, self.shape.dcm)

    def build(self) -> nn.Module:
        shape = shape_of(self.shape)
        vae = cut_middle(picture_vae(shape), self.shape.layers_per_block)
        if self.shape.picture:
            state = read_vae(Path(self.shape.picture), PICTURE)[1]
            vae.load_state_dict({name: state[name] for name in vae.state_dict()})
        own = self.shape
        refiner = Refiner(RefinerShape(own.width, own.blocks, own.mixes, form=own.form, w0=own.w0))
        return nn.ModuleDict({"vae": vae, "refiner": refiner})

    def trains(self, name: str) -> bool:
        return not name.startswith("refiner.mix.")

    def sample(self, rng: torch.Generator) -> Batch:
        lr, truth = self._patches.draw(rng)
        noise = torch.randn(truth.shape[0], 4, truth.shape[-2] // 8, truth.shape[-1] // 8, generator=rng)
        return {"lr": lr, "truth": truth, "noise": noise}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        weights = self.weights
        truth, guide, mean, decoded, result = self._refined(model, batch, weights.latent_noise)
        haar = haar_loss(result, truth)
        loss = (
            reconstruction_loss(2 * result - 1, 2 * truth - 1)
            + weights.decoded * reconstruction_loss(detail(2 * decoded - 1), detail(2 * truth - 1))
            + weights.haar * haar
            + weights.scale * scale_penalty(mean)
        )
        return loss, {"psnr": psnr(result, truth), "guide": psnr(guide, truth), "haar": float(haar.detach())}

    def picture(self, model: nn.Module, batch: Batch) -> Tensor:
        truth, guide, _, decoded, result = self._refined(model, batch, 0.0)
        first = slice(None, None, batch["truth"].shape[1])
        columns = {"DCM": guide, "decoded": decoded, "refined": result, "truth": truth}
        return rows_of([(name, pictures[first]) for name, pictures in columns.items()])

    def _refined(self, model: nn.Module, batch: Batch, noise: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(truth, guide, latent mean, decoded, refined), all patches along the first axis, pictures in [0, 1]."""
        lr, truth, drawn = (rearrange(batch[key], "b n c h w -> (b n) c h w") for key in ("lr", "truth", "noise"))
        vae, refiner = cast(Any, model)["vae"], cast(Any, model)["refiner"]
        guide = self.enlarged(lr)
        mean = encoded(vae, 2 * truth - 1)
        decoded = vae.decoder(mean + noise * drawn).float() / 2 + 0.5
        return truth, guide, mean, decoded, refiner.refined(decoded, guide).float()

    def export(self, model: nn.Module, path: Path, trained_on: str) -> None:
        vae, shape = cast(Any, model)["vae"], shape_of(self.shape)
        samples = (2 * self._patches.draw(torch.Generator().manual_seed(n))[1] - 1 for n in range(MEASURED))
        state = scaled_vae(temporal_vae(vae, shape).state_dict(), latent_spread(vae, samples))
        write_module(path, TEMPORAL, {**shape, "scaling_factor": SCALE}, state, trained_on, torch.float32)
        write_refiner(beside(path), cast(Refiner, cast(Any, model)["refiner"]), trained_on)


def beside(path: Path) -> Path:
    """Where the refiner goes that was trained with the model at `path`: `..._refiner.safetensors`."""
    return path.with_name(f"{path.stem}_refiner{path.suffix}")
