"""Temporal decoder and refiner together, on the latents that the trained SVD samples: they learn to live with its
mistakes, which no VAE's training shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import AutoencoderKLTemporalDecoder
from einops import rearrange
from torch import Tensor, nn

from training.data.folder import Folder
from training.loop.curve import rows_of
from training.loop.recipe import Recipe, from_table
from training.loop.state import REFINER, upscaler_note, weights_of
from training.loop.task import Batch
from training.losses.losses import charbonnier, flicker, information, motion_of, psnr, temporal_difference
from training.losses.perceptual import haar_loss, neg_loss
from training.tasks.sampled import SampledLatents, SampledSettings
from training.tasks.svd import read_start
from training.tasks.vae import detail, flat, reconstruction_loss
from training.tasks.vae_refined import beside
from vsr_ops.backbones.svd import build_svd
from vsr_ops.checkpoints.svd import SVDWeights, write_svd
from vsr_ops.errors import SettingError
from vsr_ops.modules.idle import leave_out_idle
from vsr_ops.modules.refiner import Refiner, RefinerShape, load_refiner, write_refiner

CONV_IN = "conv_in.weight"


@dataclass(frozen=True)
class RefinerModelSettings:
    """`start`: the SVD whose decoder learns, a file or folder, "lite", or a run. `refiner`: the one to go on from, a
    file, "lite", or the run of vae_refined or of this task; empty: a new one of `form`, and of SATeCo's ("paper") with
    its `w0`. For speed, `idle` names layers of the VAE that become zero, so that the blocks which end with them add
    nothing, and `blocks` cuts the refiner to so many (0: as it is). `learns` names the parts that learn, by the
    beginnings of their weights' names; empty: all."""

    start: str = ""
    refiner: str = ""
    form: str = RefinerShape.form
    w0: float = RefinerShape.w0
    idle: tuple[str, ...] = ()
    blocks: int = 0
    learns: tuple[str, ...] = ()


@dataclass(frozen=True)
class RefinerLossSettings:
    """Weights. Charbonnier's and the squared error, 1 - HaarPSI, the information lost, what VMAF-NEG's features lack
    (`neg`), the change from frame to frame, flicker where nothing moves (`still`), and Charbonnier's distance to what
    decoder and refiner gave before (`taught`); of the decoded one its detail's reconstruction loss. All but that are of
    the refined video."""

    charbonnier: float = 2.0
    squared: float = 20.0
    haar: float = 0.2
    information: float = 0.2
    neg: float = 0.0
    change: float = 0.5
    still: float = 0.0
    taught: float = 0.0
    decoded: float = 0.15


class RefinerTask:
    """Task "refiner". A sample is what SampledLatents draws. The file is the SVD with its new decoder; the refiner's
    lies beside it."""

    def __init__(self, recipe: Recipe, data: Path, out: Path) -> None:
        self.shape = from_table(RefinerModelSettings, recipe.model, "model")
        self.weights = from_table(RefinerLossSettings, recipe.loss, "loss")
        if not self.shape.start:
            raise SettingError("model.start is empty: expected the SVD to sample with (--set model.start=runs/svd)")
        settings = from_table(SampledSettings, recipe.data, "data")
        folder = Path(settings.latents) if settings.latents else out / "latents"
        self._folder, self._latents = Folder(data), SampledLatents(folder, settings, recipe.train.precision)

    @property
    def data_summary(self) -> str:
        return self._latents.summary

    def prepare(self, device: torch.device) -> None:
        self._latents.render(self._folder, build_svd(self.base(), device, torch.float32))

    def base(self) -> SVDWeights:
        """The SVD before this training, float32."""
        return silenced(read_start(self.shape.start), self.shape.idle)

    def build(self) -> nn.Module:
        weights = self.base()
        decoder = decoder_of(weights)
        if self.shape.idle:
            leave_out_idle(decoder)
        name = self.shape.refiner
        fresh = RefinerShape(form=self.shape.form, w0=self.shape.w0)
        refiner = load_refiner(weights_of(name, REFINER)) if name else Refiner(fresh)
        refiner = shortened(refiner, self.shape.blocks) if self.shape.blocks else refiner
        return nn.ModuleDict({"decoder": decoder, "refiner": refiner.requires_grad_(True)})

    def trains(self, name: str) -> bool:
        return not self.shape.learns or name.startswith(tuple(self.shape.learns))

    def sample(self, rng: torch.Generator) -> Batch:
        return self._latents.draw(rng)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        weights, clips = self.weights, batch["truth"]
        decoded, refined = decode_refined(model, batch["z"], batch["guide"])
        truth, result = flat(clips), flat(refined)
        haar = haar_loss(result, truth)
        loss = (
            weights.charbonnier * charbonnier(result, truth)
            + weights.squared * (result - truth).square().mean()
            + weights.haar * haar
            + weights.information * information(result, truth)
            + weights.change * temporal_difference(refined, clips)
            + weights.decoded * reconstruction_loss(detail(2 * decoded - 1), detail(2 * truth - 1))
        )
        if weights.still:
            each = [flicker(result, motion_of(clip)) for result, clip in zip(refined, clips, strict=True)]
            loss = loss + weights.still * torch.stack(each).mean()
        if weights.taught:
            loss = loss + weights.taught * charbonnier(result, flat(self._before(batch)))
        if weights.neg:
            loss = loss + weights.neg * neg_loss(result, truth)
        guide = psnr(flat(batch["guide"]), truth)
        return loss, {"psnr": psnr(result, truth), "guide": guide, "haar": float(haar.detach())}

    @cached_property
    def _teacher(self) -> nn.Module:
        """Decoder and refiner as they were before this training."""
        refiner = load_refiner(weights_of(self.shape.refiner, REFINER))
        return nn.ModuleDict({"decoder": decoder_of(read_start(self.shape.start)), "refiner": refiner}).eval()

    @torch.no_grad()
    def _before(self, batch: Batch) -> Tensor:
        return decode_refined(self._teacher.to(batch["z"].device), batch["z"], batch["guide"])[1]

    def picture(self, model: nn.Module, batch: Batch) -> Tensor:
        """The middle frame of every clip."""
        decoded, refined = decode_refined(model, batch["z"], batch["guide"])
        decoded = rearrange(decoded, "(b t) c h w -> b t c h w", b=refined.shape[0])
        columns = {"DCM": batch["guide"], "decoded": decoded, "refined": refined, "truth": batch["truth"]}
        return rows_of([(name, clips[:, clips.shape[1] // 2]) for name, clips in columns.items()])

    def export(self, model: nn.Module, path: Path, trained_on: str) -> None:
        weights = self.base()
        vae = {**weights.vae, **decoder_state(cast(Any, model)["decoder"], weights)}
        noted = upscaler_note(self._latents.settings.upscaler)
        write_svd(path, replace(weights, vae=vae, metadata=noted), trained_on)
        write_refiner(beside(path), cast(Refiner, cast(Any, model)["refiner"]), trained_on)


def decoder_of(weights: SVDWeights) -> nn.Module:
    """The temporal decoder; takes latents of deviation 1.

    The factor in its first weights would make AdamW's steps, the same for all, too long for these.
    """
    decoder = AutoencoderKLTemporalDecoder(**weights.vae_config).decoder
    state = {name.removeprefix("decoder."): value for name, value in weights.vae.items() if name[:8] == "decoder."}
    decoder.load_state_dict({**state, CONV_IN: state[CONV_IN] / factor_of(weights)})
    return decoder


def decoder_state(decoder: nn.Module, weights: SVDWeights) -> dict[str, Tensor]:
    """The way back from `decoder_of`: its weights as the VAE of `weights` holds them, and by their names there."""
    factor = factor_of(weights)
    state = decoder.state_dict()
    return {f"decoder.{name}": value * factor if name == CONV_IN else value for name, value in state.items()}


def silenced(weights: SVDWeights, layers: Sequence[str]) -> SVDWeights:
    """The same SVD with these layers of its VAE at zero. Raises SettingError for one that is not there."""
    for layer in layers:
        if f"{layer}.weight" not in weights.vae:
            raise SettingError(
                f"model.idle has {layer}, which the VAE has not: expected names such as"
                " decoder.up_blocks.3.resnets.1.spatial_res_block.conv2"
            )
    zeros = {name: torch.zeros_like(value) for name, value in weights.vae.items() if name.rpartition(".")[0] in layers}
    return replace(weights, vae={**weights.vae, **zeros})


def shortened(refiner: Refiner, blocks: int) -> Refiner:
    """The same refiner without its last blocks. Raises SettingError for fewer than its mixes, or more than it has."""
    old = refiner.shape
    if not old.mixes <= blocks <= old.blocks:
        raise SettingError(
            f"model.blocks is {blocks}: expected from {old.mixes} (its mixes) to {old.blocks} (its blocks)"
        )
    shorter = Refiner(replace(old, blocks=blocks))
    state = refiner.state_dict()
    shorter.load_state_dict({name: state[name] for name in shorter.state_dict()})
    return shorter


def grown(refiner: Refiner, shape: RefinerShape) -> Refiner:
    """The same refiner with more blocks or mixes, or neighbours, which change nothing yet. Raises SettingError."""
    old = refiner.shape
    kept = (
        (shape.width, shape.form, shape.w0) == (old.width, old.form, old.w0)
        and shape.blocks >= old.blocks
        and shape.follows >= old.follows
    )
    if not (kept and old.mixes <= shape.mixes <= shape.blocks):
        raise SettingError(
            f"the refiner would grow from {old} to {shape}: expected the same width, nothing less than it has, and no"
            " more mixes than blocks; set model.blocks, model.mixes and model.follows so"
        )
    larger = Refiner(shape)
    for block in larger.body[old.blocks :]:
        for value in cast(Any, block).conv2.parameters():
            nn.init.zeros_(value)
    state = refiner.state_dict()
    enter = torch.zeros_like(larger.enter.weight)
    enter[:, : state["enter.weight"].shape[1]] = state["enter.weight"]
    larger.load_state_dict({**larger.state_dict(), **state, "enter.weight": enter})
    return larger


def factor_of(weights: SVDWeights) -> float:
    """What brings the VAE's latents to deviation 1."""
    return float(weights.vae_config["scaling_factor"])


def decode_refined(model: nn.Module, z: Tensor, guide: Tensor) -> tuple[Tensor, Tensor]:
    """(decoded `(clips * frames, 3, h, w)`, refined `(clips, frames, 3, h, w)`) of latents of deviation 1 `(clips,
    frames, 4, h/8, w/8)` and the guide; pictures in [0, 1], not clamped."""
    parts, (clips, frames) = cast(Any, model), z.shape[:2]
    indicator = torch.zeros(clips, frames, device=z.device)
    decoded = parts["decoder"](flat(z), indicator, num_frames=frames).float() / 2 + 0.5
    # A frame sees its neighbours: clip by clip.
    pairs = zip(rearrange(decoded, "(b t) c h w -> b t c h w", b=clips), guide, strict=True)
    refined = torch.stack([parts["refiner"].refined(frame, upscaled).float() for frame, upscaled in pairs])
    return decoded, refined
