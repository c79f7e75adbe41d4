"""SATeCo's refiner: a small network that learns where to trust the decoded picture and where the upscaled one.

SATeCo's is `w * upscaled + (1-w) * decoded`, with one number w, and a residual block of both added; here a network
looks at both and decides per pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from ..checkpoints.module_file import fill, read_module, write_module
from ..errors import CheckpointError, SettingError
from ..flow.warp import SMALLEST, dis_flow, visibility, warp
from ..image.video_tensor import empty_video
from ..sampling.tiling import cores
from ..weights import bundled
from .blocks import ResidualBlock

KIND = "refiner"
#: The weights that come with the pack, made for its lite SVD.
LITE_REFINER = bundled("refiner_lite")
#: Pixels a side of what goes through at once; a margin of the network's reach makes the seams exact.
TILE = 512
#: Frames that are refined together, beside their neighbours.
CHUNK = 8


@dataclass(frozen=True)
class RefinerShape:
    """`width` channels in `blocks` residual blocks, on 2x2 pixels folded into channels; before each of the first
    `mixes` blocks a frame sees the frames before and after it, so that compression's flicker can be averaged away.
    With `follows` it also gets those two frames as they come to lie on it along the optical flow."""

    width: int = 40
    blocks: int = 5
    mixes: int = 2
    follows: bool = False


class _Mix(nn.Module):
    """Adds what a frame's two neighbours hold at the same place; nothing at its start. A clip's ends repeat."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2 * width, width, 1)
        nn.init.zeros_(self.conv.weight)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        before, after = torch.cat([x[:1], x[:-1]]), torch.cat([x[1:], x[-1:]])
        return x + self.conv(torch.cat([before, after], 1))


class Refiner(nn.Module):
    """f(decoded, upscaled) of `refine`, which gives `upscaled + (1 - w) * f`: zero at its start."""

    def __init__(self, shape: RefinerShape | None = None) -> None:
        super().__init__()
        self.shape = shape or RefinerShape()
        width = self.shape.width
        self.enter = nn.Conv2d(48 if self.shape.follows else 24, width, 3, padding=1)
        self.body = nn.ModuleList(ResidualBlock(width) for _ in range(self.shape.blocks))
        self.mix = nn.ModuleList(_Mix(width) for _ in range(self.shape.mixes))
        self.leave = nn.Conv2d(width, 12, 3, padding=1)
        nn.init.zeros_(self.leave.weight)
        if self.leave.bias is not None:
            nn.init.zeros_(self.leave.bias)

    def forward(self, decoded: Tensor, upscaled: Tensor, around: Tensor | None = None) -> Tensor:
        """f: frames of one scene `(frames, 3, h, w)` twice, h and w even, to what is added to `upscaled`.

        `around` is `neighbours(upscaled)`, for a refiner that follows.
        """
        given = [decoded - 0.5, upscaled - 0.5]
        if self.shape.follows:
            given.append(neighbours(upscaled) if around is None else around)
        both = rearrange(torch.cat(given, 1), "t c (h i) (w j) -> t (c i j) h w", i=2, j=2)
        entered = x = self.enter(both)
        for index, block in enumerate(self.body):
            x = block(self.mix[index](x) if index < len(self.mix) else x)
        return rearrange(self.leave(entered + x), "t (c i j) h w -> t c (h i) (w j)", i=2, j=2)

    @property
    def reach(self) -> int:
        """How many pixels away a value can matter: the margin that tiles need. Even, as pixels are folded in pairs."""
        return 2 * (2 + 2 * self.shape.blocks)

    @property
    def frames(self) -> int:
        """How many frames away a value can matter."""
        return self.shape.mixes + self.shape.follows


def neighbours(video: Tensor) -> Tensor:
    """What the frames before and after each frame of one scene `(frames, 3, h, w)` add to it: `(frames, 6, h, w)`.

    Both are brought onto the frame along DIS flow, and the frame is taken away; 0 where they do not show what it shows,
    at the scene's ends, and for frames too small for a flow.
    """
    return _around(_between(video))


def _between(video: Tensor) -> Tensor:
    """Of frames `(n, 3, h, w)` and those after them, `(n - 1, 6, h, w)`: what the first adds to the second, and what
    the second adds to the first. As `neighbours`, but frame pair by frame pair."""
    if video.shape[0] < 2 or min(video.shape[-2:]) < SMALLEST:
        return video.new_zeros(max(video.shape[0] - 1, 0), 6, *video.shape[-2:])
    now, after = video[:-1].float(), video[1:].float()
    forward, backward = dis_flow(now, after), dis_flow(after, now)
    to_after = (warp(now, backward) - after) * visibility(backward, forward)
    to_now = (warp(after, forward) - now) * visibility(forward, backward)
    return torch.cat([to_after, to_now], 1).to(video.dtype)


def _continued(between: Tensor, video: Tensor) -> Tensor:
    """`_between(video)`, of which the first pairs are known."""
    return torch.cat([between, _between(video[len(between) :])])


def _around(between: Tensor) -> Tensor:
    """Frame by frame what `_between` says pair by pair: `(n - 1, 6, h, w)` to `(n, 6, h, w)`."""
    nothing = between.new_zeros(1, 3, *between.shape[-2:])
    return torch.cat([torch.cat([nothing, between[:, :3]]), torch.cat([between[:, 3:], nothing])], 1)


def check_w(w: float) -> None:
    """Raises SettingError for a `w` outside [0, 1]."""
    if not 0 <= w <= 1:
        raise SettingError(f"w is {w}: expected a share from 0 (as refined) to 1 (the upscaled picture as it is)")


@torch.no_grad()
def refine_frames(
    model: Refiner, pairs: Iterable[tuple[Tensor, Tensor]], w: float = 0.0, cuts: Sequence[int] = ()
) -> Iterator[Tensor]:
    """Refined frames `(3, h, w)` in [0, 1] of pairs (decoded, upscaled), one by one; no frame sees past a cut.

    Holds a chunk of frames and the neighbours it needs; the result does not depend on the chunks. The flow between two
    frames is estimated once. Raises SettingError for `w` outside [0, 1].
    """
    check_w(w)
    margin, starts = model.frames, {0, *cuts}
    held: list[tuple[Tensor, Tensor]] = []
    between: Tensor | None = None
    lead = 0

    def flush(last: bool) -> Iterator[Tensor]:
        nonlocal between
        stop = len(held) if last else len(held) - margin
        if stop > lead:
            decoded, upscaled = (torch.stack(list(side)) for side in zip(*held, strict=True))
            if model.shape.follows:
                between = _between(upscaled) if between is None else _continued(between, upscaled)
            yield from _in_tiles(model, decoded, upscaled, between, w)[lead:stop]

    for index, pair in enumerate(pairs):
        if index in starts and held:
            yield from flush(last=True)
            held, between, lead = [], None, 0
        held.append(pair)
        if len(held) == lead + CHUNK + margin:
            yield from flush(last=False)
            gone = CHUNK + lead - min(margin, lead + CHUNK)
            held, lead = held[gone:], min(margin, lead + CHUNK)
            between = None if between is None else between[gone:].clone()
    yield from flush(last=True)


def _in_tiles(model: Refiner, decoded: Tensor, upscaled: Tensor, between: Tensor | None, w: float) -> Tensor:
    """Frames of one scene `(frames, 3, h, w)`, refined tile by tile; `between` as `_between`, for one that follows."""
    out = torch.empty_like(upscaled)
    parameter = next(model.parameters())
    for rows in cores(out.shape[-2], TILE, model.reach):
        for cols in cores(out.shape[-1], TILE, model.reach):
            part = [x[..., rows.outer, cols.outer] for x in (decoded, upscaled)]
            if between is not None:
                part.append(_around(between[..., rows.outer, cols.outer]))
            pad = (0, part[0].shape[-1] % 2, 0, part[0].shape[-2] % 2)
            even = [nn.functional.pad(x, pad, mode="replicate").to(parameter) for x in part]
            added = model(*even)[..., rows.inner, cols.inner].to(out)
            out[..., rows.core, cols.core] = (upscaled[..., rows.core, cols.core] + (1 - w) * added).clamp(0, 1)
    return out


def refine(
    model: Refiner,
    decoded: Tensor,
    upscaled: Tensor,
    w: float = 0.0,
    cuts: Sequence[int] = (),
    tick: Callable[[int], None] = lambda done: None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`refine_frames` of videos `(frames, 3, h, w)` RGB in [0, 1], in their precision or in `dtype`; `w` = 1 returns
    `upscaled` itself.

    `tick` is told of every frame done. Raises SettingError for `w` outside [0, 1] and for videos of two sizes.
    """
    check_w(w)
    if decoded.shape != upscaled.shape:
        raise SettingError(
            f"the decoded video is {tuple(decoded.shape)} and the upscaled one {tuple(upscaled.shape)} (frames,"
            " channels, height, width): expected one size; decode the latents of this very video"
        )
    if w == 1:
        return upscaled
    out = empty_video(upscaled, len(upscaled), (upscaled.shape[-2], upscaled.shape[-1]), dtype)
    for index, frame in enumerate(refine_frames(model, zip(decoded, upscaled, strict=True), w, cuts)):
        out[index] = frame
        tick(1)
    return out


def load_refiner(path: Path | str, device: torch.device | str = "cpu") -> Refiner:
    """The refiner at `path` ("lite": the bundled one), in float32: it is small. Raises CheckpointError."""
    file = LITE_REFINER if str(path) == "lite" else Path(path)
    stored = read_module(file, KIND)
    try:
        model = Refiner(RefinerShape(**stored.config))
    except TypeError as error:
        raise CheckpointError(f"{file}: its configuration {stored.config} is no refiner's; get it again") from error
    fill(file, model, KIND, stored.tensors)
    return model.to(device).eval().requires_grad_(False)


def write_refiner(path: Path, model: Refiner, trained_on: str) -> None:
    """Writes `model` as a file that `load_refiner` reads, float16. Raises CheckpointError."""
    write_module(path, KIND, asdict(model.shape), model.state_dict(), trained_on)
