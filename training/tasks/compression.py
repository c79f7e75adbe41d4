"""The compression head: which constant rate factor of x264 a frame went through."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from training.data.degradation import h264, shrink
from training.data.folder import Folder
from training.loop.draws import integer, pick, uniform
from training.loop.recipe import Recipe, from_table
from training.loop.state import weights_of
from training.loop.task import Batch
from vsr_ops.errors import SettingError
from vsr_ops.modules.compression import (
    COARSEST,
    CompressionHead,
    HeadShape,
    load_compression,
    mean_level,
    rank_correlation,
    write_compression,
)
from vsr_ops.views.chart import Panel, draw_panels


@dataclass(frozen=True)
class CompressionModelSettings(HeadShape):
    """The head's own; `start`: a file, "lite" or a run to go on from, whose shape it takes."""

    start: str = ""


@dataclass(frozen=True)
class CompressionDataSettings:
    """Clips of `frames` frames of `size` x `size` pixels (even), made smaller by one of `scales`. Each comes in several
    `qualities`, so that its content does not tell: a `clean_share` of them stays clean, the others go through H.264 at
    any CRF from `finest` to `coarsest`. Of each, `crops` crops of `crop` x `crop` pixels (even)."""

    size: int = 96
    frames: int = 5
    scales: tuple[int, ...] = (1, 2, 4)
    finest: int = 15
    coarsest: int = 40
    clean_share: float = 0.15
    qualities: int = 4
    crop: int = 64
    crops: int = 2
    video_share: float = 0.5


@dataclass(frozen=True)
class CompressionLossSettings:
    """The smooth L1 loss is quadratic below `beta` levels."""

    beta: float = 0.04


class CompressionTask:
    """Task "compression". A sample is pictures `(qualities * crops, 3, p, p)` of one clip and the level of each."""

    def __init__(self, recipe: Recipe, data: Path, out: Path) -> None:
        self.shape = from_table(CompressionModelSettings, recipe.model, "model")
        self.data = from_table(CompressionDataSettings, recipe.data, "data")
        self.weights = from_table(CompressionLossSettings, recipe.loss, "loss")
        self._folder = Folder(data)
        check(self.shape, self.data)

    @property
    def data_summary(self) -> str:
        return self._folder.summary

    def prepare(self, device: torch.device) -> None:
        self._folder.load()

    def build(self) -> nn.Module:
        if self.shape.start:
            return load_compression(weights_of(self.shape.start)).requires_grad_(True)
        return CompressionHead(HeadShape(self.shape.widths, self.shape.blocks))

    def trains(self, name: str) -> bool:
        return True

    def sample(self, rng: torch.Generator) -> Batch:
        data = self.data
        scale = pick(rng, data.scales)
        clip = self._folder.clip(data.frames, data.size * scale, rng, data.video_share)
        clip = shrink(clip, scale)
        room = data.size - data.crop + 1
        crops: list[Tensor] = []
        levels: list[float] = []
        for _ in range(data.qualities):
            crf = draw_crf(rng, data)
            video = clip if crf is None else h264(clip, crf)
            for _ in range(data.crops):
                frame, top, left = integer(rng, data.frames), integer(rng, room), integer(rng, room)
                crops.append(video[frame, :, top : top + data.crop, left : left + data.crop])
                levels.append((crf or 0) / COARSEST)
        return {"pictures": torch.stack(crops), "level": torch.tensor(levels)}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        levels, truth = levels_of(model, batch)
        loss = F.smooth_l1_loss(levels, truth, beta=self.weights.beta)
        off = float((levels.detach() - truth).abs().mean()) * COARSEST
        return loss, {"crf_error": off, "rank": rank_correlation(levels, truth)}

    def picture(self, model: nn.Module, batch: Batch) -> Tensor:
        """CRFs of the batch's crops, told and true."""
        levels, truth = levels_of(model, batch)
        order = truth.argsort(stable=True)
        curves = {
            name: [float(value) * COARSEST for value in values[order]]
            for name, values in {"estimate": levels.detach(), "truth": truth}.items()
        }
        return draw_panels([Panel("CRF of each crop", curves)])

    def export(self, model: nn.Module, path: Path, trained_on: str) -> None:
        write_compression(path, cast(CompressionHead, model), trained_on)


def levels_of(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """(levels as the model sees them, the true ones), one a crop."""
    levels = mean_level(*model(rearrange(batch["pictures"], "b n c h w -> (b n) c h w")))
    return levels, batch["level"].float().flatten()


def draw_crf(rng: torch.Generator, data: CompressionDataSettings) -> int | None:
    """A constant rate factor, or None for a clean clip. Half of the clean ones get CRF 1: video has fewer colours than
    pictures, which is no compression."""
    if uniform(rng, 0, 1) < data.clean_share:
        return 1 if integer(rng, 2) else None
    return data.finest + integer(rng, data.coarsest - data.finest + 1)


def check(shape: CompressionModelSettings, data: CompressionDataSettings) -> None:
    """Raises SettingError."""
    if len(shape.widths) != len(shape.blocks) or min(*shape.widths, *(1 + n for n in shape.blocks)) < 1:
        raise SettingError(
            f"model.widths is {list(shape.widths)}, model.blocks {list(shape.blocks)}: expected two lists of one"
            " length, widths of at least 1"
        )
    if shape.start and asdict(shape) != asdict(CompressionModelSettings(start=shape.start)):
        raise SettingError("model.start and model.widths or blocks: expected one of them; the start has its own shape")
    if (
        data.size % 2
        or data.crop % 2
        or not 2 <= data.crop <= data.size
        or min(data.frames, data.crops, data.qualities) < 1
    ):
        raise SettingError(
            f"data.size is {data.size}, data.crop {data.crop}, data.frames {data.frames}, data.crops {data.crops},"
            f" data.qualities {data.qualities}: expected an even crop of at most the even size, and at least one frame,"
            " crop and quality"
        )
    if min(data.scales) < 1 or not 0 <= data.finest <= data.coarsest <= COARSEST:
        raise SettingError(
            f"data.scales is {list(data.scales)}, data.finest {data.finest}, data.coarsest {data.coarsest}: expected"
            f" whole numbers of at least 1, and 0 <= finest <= coarsest <= {COARSEST}"
        )
