"""SATeCo's refiner: a small network that learns where to trust the decoded picture and where the upscaled one.

SATeCo's is `w * upscaled + (1-w) * decoded`, with one number w, and a residual block of both added, which is the form
"paper" here; in the pack's own, "free", a network looks at both and decides per pixel.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, product
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from ..checkpoints.module_file import fill, read_module, write_module
from ..errors import CheckpointError, SettingError
from ..image.video_tensor import empty_video
from ..sampling.tiling import cores, even_part
from ..system.memory import home_of
from ..weights import bundled
from .blocks import ResidualBlock
from .neighbours import Pair, followed, neighbours

KIND = "refiner"
#: The weights that come with the pack, made for its lite SVD.
LITE_REFINER = bundled("refiner_lite")
#: Pixels a side of what goes through at once; a margin of the network's reach makes the seams exact. Smaller ones are
#: more margin (a 1080p frame 18 % at 512, 11 % here), larger ones leave holes of their size in a CPU's memory.
TILE = 768
#: Frames that are refined together.
CHUNK = 4


@dataclass(frozen=True)
class RefinerShape:
    """`width` channels in `blocks` residual blocks, on 2x2 pixels folded into channels; before each of the first
    `mixes` blocks a frame sees the frames before and after it, so that compression's flicker can be averaged away.
    With `follows` it also gets those two frames as they come to lie on it along the optical flow. `form` is a name in
    FORMS; `w0` the w that a refiner of SATeCo's form was trained at."""

    width: int = 40
    blocks: int = 5
    mixes: int = 2
    follows: bool = False
    form: str = "free"
    w0: float = 0.5


class Mix(NamedTuple):
    """`share` of the upscaled picture, the rest of the decoded one, and `factor` times what the network adds."""

    share: float
    factor: float

    def of(self, upscaled: Tensor, decoded: Tensor, added: Tensor) -> Tensor:
        """The refined picture, not clamped."""
        base = upscaled if self.share == 1 else self.share * upscaled + (1 - self.share) * decoded
        return base + self.factor * added


def _paper(w: float, w0: float) -> Mix:
    """w X_u + (1 - w) X_d + R (SATeCo), R taken back towards w = 1, where the upscaled picture is left."""
    return Mix(w, min(1.0, (1 - w) / (1 - w0)))


#: What w makes of the two pictures. "free": the network finds the share of the decoded one itself, and w takes back all
#: that it adds. "paper": SATeCo's, with a fixed share. The second is the w that stands for "as it was trained".
FORMS: dict[str, tuple[Callable[[float, float], Mix], Callable[[float], float]]] = {
    "free": (lambda w, w0: Mix(1.0, 1 - w), lambda w0: 0.0),
    "paper": (_paper, lambda w0: w0),
}


def mix_of(shape: RefinerShape, w: float, sateco_w: float = -1.0) -> Mix:
    """For an artist's w, from 0 (as it was trained) to 1 (the upscaled picture), or, from 0 on, for SATeCo's own w, of
    which 0 leaves the decoded picture and what the network adds. Raises SettingError for a w outside [0, 1], and for
    SATeCo's with a refiner of another form."""
    check_w(w)
    mix, trained = FORMS[shape.form]
    if sateco_w < 0:
        least = trained(shape.w0)
        return mix(least + (1 - least) * w, shape.w0)
    if shape.form != "paper" or not 0 <= sateco_w <= 1:
        raise SettingError(
            f"SATeCo's w is {sateco_w} and the refiner of the form {shape.form!r}: expected a w from 0 to 1, or -1 for"
            " none, and a refiner of the form 'paper'"
        )
    return mix(sateco_w, shape.w0)


class _Mix(nn.Module):
    """Adds what a frame's two neighbours hold at the same place; nothing at its start. A clip's ends repeat."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2 * width, width, 1)
        nn.init.zeros_(self.conv.weight)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor, held: Tensor | None, last: bool) -> tuple[Tensor, Tensor | None]:
        """The frames that are settled by the next ones `x` `(n, c, h, w)`, and those to hold for the call after: each
        frame waits for the one behind it, the scene's last for none."""
        if held is None:
            if not len(x):
                return x, None
            held = x[:1]
        known = torch.cat([held, x, *([x[-1:] if len(x) else held[-1:]] if last else [])])
        # The convolution of both side by side, without putting them there.
        of_before, of_after = self.conv.weight.chunk(2, 1)
        settled = nn.functional.conv2d(known[:-2], of_before, self.conv.bias).add_(known[1:-1])
        settled = settled.add_(nn.functional.conv2d(known[2:], of_after))
        # A copy: a view would hold the whole piece in memory.
        return settled, None if last else known[-2:].clone()


class Refiner(nn.Module):
    """f(decoded, upscaled) of `refine`, which gives `upscaled + (1 - w) * f`, or SATeCo's form: zero at its start."""

    def __init__(self, shape: RefinerShape | None = None) -> None:
        super().__init__()
        self.shape = shape or RefinerShape()
        if self.shape.form not in FORMS or not 0 <= self.shape.w0 < 1:
            raise SettingError(
                f"the refiner's form is {self.shape.form!r}, its w0 {self.shape.w0}: expected one of"
                f" {', '.join(FORMS)}, and a w0 of at least 0 and below 1"
            )
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
        return self._settled(given, Carry.of(self), last=True)

    def refined(self, decoded: Tensor, upscaled: Tensor) -> Tensor:
        """The pictures of one scene refined as in training, not clamped: at w 0."""
        return mix_of(self.shape, 0.0).of(upscaled, decoded, self(decoded, upscaled).to(upscaled.dtype))

    def advance(self, given: Sequence[Tensor], carry: Carry, last: bool) -> Tensor:
        """As `forward` of a whole scene that comes piece by piece: what is added to the frames that the next piece
        settles, `(n, 3, h, w)`. `given` are its decoded frames, its upscaled ones and what is around them; `carry`
        holds what comes of the pieces before and is brought up to date; `last` says that no piece follows."""
        decoded, upscaled, *around = given
        return self._settled([decoded - 0.5, upscaled - 0.5, *around], carry, last)

    def _settled(self, given: Sequence[Tensor], carry: Carry, last: bool) -> Tensor:
        folded = rearrange(torch.cat(list(given), 1), "t c (h i) (w j) -> t (c i j) h w", i=2, j=2)
        x = self.enter(folded)
        entered = x if carry.entered is None else torch.cat([carry.entered, x])
        for index, block in enumerate(self.body):
            if index < len(self.mix):
                x, carry.mixed[index] = self.mix[index](x, carry.mixed[index], last)
            x = block(x)
        carry.entered = None if last else entered[len(x) :].clone()
        return rearrange(self.leave(entered[: len(x)] + x), "t (c i j) h w -> t c (h i) (w j)", i=2, j=2)

    @property
    def reach(self) -> int:
        """How many pixels away a value can matter: the margin that tiles need. Even, as pixels are folded in pairs."""
        return 2 * (2 + 2 * self.shape.blocks)


@dataclass
class Carry:
    """What a refiner's next frames need of those before: the two frames that each mix saw last, and the entered frames
    that are not settled yet; features `(n, width, h / 2, w / 2)`."""

    mixed: list[Tensor | None]
    entered: Tensor | None = None

    @classmethod
    def of(cls, model: Refiner) -> Carry:
        """A scene's start."""
        return cls([None] * model.shape.mixes)

    def to(self, device: torch.device) -> None:
        """Moves it."""
        self.mixed = [None if x is None else x.to(device) for x in self.mixed]
        self.entered = None if self.entered is None else self.entered.to(device)


def check_w(w: float) -> None:
    """Raises SettingError for a `w` outside [0, 1]."""
    if not 0 <= w <= 1:
        raise SettingError(f"w is {w}: expected a share from 0 (as refined) to 1 (the upscaled picture as it is)")


@torch.no_grad()
def refine_frames(
    model: Refiner,
    pairs: Iterable[tuple[Tensor, Tensor]],
    w: float = 0.0,
    cuts: Sequence[int] = (),
    sateco_w: float = -1.0,
) -> Iterator[Tensor]:
    """Refined frames `(3, h, w)` in [0, 1] of pairs (decoded, upscaled), one by one; no frame sees past a cut.

    A chunk of frames is evaluated at a time, each frame once: what the next chunk needs of it is carried over. The
    result does not depend on the chunks. `w` and `sateco_w` are those of `mix_of`, which raises SettingError.
    """
    mix = mix_of(model.shape, w, sateco_w)
    scenes = groupby(enumerate(pairs), lambda numbered: bisect_right(cuts, numbered[0]))
    for _, scene in scenes:
        yield from _refined_scene(model, (pair for _, pair in scene), mix)


def _refined_scene(model: Refiner, pairs: Iterator[Pair], mix: Mix) -> Iterator[Tensor]:
    waiting: deque[tuple[Tensor, Tensor]] = deque()
    tiles: _Tiles | None = None
    chunks = _chunks(pairs)
    following = followed(chunks) if model.shape.follows else ((chunk, None, last) for chunk, last in chunks)
    for chunk, around, last in following:
        decoded, upscaled = (torch.stack(list(side)) for side in zip(*chunk, strict=True))
        tiles = tiles or _Tiles(model, upscaled)
        waiting.extend(zip(upscaled, decoded, strict=True))
        given = [decoded, upscaled] if around is None else [decoded, upscaled, around]
        for added in tiles.advance(given, last):
            yield mix.of(*waiting.popleft(), added).clamp(0, 1)


def _chunks(pairs: Iterator[Pair]) -> Iterator[tuple[list[Pair], bool]]:
    """Frames in chunks, and whether a chunk is the last."""
    held: list[Pair] = []
    for pair in pairs:
        if len(held) == CHUNK:
            yield held, False
            held = []
        held.append(pair)
    if held:
        yield held, True


class _Tiles:
    """A refiner on one scene, tile by tile; each tile's `Carry` waits where there is room for all of them."""

    def __init__(self, model: Refiner, video: Tensor) -> None:
        height, width = video.shape[-2:]
        self._model, self._parameter = model, next(model.parameters())
        rows, cols = (cores(side, even_part(side, TILE), model.reach) for side in (height, width))
        self._places = list(product(rows, cols))
        self._carries = [Carry.of(model) for _ in self._places]
        carried = 3 * model.shape.mixes * model.shape.width * height * width // 4
        self._home = home_of(self._parameter.device, carried * self._parameter.itemsize)

    def advance(self, given: list[Tensor], last: bool) -> Tensor:
        """What is added to the frames that are settled by the next ones given: `(n, 3, h, w)` in their precision."""
        parts: list[Tensor] = []
        for (rows, cols), carry in zip(self._places, self._carries, strict=True):
            cut = [x[..., rows.outer, cols.outer] for x in given]
            odd = (0, cut[0].shape[-1] % 2, 0, cut[0].shape[-2] % 2)
            even = [nn.functional.pad(x, odd, mode="replicate").to(self._parameter) for x in cut]
            carry.to(self._parameter.device)
            parts.append(self._model.advance(even, carry, last)[..., rows.inner, cols.inner].to(given[1]))
            carry.to(self._home)
        out = given[1].new_empty(len(parts[0]), *given[1].shape[1:])
        for (rows, cols), part in zip(self._places, parts, strict=True):
            out[..., rows.core, cols.core] = part
        return out


def refine(
    model: Refiner,
    decoded: Tensor,
    upscaled: Tensor,
    w: float = 0.0,
    cuts: Sequence[int] = (),
    tick: Callable[[int], None] = lambda done: None,
    dtype: torch.dtype | None = None,
    sateco_w: float = -1.0,
) -> Tensor:
    """`refine_frames` of videos `(frames, 3, h, w)` RGB in [0, 1], in their precision or in `dtype`; `w` = 1 returns
    `upscaled` itself.

    `tick` is told of every frame done. Raises SettingError as `mix_of`, and for videos of two sizes.
    """
    mix = mix_of(model.shape, w, sateco_w)
    if decoded.shape != upscaled.shape:
        raise SettingError(
            f"the decoded video is {tuple(decoded.shape)} and the upscaled one {tuple(upscaled.shape)} (frames,"
            " channels, height, width): expected one size; decode the latents of this very video"
        )
    if mix == Mix(1.0, 0.0):
        return upscaled
    out = empty_video(upscaled, len(upscaled), (upscaled.shape[-2], upscaled.shape[-1]), dtype)
    for index, frame in enumerate(refine_frames(model, zip(decoded, upscaled, strict=True), w, cuts, sateco_w)):
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
    # Convolutions take two thirds of the time on a CPU where channels lie together, and no longer elsewhere.
    laid_out: Any = cast(Any, model).to(device=device, memory_format=torch.channels_last)
    return cast(Refiner, laid_out).eval().requires_grad_(False)


def write_refiner(path: Path, model: Refiner, trained_on: str) -> None:
    """Writes `model` as a file that `load_refiner` reads, float16. Raises CheckpointError."""
    write_module(path, KIND, asdict(model.shape), model.state_dict(), trained_on)
