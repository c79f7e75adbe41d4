"""The video upscaler, SATeCo's first part: what neighbouring frames add to a DCM's picture."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn

from training.data.folder import Folder, check_degradation, degraded
from training.data.patches import SCALE
from training.loop.curve import rows_of
from training.loop.draws import integer
from training.loop.recipe import Recipe, from_table
from training.loop.state import upscaler_note, weights_of
from training.loop.task import Batch
from training.losses.losses import charbonnier, flicker, motion_of, psnr, temporal_difference
from training.tasks.enlarging import Enlarging
from vsr_ops.errors import SettingError
from vsr_ops.modules.motion_pairs import Pairs
from vsr_ops.modules.video_upscaler import (
    VideoUpscaler,
    VideoUpscalerShape,
    load_video_upscaler,
    write_video_upscaler,
)


@dataclass(frozen=True)
class VideoUpscalerModelSettings(VideoUpscalerShape):
    """The network's own; `dcm`: the file or run below it ("lite": the bundled one), which does not learn; `start`: a
    file, "lite" or a run to go on from, whose shape it takes."""

    dcm: str = "lite"
    start: str = ""


@dataclass(frozen=True)
class VideoUpscalerDataSettings:
    """Clips of `frames` frames of `size` x `size` pixels (a multiple of 4), degraded in a way of DEGRADATIONS but for a
    `clean_share`; a `video_share` of them are out of videos."""

    size: int = 192
    frames: int = 7
    degradation: str = "lite"
    clean_share: float = 0.4
    video_share: float = 0.7


@dataclass(frozen=True)
class VideoUpscalerLossSettings:
    """Weights of the Charbonnier loss of `epsilon`, of the change from frame to frame, and of flicker where nothing
    moves (`still`)."""

    charbonnier: float = 1.0
    change: float = 0.5
    still: float = 0.0
    epsilon: float = 1e-3


class VideoUpscalerTask(Enlarging):
    """Task "video_upscaler". A sample is a clip, lr `(t, 3, p, p)` and truth `(t, 3, 4p, 4p)` in [0, 1], and its flow
    there and back between neighbours `(t - 1, 2, p, p)`. Played backwards half the time."""

    def __init__(self, recipe: Recipe, data: Path, out: Path) -> None:
        self.shape = from_table(VideoUpscalerModelSettings, recipe.model, "model")
        self.data = from_table(VideoUpscalerDataSettings, recipe.data, "data")
        self.weights = from_table(VideoUpscalerLossSettings, recipe.loss, "loss")
        check_degradation(self.data.degradation)
        if self.data.size % (2 * SCALE) or self.data.frames < 2:
            raise SettingError(
                f"data.size is {self.data.size}, data.frames {self.data.frames}: expected a multiple of {2 * SCALE}"
                " pixels, and at least two frames"
            )
        fresh = VideoUpscalerModelSettings(dcm=self.shape.dcm, start=self.shape.start)
        if self.shape.start and asdict(self.shape) != asdict(fresh):
            raise SettingError("model.start and another shape: expected one of them; the start has its own shape")
        super().__init__(Folder(data), self.shape.dcm)

    def build(self) -> nn.Module:
        if self.shape.start:
            return load_video_upscaler(weights_of(self.shape.start)).requires_grad_(True)
        own = {field.name: getattr(self.shape, field.name) for field in fields(VideoUpscalerShape)}
        return VideoUpscaler(VideoUpscalerShape(**own))

    def trains(self, name: str) -> bool:
        return True

    def sample(self, rng: torch.Generator) -> Batch:
        data = self.data
        truth = self._folder.clip(data.frames, data.size, rng, data.video_share)
        lr = degraded(data.degradation, truth, rng, SCALE, data.clean_share)
        if integer(rng, 2):
            lr, truth = lr.flip(0), truth.flip(0)
        pairs = Pairs.of(lr[:-1], lr[1:])
        return {"lr": lr, "truth": truth, "forward": pairs.forward, "backward": pairs.backward}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        guide, result = self._enlarged(model, batch)
        truth, weights = batch["truth"], self.weights
        loss = weights.charbonnier * charbonnier(result, truth, weights.epsilon)
        loss = loss + weights.change * temporal_difference(result, truth)
        if weights.still:
            each = [flicker(clip, motion_of(true)) for clip, true in zip(result, truth, strict=True)]
            loss = loss + weights.still * torch.stack(each).mean()
        return loss, {"psnr": psnr(_flat(result), _flat(truth)), "guide": psnr(_flat(guide), _flat(truth))}

    def picture(self, model: nn.Module, batch: Batch) -> Tensor:
        """The middle frame of every clip."""
        guide, result = self._enlarged(model, batch)
        middle = result.shape[1] // 2
        columns = {"DCM": guide, "video": result, "truth": batch["truth"]}
        return rows_of([(name, clips[:, middle].float()) for name, clips in columns.items()])

    def export(self, model: nn.Module, path: Path, trained_on: str) -> None:
        write_video_upscaler(path, cast(VideoUpscaler, model), trained_on, upscaler_note(self.shape.dcm))

    def _enlarged(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """(the DCM's clips, and those with what the model adds), `(b, t, 3, 4p, 4p)`, not clamped."""
        lr = batch["lr"]
        with torch.no_grad():
            guide = rearrange(self.enlarged(_flat(lr)).float(), "(b t) c h w -> b t c h w", t=lr.shape[1])
            pairs = Pairs.along(_flat(batch["forward"]).float(), _flat(batch["backward"]).float())
        return guide, guide + model(lr, guide, pairs).float()


def _flat(clips: Tensor) -> Tensor:
    return rearrange(clips, "b t c h w -> (b t) c h w")
