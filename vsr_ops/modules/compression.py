"""How hard a video was compressed, frame by frame, as a small network sees it.

A compression level is x264's constant rate factor on a scale of 0 (clean) to 1 (CRF 51, the coarsest).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from ..checkpoints.module_file import fill, read_module, write_module
from ..errors import CheckpointError, SettingError
from ..weights import bundled
from .blocks import ResidualBlock

KIND = "compression"
#: The weights that come with the pack.
LITE_COMPRESSION = bundled("compression_lite")
#: The CRF that level 1 stands for.
COARSEST = 51
#: Pixels a side of the crops of a frame, and the most of them along a side. Nothing is resized: that hides compression.
CROP, CROPS = 96, 3
#: Channels that the head looks at.
SEEN = 9


@dataclass(frozen=True)
class HeadShape:
    """Channels at a half, a quarter and an eighth of the picture's resolution, and residual blocks at each."""

    widths: tuple[int, ...] = (32, 48, 64)
    blocks: tuple[int, ...] = (2, 2, 1)


class CompressionHead(nn.Module):
    """Sees a level, and how sure it is of it, at every place of a picture: skies show little of a codec, edges much."""

    def __init__(self, shape: HeadShape | None = None) -> None:
        super().__init__()
        self.shape = shape or HeadShape()
        layers: list[nn.Module] = []
        before = 4 * SEEN
        for index, (width, blocks) in enumerate(zip(self.shape.widths, self.shape.blocks, strict=True)):
            layers += [nn.Conv2d(before, width, 3, stride=2 if index else 1, padding=1), nn.ReLU()]
            layers += [ResidualBlock(width) for _ in range(blocks)]
            before = width
        self.body = nn.Sequential(*layers)
        self.leave = nn.Conv2d(before, 2, 1)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures `(n, 3, h, w)` RGB in [0, 1], h and w even, to (levels, their log confidence) `(n, places)`."""
        folded = rearrange(seen(pictures), "n c (h i) (w j) -> n (c i j) h w", i=2, j=2)
        level, confidence = rearrange(self.leave(self.body(folded)), "n k h w -> k n (h w)")
        return level, confidence


def seen(pictures: Tensor) -> Tensor:
    """What the head looks at `(n, 9, h, w)`: colours, and their change to the right and downwards on a logarithmic
    scale, on which what a codec took away (changes of a level or none) is as large as the edges that it kept."""
    right = nn.functional.pad(pictures.diff(dim=-1), (0, 1))
    down = nn.functional.pad(pictures.diff(dim=-2), (0, 0, 0, 1))
    changes = torch.cat([right, down], 1)
    return torch.cat([4 * (pictures - 0.5), changes.sign() * (255 * changes.abs()).log1p() / 3], 1)


def mean_level(level: Tensor, confidence: Tensor) -> Tensor:
    """The mean over the last axis of `level`, each place as its log `confidence` says; float32."""
    return (level.float() * confidence.float().softmax(-1)).sum(-1)


def crops(frame: Tensor) -> Tensor:
    """The crops `(n, 3, s, t)` of a frame `(3, h, w)` that are looked at: at most CROPS x CROPS of CROP pixels a side,
    spread evenly, on x264's grid of 16 pixels. A smaller frame is one crop; an odd side's last line is repeated."""
    height, width = frame.shape[-2:]
    parts = [frame[:, top : top + CROP, left : left + CROP] for top in _starts(height) for left in _starts(width)]
    pad = (0, parts[0].shape[-1] % 2, 0, parts[0].shape[-2] % 2)
    return nn.functional.pad(torch.stack(parts), pad, mode="replicate")


@torch.no_grad()
def estimate_levels(model: CompressionHead, frames: Iterable[Tensor]) -> Iterator[float]:
    """The compression level in [0, 1] of each frame `(3, h, w)` RGB in [0, 1], one by one."""
    like = next(model.parameters())
    for frame in frames:
        level, confidence = model(crops(frame).to(like))
        yield float(mean_level(level.flatten(), confidence.flatten()).clamp(0, 1))


def estimate_compression(
    model: CompressionHead, video: Tensor, tick: Callable[[int], None] = lambda done: None
) -> Tensor:
    """Compression levels `(frames,)` float32 in [0, 1] of a video `(frames, 3, h, w)` RGB in [0, 1] of any size.

    `tick` is told of every frame done. Raises SettingError for a video without frames.
    """
    if video.ndim != 4 or not video.numel():
        raise SettingError(
            f"the video has the shape {tuple(video.shape)}: expected (frames, 3, height, width) with at least one"
            " frame; check its source"
        )
    levels = torch.empty(video.shape[0])
    for index, level in enumerate(estimate_levels(model, video)):
        levels[index] = level
        tick(1)
    return levels


def level_of(crf: float) -> float:
    """The compression level of a constant rate factor. Raises SettingError for one outside [0, 51]."""
    if not 0 <= crf <= COARSEST:
        raise SettingError(f"crf is {crf}: expected a constant rate factor of x264, 0 (clean) to {COARSEST}")
    return crf / COARSEST


def levels_or_given(
    path: Path | str, video: Tensor, crf: float = -1, tick: Callable[[int], None] = lambda done: None
) -> Tensor:
    """`estimate_compression` by the head at `path`; for a `crf` from 0 on its level for every frame, unseen."""
    if crf < 0:
        return estimate_compression(load_compression(path), video, tick)
    return torch.full((video.shape[0],), level_of(crf))


def mean_crf(levels: Tensor) -> float:
    """The mean of compression levels `(frames,)`, as a constant rate factor."""
    return float(levels.mean()) * COARSEST


def describe_levels(levels: Tensor) -> str:
    """Compression levels `(frames,)` in one line, as constant rate factors."""
    low, high = (float(level) * COARSEST for level in levels.aminmax())
    return f"CRF {mean_crf(levels):.1f} on average, {low:.1f} to {high:.1f}, over {len(levels)} frames"


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's, of two lists of numbers `(n,)`; equal ones share their rank. 0 where one of them is constant."""
    ranks = [_ranks(values.detach().cpu().double()) for values in (first, second)]
    a, b = (rank - rank.mean() for rank in ranks)
    size = math.sqrt(float(a.square().sum() * b.square().sum()))
    return float((a * b).sum()) / size if size else 0.0


def load_compression(path: Path | str = "lite", device: torch.device | str = "cpu") -> CompressionHead:
    """The head at `path` ("lite": the bundled one), in float32: it is small. Raises CheckpointError."""
    file = LITE_COMPRESSION if str(path) == "lite" else Path(path)
    stored = read_module(file, KIND)
    try:
        shape = {key: tuple(value) for key, value in stored.config.items()}
        model = CompressionHead(HeadShape(**shape))
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{file}: its configuration {stored.config} is no compression head's; get it again"
        ) from error
    fill(file, model, KIND, stored.tensors)
    return model.to(device).eval().requires_grad_(False)


def write_compression(path: Path, model: CompressionHead, trained_on: str) -> None:
    """Writes `model` as a file that `load_compression` reads, float16. Raises CheckpointError."""
    write_module(path, KIND, asdict(model.shape), model.state_dict(), trained_on)


def _starts(extent: int) -> list[int]:
    """Where crops begin along one axis: multiples of 16, from one end to next to the other."""
    room = max(extent - CROP, 0)
    count = min(CROPS, 1 + -(-room // CROP))
    return sorted({room * index // max(count - 1, 1) // 16 * 16 for index in range(count)})


def _ranks(values: Tensor) -> Tensor:
    below, equal = values[:, None] > values, values[:, None] == values
    return below.sum(1) + equal.sum(1) / 2
