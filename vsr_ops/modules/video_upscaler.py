"""An upscaler that sees time, on top of any that sees one picture: what neighbouring frames show is brought along the
optical flow, and a correction of the enlarged video is made of it.

Two forms: SATeCo's, "attention" to windows of the frames around (`tmsa`), and the pack's own, an "exchange" of features
with the frames before and after (`exchange`), which was better at the same cost.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoints.module_file import fill, read_module, write_module
from ..checkpoints.safefile import UPSCALER_KEY, stored
from ..errors import CheckpointError, SettingError
from ..flow.raft import Estimator
from ..flow.warp import dis_flow
from ..weights import bundled
from .exchange import Exchange, exchanged, exchanged_one_by_one
from .motion_pairs import Felt, Pairs, clips_of
from .tmsa import attended, attended_one_by_one, layers_of
from .windows import HEAD

KIND = "video_upscaler"
#: The weights that come with the pack, trained on the bundled DCM's pictures.
LITE_VIDEO_UPSCALER = bundled("video_upscaler_lite")
SCALE = 4
#: What the enlarged picture's detail is multiplied by on its way in.
DETAIL = 4.0


@dataclass(frozen=True)
class VideoUpscalerShape:
    """`width` channels in a `form`, a name in FORMS. "exchange": `stages` exchanges with both neighbours, each followed
    by `blocks` residual blocks. "attention": `stages` layers, which look at `radius` frames on each side."""

    width: int = 48
    stages: int = 4
    blocks: int = 2
    form: str = "exchange"
    radius: int = 2


@dataclass(frozen=True)
class Form:
    """What a form's stages are, and what becomes of features in them: of whole clips `(clips, frames, c, h, w)` and
    their pairs, and of a scene's frames as they come."""

    stages: Callable[[VideoUpscalerShape], list[nn.Module]]
    whole: Callable[[VideoUpscaler, Tensor, Pairs], Tensor]
    one_by_one: Callable[[VideoUpscaler, Iterator[Felt]], Iterator[Tensor]]


FORMS = {
    "exchange": Form(
        lambda shape: [Exchange(shape.width, shape.blocks) for _ in range(shape.stages)],
        lambda model, x, pairs: exchanged(model.stages, x, pairs),
        lambda model, felt: exchanged_one_by_one(model.stages, felt),
    ),
    "attention": Form(
        lambda shape: list[nn.Module](layers_of(shape.width, HEAD, shape.stages)),
        lambda model, x, pairs: attended(model.stages, x, pairs, model.shape.radius),
        lambda model, felt: attended_one_by_one(list(model.stages), felt, model.shape.radius),
    ),
}
"""By name: the pack's own, and SATeCo's."""


class VideoUpscaler(nn.Module):
    """What is added to a video enlarged four times; nothing at its start."""

    def __init__(self, shape: VideoUpscalerShape | None = None) -> None:
        super().__init__()
        self.shape = shape or VideoUpscalerShape()
        width = self.shape.width
        self.stem = nn.Conv2d(3 + 3 * SCALE**2, width, 3, padding=1)
        if self.shape.form not in FORMS:
            raise SettingError(
                f"the video upscaler's form is {self.shape.form!r}: expected one of {', '.join(FORMS)}; update this"
                " pack, or get the file again"
            )
        self.stages = nn.ModuleList(self.form.stages(self.shape))
        self.head = nn.Conv2d(width, 3 * SCALE**2, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        if self.head.bias is not None:
            nn.init.zeros_(self.head.bias)

    @property
    def form(self) -> Form:
        """What its stages do."""
        return FORMS[self.shape.form]

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
        x = clips_of(self.enter(lr.flatten(0, 1), enlarged.flatten(0, 1)), frames)
        x = self.form.whole(self, x, pairs)
        return clips_of(self.leave(x.flatten(0, 1)), frames)


# --- A video frame by frame -----------------------------------------------------------------------------------------

Pair = tuple[Tensor, Tensor]
"""A frame as it is `(3, h, w)` and the same frame enlarged `(3, 4h, 4w)`."""


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

    def entered() -> Iterator[Felt]:
        held: tuple[Tensor, Tensor] | None = None
        for lr, enlarged in frames:
            check_enlarged(lr, enlarged)
            waiting.append(enlarged)
            small, large = (each[None].to(device).float() for each in (lr, enlarged))
            x = model.enter(small, large)
            if held is not None:
                yield Felt(held[0], Pairs.of(held[1], small, estimate))
            held = x, small
        if held is not None:
            yield Felt(held[0], None)

    for x in model.form.one_by_one(model, entered()):
        enlarged = waiting.popleft()
        yield (enlarged + strength * model.leave(x)[0].to(enlarged)).clamp(0, 1)


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
    except (TypeError, SettingError) as error:
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
