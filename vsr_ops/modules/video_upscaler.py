"""An upscaler that sees time, on top of any that sees one picture: what neighbouring frames show is brought along the
optical flow, and a correction of the enlarged video is made of it.

SATeCo's upscaler attends to windows of neighbouring frames; this one exchanges features with the frames before and
after, several times, so that after n exchanges a frame has heard of n on each side. Both directions are alike: a clip
played backwards gives the result played backwards.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..checkpoints.module_file import fill, read_module, write_module
from ..checkpoints.safefile import UPSCALER_KEY, stored
from ..errors import CheckpointError, SettingError
from ..flow.raft import Estimator
from ..flow.warp import SMALLEST, dis_flow, visibility, warp
from ..weights import bundled
from .blocks import ResidualBlock

KIND = "video_upscaler"
#: The weights that come with the pack, trained on the bundled DCM's pictures.
LITE_VIDEO_UPSCALER = bundled("video_upscaler_lite")
SCALE = 4
#: The slope of what is heard below zero, and what the enlarged picture's detail is multiplied by on its way in.
SLOPE, DETAIL = 0.1, 4.0


@dataclass(frozen=True)
class VideoUpscalerShape:
    """`width` channels, `stages` exchanges with both neighbours, each followed by `blocks` residual blocks."""

    width: int = 48
    stages: int = 4
    blocks: int = 2


class Pairs(NamedTuple):
    """Between each frame and the next: the flow there and back `(n, 2, h, w)` in LR pixels, and what of the first the
    second shows and the other way round `(n, 1, h, w)`, 1 or 0."""

    forward: Tensor
    backward: Tensor
    seen_after: Tensor
    seen_before: Tensor

    @classmethod
    def of(cls, now: Tensor, after: Tensor, estimate: Estimator = dis_flow) -> Pairs:
        """Of frames `(n, 3, h, w)` in [0, 1] and those after them. Frames too small for a flow stand still."""
        if min(now.shape[-2:]) < SMALLEST:
            still = now.new_zeros(len(now), 2, *now.shape[-2:])
            return cls.along(still, still)
        return cls.along(*estimate(torch.cat([now, after]), torch.cat([after, now])).chunk(2))

    @classmethod
    def along(cls, forward: Tensor, backward: Tensor) -> Pairs:
        """Of the flow alone."""
        return cls(forward, backward, visibility(forward, backward), visibility(backward, forward))


def _clips(x: Tensor, frames: int) -> Tensor:
    """Frames `(n, ...)` of clips one after the other as `(clips, frames, ...)`."""
    return rearrange(x, "(b t) c h w -> b t c h w", t=frames)


class Exchange(nn.Module):
    """Every frame hears what its two neighbours hold where the flow leads."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.own = nn.Conv2d(width, width, 3, padding=1)
        self.other = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.visible = nn.Parameter(torch.zeros(width, 1, 1))
        self.body = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))

    def heard(self, own: Tensor, other: Tensor, flow: Tensor, seen: Tensor) -> Tensor:
        """What frames `own` hear of the neighbours `other`, to which `flow` leads, where `seen` there or not."""
        return F.leaky_relu(own + warp(other, flow) + self.visible * seen.to(own.dtype), SLOPE)

    def forward(self, x: Tensor, pairs: Pairs) -> Tensor:
        """Features `(clips, frames, c, h, w)` of whole scenes; the `pairs` of all clips, one after the other."""
        flat, frames = x.flatten(0, 1), x.shape[1]
        if frames > 1:
            own, other = (_clips(conv(flat), frames) for conv in (self.own, self.other))
            forward, backward, seen_after, seen_before = pairs
            of_after = self.heard(own[:, :-1].flatten(0, 1), other[:, 1:].flatten(0, 1), forward, seen_after)
            of_before = self.heard(own[:, 1:].flatten(0, 1), other[:, :-1].flatten(0, 1), backward, seen_before)
            nothing = torch.zeros_like(x[:, :1])
            sides = [_clips(each, frames - 1) for each in (of_before, of_after)]
            flat = flat + (torch.cat([nothing, sides[0]], 1) + torch.cat([sides[1], nothing], 1)).flatten(0, 1)
        return _clips(self.body(flat), frames)


class VideoUpscaler(nn.Module):
    """What is added to a video enlarged four times; nothing at its start."""

    def __init__(self, shape: VideoUpscalerShape | None = None) -> None:
        super().__init__()
        self.shape = shape or VideoUpscalerShape()
        width = self.shape.width
        self.stem = nn.Conv2d(3 + 3 * SCALE**2, width, 3, padding=1)
        self.stages = nn.ModuleList(Exchange(width, self.shape.blocks) for _ in range(self.shape.stages))
        self.head = nn.Conv2d(width, 3 * SCALE**2, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        if self.head.bias is not None:
            nn.init.zeros_(self.head.bias)

    def enter(self, lr: Tensor, enlarged: Tensor) -> Tensor:
        """Features of frames `(n, 3, h, w)` and the same enlarged, [0, 1]: the detail beside the repeated pixels."""
        detail = F.pixel_unshuffle(enlarged, SCALE) - lr.repeat_interleave(SCALE**2, 1)
        return self.stem(torch.cat([lr - 0.5, DETAIL * detail], 1))

    def leave(self, x: Tensor) -> Tensor:
        """What is added to the enlarged frames `(n, 3, 4h, 4w)`."""
        return F.pixel_shuffle(self.head(x), SCALE)

    def forward(self, lr: Tensor, enlarged: Tensor, pairs: Pairs) -> Tensor:
        """Clips `(clips, frames, 3, h, w)` of one scene each, and the same enlarged, to what is added to these."""
        frames = lr.shape[1]
        x = _clips(self.enter(lr.flatten(0, 1), enlarged.flatten(0, 1)), frames)
        for stage in self.stages:
            x = stage(x, pairs)
        return _clips(self.leave(x.flatten(0, 1)), frames)


# --- A video frame by frame -----------------------------------------------------------------------------------------

Pair = tuple[Tensor, Tensor]
"""A frame as it is `(3, h, w)` and the same frame enlarged `(3, 4h, 4w)`."""


class _Felt(NamedTuple):
    """A frame's features, and its flow to the next one; None at the scene's end."""

    x: Tensor
    onward: Pairs | None


@torch.no_grad()
def sharpened(
    model: VideoUpscaler,
    frames: Iterable[Pair],
    cuts: Sequence[int] = (),
    strength: float = 1.0,
    estimate: Estimator = dis_flow,
) -> Iterator[Tensor]:
    """Enlarged frames `(3, 4h, 4w)` in [0, 1] with what their neighbours show, one by one; no frame sees past a cut.

    Each frame is evaluated once: the result does not depend on how many come. Held are the few frames that wait for
    those after them, one for each stage. Raises SettingError for a strength outside 0 to 2 and for frames that are not
    enlarged four times.
    """
    check_strength(strength)
    for _, scene in groupby(enumerate(frames), lambda numbered: bisect_right(cuts, numbered[0])):
        yield from _sharpened_scene(model, (pair for _, pair in scene), strength, estimate)


def check_strength(strength: float) -> None:
    """Raises SettingError for a strength outside 0 to 2."""
    if not 0 <= strength <= 2:
        raise SettingError(f"strength is {strength}: expected 0 (the enlarged video as it is) to 2")


def _sharpened_scene(
    model: VideoUpscaler, frames: Iterator[Pair], strength: float, estimate: Estimator
) -> Iterator[Tensor]:
    waiting: deque[Tensor] = deque()
    device = next(model.parameters()).device

    def entered() -> Iterator[_Felt]:
        held: tuple[Tensor, Tensor] | None = None
        for lr, enlarged in frames:
            check_enlarged(lr, enlarged)
            waiting.append(enlarged)
            small, large = (each[None].to(device).float() for each in (lr, enlarged))
            x = model.enter(small, large)
            if held is not None:
                yield _Felt(held[0], Pairs.of(held[1], small, estimate))
            held = x, small
        if held is not None:
            yield _Felt(held[0], None)

    felt = entered()
    for stage in model.stages:
        felt = _exchanged(cast(Exchange, stage), felt)
    for x, _ in felt:
        enlarged = waiting.popleft()
        yield (enlarged + strength * model.leave(x)[0].to(enlarged)).clamp(0, 1)


def _exchanged(stage: Exchange, felt: Iterator[_Felt]) -> Iterator[_Felt]:
    """A stage over a scene's frames: each is given out when the one after it is known."""
    heard: Tensor | None = None  # by the frame under way, of the one before
    before: tuple[_Felt, Tensor, Tensor] | None = None
    for now in felt:
        own, other = stage.own(now.x), stage.other(now.x)
        heard_next: Tensor | None = None
        if before is not None and (pairs := before[0].onward) is not None:
            of_after = stage.heard(before[1], other, pairs.forward, pairs.seen_after)
            heard_next = stage.heard(own, before[2], pairs.backward, pairs.seen_before)
            yield _Felt(stage.body(before[0].x + (of_after if heard is None else heard + of_after)), pairs)
        heard, before = heard_next, (now, own, other)
    if before is not None:
        x = before[0].x
        yield _Felt(stage.body(x if heard is None else x + heard), None)


def check_enlarged(lr: Tensor, enlarged: Tensor) -> None:
    """Raises SettingError unless `enlarged` is four times as large as `lr`."""
    wanted = tuple(SCALE * side for side in lr.shape[-2:])
    if enlarged.shape[-2:] != wanted:
        found, expected = (f"{w}x{h}" for h, w in (tuple(enlarged.shape[-2:]), wanted))
        raise SettingError(
            f"the enlarged video is {found}, the input {lr.shape[-1]}x{lr.shape[-2]}: the video upscaler expects"
            f" {expected}, four times the input; use an upscaler of factor 4"
        )


# --- Files ----------------------------------------------------------------------------------------------------------


def load_video_upscaler(path: Path | str, device: torch.device | str = "cpu") -> VideoUpscaler:
    """The video upscaler at `path` ("lite": the bundled one), in float32: it is small. Raises CheckpointError."""
    file = LITE_VIDEO_UPSCALER if str(path) == "lite" else Path(path)
    stored = read_module(file, KIND)
    try:
        model = VideoUpscaler(VideoUpscalerShape(**stored.config))
    except TypeError as error:
        raise CheckpointError(
            f"{file}: its configuration {stored.config} is no video upscaler's; get it again"
        ) from error
    fill(file, model, KIND, stored.tensors)
    # Convolutions take two thirds of the time on a CPU where channels lie together, and no longer elsewhere.
    laid_out: Any = cast(Any, model).to(device=device, memory_format=torch.channels_last)
    return cast(VideoUpscaler, laid_out).eval().requires_grad_(False)


def check_base(path: Path | str) -> None:
    """Raises SettingError where the file says that it was trained on top of another upscaler than the bundled DCM."""
    base = stored(Path(path), UPSCALER_KEY) or "dcm"
    if base != "dcm":
        raise SettingError(
            f"{path}: trained on pictures enlarged by {base}, which is not bundled: expected that upscaler; give its"
            " file (--upscaler-base, or upscale_model of Load Video Upscaler)"
        )


def write_video_upscaler(
    path: Path, model: VideoUpscaler, trained_on: str, notes: Mapping[str, str] | None = None
) -> None:
    """Writes `model` as a file that `load_video_upscaler` reads, float16; `notes`, such as the upscaler below it, join
    its metadata. Raises CheckpointError."""
    write_module(path, KIND, asdict(model.shape), model.state_dict(), trained_on, notes=notes)
