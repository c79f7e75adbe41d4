"""Trains CFW, STAM, CAPM or SATeCo beside a VAE's decoder, on latents that the trained SVD samples.

SVD, decoder and refiner are frozen. The loss is of the decoded clip and of the refined one, which is what is seen.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from training.data.folder import Folder
from training.loop.curve import rows_of
from training.loop.draws import generator_at, uniform
from training.loop.recipe import Recipe, from_table
from training.loop.state import REFINER, weights_of
from training.loop.task import Batch
from training.losses.losses import Motion, charbonnier, flicker, followed_change, motion_of, psnr, temporal_difference
from training.losses.perceptual import haar_loss, neg_losses
from training.tasks.decoder_module_kinds import SDATC, Module, nothing_further
from training.tasks.refiner import decode_refined, decoder_of
from training.tasks.sampled import CompressedLatents, CompressedSettings
from training.tasks.sateco_vae import SATECO
from training.tasks.svd import read_start
from training.tasks.vae import detail, reconstruction_loss
from vsr_ops.backbones.svd import build_svd
from vsr_ops.checkpoints.svd import SVDWeights
from vsr_ops.errors import SettingError
from vsr_ops.modules.refiner import load_refiner

MODULES: dict[str, Module] = {**SDATC, "sateco": SATECO}
"""What can stand beside a decoder, by name."""


@dataclass(frozen=True)
class DecoderModuleLossSettings:
    """Weights, of the refined clip: Charbonnier's and the squared error, 1 - HaarPSI, 1 - ADM and 1 - VIF (VMAF-NEG's
    features), the change of the error from frame to frame (`change`) and along the motion (`followed`), flicker where
    nothing moves (`still`). The same of the decoded clip, but for VMAF-NEG's, counts `decoded` times; `detail` weighs
    the reconstruction loss of its detail alone, where the rest comes from the guide.

    CFW's w is drawn from `w` (lowest, highest); CAPM is not told the level of a share of samples (`untold`), and
    `agree` weighs how far what it reads in features lies from what it would have been told.
    """

    charbonnier: float = 2.0
    squared: float = 20.0
    haar: float = 0.3
    adm: float = 0.0
    vif: float = 0.0
    change: float = 1.0
    followed: float = 0.1
    still: float = 4.0
    decoded: float = 0.0
    detail: float = 0.15
    w: tuple[float, ...] = (0.75, 0.75)
    untold: float = 0.5
    agree: float = 0.1


class Unrefined(nn.Module):
    """In a refiner's place: the decoded clip is the result."""

    def refined(self, decoded: Tensor, upscaled: Tensor) -> Tensor:
        return decoded


class DecoderModuleTask:
    """Task "decoder". A sample is what CompressedLatents draws, `w` for CFW, and the hint for CAPM (NaN: not told)."""

    def __init__(self, recipe: Recipe, data: Path, out: Path) -> None:
        name = recipe.model.get("module")
        if name not in MODULES:
            raise SettingError(f"model.module is {name!r}: expected one of {', '.join(MODULES)}")
        self.kind = str(name)
        self.shape = from_table(MODULES[self.kind].settings, recipe.model, "model")
        self.weights = from_table(DecoderModuleLossSettings, recipe.loss, "loss")
        if not self.shape.start:
            raise SettingError("model.start is empty: expected the SVD that stays as it is (--set model.start=lite)")
        w = self.weights.w
        if len(w) != 2 or not 0 < w[0] <= w[1] <= 1:
            raise SettingError(f"loss.w is {list(w)}: expected the lowest and the highest w, above 0 and at most 1")
        settings = from_table(CompressedSettings, recipe.data, "data")
        if settings.crop_frames < 2:
            raise SettingError(f"data.crop_frames is {settings.crop_frames}: expected at least two frames")
        folder = Path(settings.latents) if settings.latents else out / "latents"
        self._folder = Folder(data)
        self._latents = CompressedLatents(folder, settings, recipe.train.precision)
        self._held_out: dict[str, Batch] = {}
        self._first: Batch | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the held-out clips: processes that draw samples need none."""
        return {**self.__dict__, "_held_out": {}}

    @property
    def data_summary(self) -> str:
        return self._latents.summary

    def prepare(self, device: torch.device) -> None:
        svd = build_svd(self.base(), device, torch.float32)
        self._latents.render(self._folder, svd)
        self._held_out = self._latents.held_out(self._folder.path, svd)
        self._first = self.sample(generator_at(0, -1))

    def base(self) -> SVDWeights:
        """The SVD, float32."""
        return read_start(self.shape.start)

    def build(self) -> nn.Module:
        weights = self.base()
        encoder = cast(Any, build_svd(weights, torch.device("cpu"), torch.float32).vae).encoder
        name = self.shape.refiner
        refiner = load_refiner(weights_of(name, REFINER)) if name else Unrefined()
        parts = nn.ModuleDict({"encoder": encoder, "decoder": decoder_of(weights), "refiner": refiner})
        parts["beside"] = MODULES[self.kind].build(self.shape, parts)
        if self._first is not None:
            MODULES[self.kind].settle(parts, self._first)
        return parts

    def trains(self, name: str) -> bool:
        return name.startswith("beside.")

    def sample(self, rng: torch.Generator) -> Batch:
        clip, weights = self._latents.draw(rng), self.weights
        w = torch.tensor(uniform(rng, *weights.w))
        told = uniform(rng, 0, 1) >= weights.untold
        return {**clip, "w": w, "hint": clip["level"] if told else torch.full_like(clip["level"], torch.nan)}

    def decoded(self, model: nn.Module, clip: Batch, module: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """(decoded, refined, what else to lower) of one clip `(frames, 3, h, w)`, with the module or without it."""
        chosen = MODULES[self.kind].beside(model, clip) if module else nullcontext(nothing_further)
        with chosen as further:
            decoded, refined = decode_refined(model, clip["z"][None], clip["guide"][None])
            return decoded, refined[0], further()

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Clip by clip, as frames see their neighbours."""
        values = [self._loss_of(model, clip) for clip in clips_of(batch)]
        numbers = {key: sum(each[key] for _, each in values) / len(values) for key in values[0][1]}
        return torch.stack([value for value, _ in values]).mean(), numbers

    def _loss_of(self, model: nn.Module, clip: Batch) -> tuple[Tensor, dict[str, float]]:
        weights, truth = self.weights, clip["truth"]
        motion = motion_of(truth)
        decoded, refined, apart = self.decoded(model, clip)
        loss = self._video_loss(refined, truth, motion)
        if weights.decoded:
            loss = loss + weights.decoded * self._video_loss(decoded, truth, motion)
        if weights.detail:
            loss = loss + weights.detail * reconstruction_loss(detail(2 * decoded - 1), detail(2 * truth - 1))
        if weights.adm or weights.vif:
            adm, vif = neg_losses(refined, truth)
            loss = loss + weights.adm * adm + weights.vif * vif
        numbers = {"psnr": psnr(refined, truth), "decoded": psnr(decoded, truth), "guide": psnr(clip["guide"], truth)}
        return loss + weights.agree * apart, {**numbers, "agree": float(apart.detach())}

    def _video_loss(self, result: Tensor, truth: Tensor, motion: Motion) -> Tensor:
        weights = self.weights
        return (
            weights.charbonnier * charbonnier(result, truth)
            + weights.squared * (result - truth).square().mean()
            + weights.haar * haar_loss(result, truth)
            + weights.change * temporal_difference(result, truth)
            + weights.followed * followed_change(result, truth, motion)
            + weights.still * flicker(result, motion)
        )

    def picture(self, model: nn.Module, batch: Batch) -> Tensor:
        """The middle frame of every clip. Prints what the module changes on held-out clips."""
        for line in self.compared(model):
            print(line, flush=True)
        columns: dict[str, list[Tensor]] = {
            name: [] for name in ("DCM", "decoded", f"decoded, {self.kind}", f"refined, {self.kind}", "truth")
        }
        for clip in clips_of(batch):
            with_it = self.decoded(model, clip)
            videos = (clip["guide"], self.decoded(model, clip, module=False)[0], *with_it[:2], clip["truth"])
            for frames, video in zip(columns.values(), videos, strict=True):
                frames.append(video[video.shape[0] // 2])
        return rows_of([(name, torch.stack(frames)) for name, frames in columns.items()])

    def compared(self, model: nn.Module) -> list[str]:
        """A line for each CRF and way, without the module first: means over held-out clips, decoded and refined, PSNR
        (dB) and the change of the error along the motion (`followed_change`)."""
        found: dict[tuple[str, str], list[Tensor]] = {}
        device = next(model.parameters()).device
        for name, stored in self._held_out.items():
            clip = {key: value.to(device) for key, value in stored.items()}
            clip |= {key: clip[key][..., :side, :side] for key, side in (("z", 16), ("guide", 128), ("truth", 128))}
            clip |= {"w": clip["level"].new_tensor(self.weights.w[1]), "hint": clip["level"]}
            motion = motion_of(clip["truth"])
            for way, changes in {"without": None, **MODULES[self.kind].shown}.items():
                tried = {**clip, **{key: clip[key].new_tensor(value) for key, value in (changes or {}).items()}}
                videos = self.decoded(model, tried, module=changes is not None)[:2]
                scores = [(psnr(v, clip["truth"]), float(followed_change(v, clip["truth"], motion))) for v in videos]
                found.setdefault((name.rpartition(", ")[2], way), []).append(torch.tensor(scores))
        lines: list[str] = []
        for (crf, way), scores in found.items():
            (decoded, before), (refined, after) = torch.stack(scores).mean(0).tolist()
            lines.append(
                f"held out, {crf}, {way}: decoded {decoded:.3f} dB, change {before:.4f};"
                f" refined {refined:.3f} dB, change {after:.4f}"
            )
        return lines

    def export(self, model: nn.Module, path: Path, trained_on: str) -> None:
        MODULES[self.kind].write(path, self.shape, cast(Any, model).beside, trained_on)


def clips_of(batch: Batch) -> list[Batch]:
    """A batch's samples apart."""
    return [{key: value[index] for key, value in batch.items()} for index in range(len(batch["z"]))]
