"""SDATC's compression-aware prompts (CAPM, section III-C): they tell a decoder how hard its input was compressed.

At each level of a UNet's or VAE's decoder, on features F: `d = mean(CNN(F))`, `w = W d` over N prompt components,
`P = Up(sum_i w_i P_i)` (SDATC, equation 6), `F' = F + strength * Conv(TransformerBlock([F; P]))` (SDATC, equation 7).
The last convolution starts at zero, so a fresh module changes nothing. A known compression level (a hint) takes d's
place by a small embedding.

The transformer block works on fewer channels than F and attends in windows: its cost grows with the area alone, and
tiles can be exact. F comes to it divided by a deviation that training measured once, and goes back times it: a VAE's
decoder has features of deviation 80, beside which its norms leave nothing of a prompt of deviation 1.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from ..errors import SettingError
from ..system.memory import to_device
from .capm_hints import check_hint, check_strength, spread
from .halves import check_half, key_of, level_of
from .windows import HEAD, WINDOW, FeedForward, Place, WindowAttention

#: Backbones by name, as files have them: the same widths do not mean the same features.
SVD_UNET, SVD_VAE, SD_UNET, SD_VAE = "svd-unet", "svd-vae", "sd-unet", "sd-vae"
#: Pixels of a level between the places that d is the mean over.
CODE_STRIDE = 4
_GRID = 103
"""Compression levels that a reading is told apart to: half a CRF."""


@dataclass(frozen=True)
class CAPMShape:
    """`backbone` and the `widths` of its decoder's levels by name; `components` prompts of `prompt` channels and
    `size` x `size` places; `code` numbers in d; `weighing`, a name in WEIGHINGS, makes w of W d."""

    backbone: str
    widths: Mapping[str, int]
    components: int = 5
    code: int = 32
    prompt: int = 32
    size: int = 8
    weighing: str = "linear"


WEIGHINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda w: w,
    "softmax": lambda w: w.softmax(-1),
    "even": lambda w: torch.full_like(w, 1 / w.shape[-1]),
}
"""What becomes of W d `(n, components)`. "linear" is CAPM's; the others are rows of an ablation (SDATC, table V):
"softmax", where tiles of one frame may take the mean of theirs, and "even", prompts that are learnt and never chosen
("+Prompt")."""


class _Level(nn.Module):
    """CAPM on features of `width` channels."""

    def __init__(self, width: int, shape: CAPMShape) -> None:
        super().__init__()
        inner, code = HEAD * max(1, min(2, width // 32), width // (4 * HEAD)), shape.code
        self.width = width
        self.scale: Tensor
        self.register_buffer("scale", torch.ones(()))
        self.look = nn.Conv2d(width, code, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(code)
        self.look_again = nn.Conv2d(code, code, 3, stride=2, padding=1)
        self.hinted = nn.Sequential(nn.Linear(1, code), nn.GELU(), nn.Linear(code, code))
        self.weigh = nn.Linear(code, shape.components, bias=False)
        self.prompts = nn.Parameter(torch.randn(shape.components, shape.prompt, shape.size, shape.size))
        # The 1x1 convolution of [F; P] in two halves: P's comes before its enlargement, with which it commutes.
        self.enter = nn.Conv2d(width, inner, 1)
        self.enter_prompt = nn.Conv2d(shape.prompt, inner, 1, bias=False)
        self.attention = WindowAttention(inner)
        self.feed_forward = FeedForward(inner)
        self.leave = nn.Conv2d(inner, width, 1)
        nn.init.zeros_(self.leave.weight)
        if self.leave.bias is not None:
            nn.init.zeros_(self.leave.bias)

    def codes(self, features: Tensor) -> Tensor:
        seen = self.norm(rearrange(self.look(features), "n c h w -> n h w c"))
        return F.gelu(self.look_again(rearrange(F.gelu(seen), "n h w c -> n c h w")))

    def forward(self, features: Tensor, weights: Tensor, place: Place) -> Tensor:
        """What is added to the features."""
        prompt = self.enter_prompt(torch.einsum("n k, k c y x -> n c y x", weights, self.prompts))
        size = features.shape[-2:]
        rows, cols = (
            to_device(_enlarging(prompt.shape[-1], whole, start, length), prompt.device).to(prompt)
            for whole, start, length in ((place.height, place.top, size[0]), (place.width, place.left, size[1]))
        )
        # The scale goes with the few weights rather than with the features.
        x = F.conv2d(features, self.enter.weight / self.scale, self.enter.bias) + rows @ prompt @ cols.mT
        x = rearrange(x, "n c h w -> n h w c")
        x = x + self.attention(x, place)
        x = x + self.feed_forward(x)
        bias = self.scale * cast(Tensor, self.leave.bias)
        return F.conv2d(rearrange(x, "n h w c -> n c h w"), self.scale * self.leave.weight, bias)


class CAPM(nn.Module):
    """One block for each level of a decoder."""

    def __init__(self, shape: CAPMShape) -> None:
        super().__init__()
        if shape.weighing not in WEIGHINGS:
            raise SettingError(f"CAPM's weighing is '{shape.weighing}': expected one of {', '.join(WEIGHINGS)}")
        self.shape = shape
        self.levels = nn.ModuleDict({key_of(name): _Level(width, shape) for name, width in shape.widths.items()})

    @property
    def reach(self) -> int:
        """How many pixels of a level away a feature can matter once the weights are known: a window's far end, and one
        pixel of the depthwise convolution."""
        return WINDOW

    def code(self, level: str, features: Tensor) -> Tensor:
        """d `(n, code)` of features `(n, width, h, w)`, a mean over the picture."""
        return self.codes(level, features).mean((2, 3))

    def codes(self, level: str, features: Tensor) -> Tensor:
        """What d is the mean of: `(n, code, places, places)`, a place at every `CODE_STRIDE`-th pixel."""
        block = self._block(level, features)
        return block.codes(features.to(block.enter.weight.dtype))

    def embedded(self, level: str, hint: Tensor) -> Tensor:
        """What stands in for d `(n, code)` where the compression level `(n,)` is known."""
        block = self._block(level)
        # Spread out, so that neighbouring levels differ from the start.
        weight = block.enter.weight
        return block.hinted(to_device((4 * hint - 2).to(weight.dtype), weight.device)[:, None])

    def weigh(self, level: str, code: Tensor) -> Tensor:
        """Weights `(n, components)` of the prompts for d: W d without bias, weighed as the shape says."""
        return WEIGHINGS[self.shape.weighing](self._block(level).weigh(code))

    def weights(self, level: str, features: Tensor, hint: Tensor | None = None) -> Tensor:
        """Weights `(n, components)` of the prompts for features `(n, width, h, w)`, or for a hint (as in `forward`).

        Tiles agree where they have those of their frame. A hint gives all tiles the same; without one, take the
        features of the whole frame, or the mean over tiles that cover it (`shared_weights`): w is linear in d.
        """
        if hint is not None:
            hint = spread(hint, features.shape[0])
        return self.weigh(level, self.told(level, hint, lambda: self.code(level, features)))

    def told(self, level: str, hint: Tensor | None, code: Callable[[], Tensor]) -> Tensor:
        """d `(n, code)` of frames whose compression levels are `hint` `(n,)`, NaN where unknown (None: all are).

        The level's embedding where it is known, else what `code` reads in the features, called only then. A hint is
        best left on the CPU: whether all are known is read here.
        """
        if hint is None:
            return code()
        if not (unknown := hint.isnan()).any():
            return self.embedded(level, hint)
        seen = code()
        return torch.where(to_device(unknown, seen.device)[:, None], seen, self.embedded(level, hint.nan_to_num()))

    @torch.no_grad()
    def settle(self, features: Mapping[str, Tensor]) -> None:
        """Sets what features are divided by to the deviation of these `(n, width, h, w)`, by level: before training."""
        for level, value in features.items():
            self._block(level, value).scale.copy_(value.float().std())

    def acts(self, level: str) -> bool:
        """Whether it can change a level's features: a fresh one does not."""
        leave = self._block(level).leave
        return any(bool(value.any()) for value in leave.parameters())

    def part(self, level: str) -> nn.Module:
        """The block of one level; it moves between devices with this module."""
        return self._block(level)

    def check_fits(self, backbone: str, widths: Mapping[str, int]) -> None:
        """Raises SettingError unless the model is of its backbone and `widths` by level are its own."""
        check_half("CAPM", self, backbone, widths)

    def forward(
        self,
        level: str,
        features: Tensor,
        hint: Tensor | None = None,
        weights: Tensor | None = None,
        strength: float = 1.0,
        place: Place | None = None,
    ) -> Tensor:
        """Features `(n, width, h, w)` with the prompts' change, in their dtype; the same tensor at strength 0.

        `hint`: compression levels in [0, 1], one for each of the n, or for each frame of one tile where n are several
        tiles of the same frames; NaN where unknown. `weights`, of the whole frame, take precedence. `place` says where
        a tile lies: with it and the frame's weights, what is `reach` pixels inside a tile is exactly the frame's;
        without it the prompt spans the tile. Raises SettingError for an unknown level, another width, or a hint that
        does not fit.
        """
        block = self._block(level, features)
        if strength == 0:
            return features
        given = features.to(block.enter.weight.dtype)
        weights = self.weights(level, given, hint) if weights is None else weights.to(given)
        added = block(given, weights, place or Place(0, 0, features.shape[-2], features.shape[-1]))
        return features + (added if strength == 1 else strength * added).to(features.dtype)

    @torch.no_grad()
    def reading(self, level: str, features: Tensor) -> Tensor:
        """The compression level `(n,)` in [0, 1] that features `(n, width, h, w)` look like: that whose embedding lies
        nearest to their d."""
        code = self.code(level, features).float()
        scale = torch.linspace(0, 1, _GRID, device=code.device)
        return scale[torch.cdist(code, self.embedded(level, scale).float()).argmin(1)]

    def _block(self, level: str, features: Tensor | None = None) -> _Level:
        return cast(_Level, level_of("CAPM", self, self.levels, level, features))


def decoder_widths(block_out_channels: Sequence[int]) -> dict[str, int]:
    """Levels of a diffusers UNet's or VAE's decoder, by the names of the modules whose output CAPM takes."""
    return {f"up_blocks.{index}": width for index, width in enumerate(reversed(block_out_channels))}


def shared_weights(weights: Tensor, tiles: int) -> Tensor:
    """Weights `(tiles * frames, components)` with every tile's replaced by their mean over the tiles."""
    mean = rearrange(weights, "(m t) k -> m t k", m=tiles).mean(0)
    return repeat(mean, "t k -> (m t) k", m=tiles)


@dataclass(frozen=True)
class HostCAPM:
    """A decoder's CAPM (None: the file has none for it), the compression levels it is told, one a frame, or one for all
    of them, and its strength."""

    model: CAPM | None
    levels: Tensor | None
    strength: float

    def hint(self, frames: int) -> Tensor | None:
        """The levels of so many frames. Raises SettingError where there are others."""
        if self.levels is None or self.levels.ndim == 0:
            return None if self.levels is None else self.levels.expand(frames)
        if (count := self.levels.shape[0]) != frames:
            raise SettingError(
                f"CAPM has {count} compression levels for {frames} frames: expected one a frame; estimate them on the"
                " video that is upscaled"
            )
        return self.levels


@contextmanager
def attached(
    model: CAPM,
    decoder: nn.Module,
    hint: Tensor | Callable[[], Tensor | None] | None = None,
    strength: float = 1.0,
) -> Generator[None, None, None]:
    """Within, the levels of a diffusers UNet or VAE `decoder` go through `model`.

    A `hint` that is a function is asked at every call, for the frames that are being evaluated. Raises SettingError.
    """
    check_strength(strength)
    if isinstance(hint, Tensor):
        check_hint(hint)

    def hook(level: str) -> Any:
        def prompt(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
            return model(level, output, hint() if callable(hint) else hint, strength=strength)

        return prompt

    handles = [
        decoder.get_submodule(level).register_forward_hook(hook(level))
        for level in (model.shape.widths if strength else ())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _enlarging(size: int, whole: int, start: int, length: int) -> Tensor:
    """Bilinear enlargement from `size` to `whole` places, of which rows `start` to `start + length`: `(length, size)`.
    As torch's with align_corners=False."""
    at = ((torch.arange(start, start + length, dtype=torch.float64) + 0.5) * size / whole - 0.5).clamp(0, size - 1)
    distance = (at[:, None] - torch.arange(size, dtype=torch.float64)).abs()
    return (1 - distance).clamp(min=0).float()
