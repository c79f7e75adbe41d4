"""The whole lite model at once: UNet, encoder, temporal decoder and refiner learn from the result of a short sampling.

One after the other, they do not meet: the encoder keeps what a DCM cannot know, which no UNet can guess, and refiner
and decoder learn to ignore it. Here the gradient of the finished video goes back through the sampler.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from training.data.folder import Folder, check_degradation, degraded
from training.loop.curve import rows_of
from training.loop.draws import pick, uniform
from training.loop.recipe import Recipe, from_table
from training.loop.state import REFINER, upscaler_note, weights_of
from training.loop.task import Batch
from training.losses.losses import charbonnier, flicker, followed_change, motion_of, psnr, temporal_difference
from training.losses.perceptual import haar_loss, neg_losses
from training.tasks.enlarging import Enlarging
from training.tasks.refiner import decode_refined, decoder_of, decoder_state, factor_of, grown
from training.tasks.svd import edm_loss, euler, read_start
from training.tasks.vae import detail, encoded, reconstruction_loss
from training.tasks.vae_refined import beside
from vsr_ops.backbones.svd import build_svd, sigmas
from vsr_ops.checkpoints.svd import SVDWeights, write_svd
from vsr_ops.errors import SettingError
from vsr_ops.modules.refiner import Refiner, RefinerShape, load_refiner, write_refiner

SCALE = 4


@dataclass(frozen=True)
class JointModelSettings:
    """`start`: the SVD, a file or folder, "lite", or a run. `refiner`: a file, "lite", or the run of vae_refined or
    refiner, which grows to `blocks`, `mixes` and `follows`; `dcm`: the guide's file or run, which does not learn."""

    start: str = ""
    refiner: str = ""
    dcm: str = "lite"
    blocks: int = RefinerShape.blocks
    mixes: int = RefinerShape.mixes
    follows: bool = RefinerShape.follows


@dataclass(frozen=True)
class JointDataSettings:
    """Clips of `frames` frames of `size` x `size` pixels (a multiple of 64), degraded in a way of DEGRADATIONS but for
    a `clean_share`. Each is sampled in one of the numbers of `steps`; for a `true_share`, the true latents with noise
    of 0.1 are decoded in the sampled ones' place, so that the encoder goes on holding the truth."""

    size: int = 128
    frames: int = 5
    degradation: str = "lite"
    clean_share: float = 0.3
    video_share: float = 0.4
    steps: tuple[int, ...] = (3, 4, 4, 4, 5)
    true_share: float = 0.08


@dataclass(frozen=True)
class JointLossSettings:
    """Weights. Of the refined video: Charbonnier's and the squared error, 1 - HaarPSI, 1 - ADM and 1 - VIF (VMAF-NEG's
    features: VMAF rests on ADM, VIF alone asks for blur), the change of the error from frame to frame (`change`) and
    along the motion (`followed`), flicker where nothing moves (`still`). Of the decoded one: its detail's
    reconstruction loss. Of the UNet: EDM's loss (`edm`), in which the share `drop` of clips comes without LR latents,
    so that guidance has an unconditional branch."""

    charbonnier: float = 0.7
    squared: float = 8.0
    haar: float = 0.5
    adm: float = 1.2
    vif: float = 0.3
    change: float = 1.0
    followed: float = 0.3
    still: float = 4.0
    decoded: float = 0.05
    edm: float = 0.015
    drop: float = 0.1


class Joint(Enlarging):
    """Task "whole". A sample is lr `(frames, 3, h/4, w/4)`, truth `(frames, 3, h, w)`, and what sampling draws."""

    shapes: ClassVar[type[JointModelSettings]] = JointModelSettings
    clips: ClassVar[type[JointDataSettings]] = JointDataSettings
    losses: ClassVar[type[JointLossSettings]] = JointLossSettings

    def __init__(self, recipe: Recipe, data: Path, out: Path) -> None:
        self.shape = from_table(self.shapes, recipe.model, "model")
        self.data = from_table(self.clips, recipe.data, "data")
        self.weights = from_table(self.losses, recipe.loss, "loss")
        for key in ("start", "refiner"):
            if not getattr(self.shape, key):
                raise SettingError(f"model.{key} is empty: expected a file or a run (--set model.{key}=lite)")
        if self.data.size % 64 or self.data.size < 64 or self.data.frames < 2 or min(self.data.steps) < 2:
            raise SettingError(
                f"data.size is {self.data.size}, data.frames {self.data.frames}, data.steps {list(self.data.steps)}:"
                " expected a multiple of 64, at least two frames and two steps"
            )
        check_degradation(self.data.degradation)
        super().__init__(Folder(data), self.shape.dcm)

    def base(self) -> SVDWeights:
        """The SVD before this training, float32. Raises SettingError for one that a refined clip cannot train."""
        weights = read_start(self.shape.start)
        if weights.image_encoder is not None:
            raise SettingError(
                f"model.start is {self.shape.start}, which has an image encoder: this task is for small models without"
                " one; train a full SVD with svd_stage1 and its refiner with lite_5_refiner"
            )
        return weights

    @cached_property
    def _factor(self) -> float:
        return factor_of(self.base())

    def build(self) -> nn.Module:
        weights = self.base()
        svd = build_svd(weights, torch.device("cpu"), torch.float32)
        unet, vae = cast(nn.Module, svd.unet), cast(Any, svd.vae)
        refiner, shape = load_refiner(weights_of(self.shape.refiner, REFINER)), self.shape
        wanted = replace(refiner.shape, blocks=shape.blocks, mixes=shape.mixes, follows=shape.follows)
        refiner = grown(refiner, wanted)
        parts = {"unet": unet, "encoder": vae.encoder, "decoder": decoder_of(weights), "refiner": refiner}
        return nn.ModuleDict(parts).requires_grad_(True)

    def trains(self, name: str) -> bool:
        return True

    def sample(self, rng: torch.Generator) -> Batch:
        data, cells = self.data, self.data.size // 8
        truth = self._folder.clip(data.frames, data.size, rng, data.video_share)
        low = self._low(truth, rng)
        latents = (2, data.frames, 4, cells, cells)
        return {
            **low,
            "truth": truth,
            "noise": torch.randn(latents, generator=rng),
            "sigma": (2 * torch.randn((), generator=rng)).exp().clamp(0.002, 700),
            "steps": torch.tensor(pick(rng, data.steps)),
            "true": torch.tensor(float(uniform(rng, 0, 1) < data.true_share)),
            "kept": torch.tensor(float(uniform(rng, 0, 1) >= self.weights.drop)),
        }

    def _low(self, truth: Tensor, rng: torch.Generator) -> Batch:
        """`lr`, and what else is known of how it came about."""
        return {"lr": degraded(self.data.degradation, truth, rng, SCALE, self.data.clean_share)}

    def _beside(self, model: nn.Module, clip: Batch) -> AbstractContextManager[object]:
        """What stands beside UNet and decoder while they run for a clip."""
        return nullcontext()

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        values = [
            self._loss_of(model, {key: value[i] for key, value in batch.items()}) for i in range(len(batch["lr"]))
        ]
        numbers = {key: sum(each[key] for _, each in values) / len(values) for key in values[0][1]}
        return torch.stack([value for value, _ in values]).mean(), numbers

    def _loss_of(self, model: nn.Module, clip: Batch) -> tuple[Tensor, dict[str, float]]:
        """Of one clip: a frame sees its neighbours, and the number of steps is the clip's."""
        weights, truth = self.weights, clip["truth"]
        guide, lr, clean = self._encoded(model, clip)
        noise, unet = clip["noise"], cast(Any, model)["unet"]
        context = noise.new_zeros(1, 1, unet.config.cross_attention_dim)
        with self._beside(model, clip):
            edm = edm_loss(unet, clean.detach()[None], clip["kept"] * lr[None], context, clip["sigma"][None], noise[:1])
            z = clean + 0.1 * noise[1] if clip["true"] else self._sampled(model, lr, clip)
            decoded, refined = decode_refined(model, z[None], guide[None])
        result, motion = refined[0], motion_of(truth)
        haar = haar_loss(result, truth)
        adm, vif = neg_losses(result, truth)
        loss = (
            weights.charbonnier * charbonnier(result, truth)
            + weights.squared * (result - truth).square().mean()
            + weights.haar * haar
            + weights.adm * adm
            + weights.vif * vif
            + weights.change * temporal_difference(result, truth)
            + weights.followed * followed_change(result, truth, motion)
            + weights.still * flicker(result, motion)
            + weights.decoded * reconstruction_loss(detail(2 * decoded - 1), detail(2 * truth - 1))
            + weights.edm * edm
        )
        numbers = {"psnr": psnr(result, truth), "guide": psnr(guide, truth), "edm": float(edm.detach())}
        return loss, {**numbers, "haar": float(haar.detach())}

    def _encoded(self, model: nn.Module, clip: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(guide in [0, 1], LR latents as the UNet takes them, clean latents of deviation 1) of one clip."""
        guide = self._guide(model, clip["lr"])
        lr, clean = (encoded(model, 2 * video - 1).float() for video in (guide, clip["truth"]))
        return guide, lr, clean * self._factor

    def _guide(self, model: nn.Module, lr: Tensor) -> Tensor:
        """The enlarged input `(frames, 3, 4h, 4w)` in [0, 1]."""
        return self.enlarged(lr)

    def _sampled(self, model: nn.Module, lr: Tensor, clip: Batch) -> Tensor:
        """Latents of deviation 1. Gradients go through the last step but one: the last, at sigma 0.002, adds nothing,
        and what came before is noise again by then."""
        unet, noise, levels = cast(Any, model)["unet"], clip["noise"][1:], sigmas(int(clip["steps"]))
        context = noise.new_zeros(1, 1, unet.config.cross_attention_dim)
        with torch.no_grad():
            x = euler(unet, noise * levels[0], lr[None], context, levels[:-2])
        return euler(unet, x, lr[None], context, levels[-3:-1])[0]

    def picture(self, model: nn.Module, batch: Batch) -> Tensor:
        """The middle frame of every clip: what stays without the diffusion beside what is there with it."""
        columns: dict[str, list[Tensor]] = {"DCM": [], "LR latent": [], "refined": [], "truth": []}
        for i in range(len(batch["lr"])):
            clip = {key: value[i] for key, value in batch.items()}
            guide, lr, _ = self._encoded(model, clip)
            middle = guide.shape[0] // 2
            columns["DCM"].append(guide[middle])
            columns["truth"].append(clip["truth"][middle])
            with self._beside(model, clip):
                for name, z in {"LR latent": lr * self._factor, "refined": self._sampled(model, lr, clip)}.items():
                    columns[name].append(decode_refined(model, z[None], guide[None])[1][0, middle])
        return rows_of([(name, torch.stack(frames)) for name, frames in columns.items()])

    @property
    def _upscaler(self) -> str:
        """The DCM that what is written was trained with."""
        return self.shape.dcm

    def export(self, model: nn.Module, path: Path, trained_on: str) -> None:
        weights, parts = self.base(), cast(Any, model)
        encoder = {f"encoder.{name}": value for name, value in parts["encoder"].state_dict().items()}
        state = {**weights.vae, **encoder, **decoder_state(parts["decoder"], weights)}
        # What is idle is not in the UNet.
        unet, noted = {**weights.unet, **parts["unet"].state_dict()}, upscaler_note(self._upscaler)
        write_svd(path, replace(weights, unet=unet, vae=state, metadata=noted), trained_on)
        write_refiner(beside(path), cast(Refiner, parts["refiner"]), trained_on)
