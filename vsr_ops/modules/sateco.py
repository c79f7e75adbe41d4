"""SATeCo's adapters of a decoder: spatial feature adaptation (SFA) by what a guide shows at each pixel, and temporal
feature alignment (TFA) by attention in tubelets. They stand behind every level of a UNet's or VAE's decoder.

The paper's SFA is `S(g) n + M(g)` on normalised features n; here, so that a fresh one changes nothing and a strength
means something, `f + s ((keep - 1) f + a (S(g) n + M(g)))`, which is the paper's at keep 0 (see `SFA`). The paper could
not be had: its slides and what others quote of it say what is known, the gaps are ours (docs/design.md).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from ..errors import SettingError
from ..sampling.tiling import Span, spans
from .blocks import ResidualBlock
from .halves import check_half, key_of, level_of
from .tubelets import TubeletAttention
from .windows import Place

#: Frames that see each other where a video comes whole, and the share of them that two windows have in common.
WINDOW, OVERLAP = 14, 0.25


@dataclass(frozen=True)
class SATeCoShape:
    """`backbone` and the `widths` of its decoder's levels by name; `inner` channels of TFA there, in heads of `head`;
    `guide` channels of the guide. What the guide is made of, by level: for a UNet how many times smaller than the
    latents a level is (`shrinks`), for a VAE how many channels its encoder has there (`taps`)."""

    backbone: str
    widths: Mapping[str, int]
    inner: Mapping[str, int]
    guide: int = 128
    head: int = 64
    shrinks: Mapping[str, int] | None = None
    taps: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        levels = set(self.widths)
        sources = [known for known in (self.shrinks, self.taps) if known is not None]
        if set(self.inner) != levels or len(sources) != 1 or set(sources[0]) != levels:
            raise SettingError(
                f"SATeCo has widths for {', '.join(self.widths)}, inner for {', '.join(self.inner)}: expected the same"
                " levels, and for each of them either its shrink (a UNet's half) or its tap (a VAE's)"
            )


@dataclass(frozen=True)
class Strengths:
    """How far SFA and TFA go: 0 is off, exactly; 1 is what was trained. Raises SettingError outside 0 to 2."""

    spatial: float = 1.0
    temporal: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("strength", self.spatial), ("temporal", self.temporal)):
            if not 0 <= value <= 2:
                raise SettingError(f"SATeCo's {name} is {value}: expected a number from 0 (off) to 2")

    @property
    def off(self) -> bool:
        """Whether nothing is changed."""
        return self.spatial == 0 and self.temporal == 0


FULL = Strengths()


class SFA(nn.Module):
    """Spatial feature adaptation of features `(n, c, h, w)` by a guide `(n, guide, h, w)`."""

    def __init__(self, width: int, guide: int) -> None:
        super().__init__()
        # One channel a group: each frame and channel by itself, so that a decoder in tiles can gather them.
        self.norm = nn.GroupNorm(width, width, affine=False)
        self.keep = nn.Parameter(torch.ones(width, 1, 1))
        self.modulate = nn.Conv2d(guide, 2 * width, 3, padding=1)
        nn.init.zeros_(self.modulate.weight)
        if self.modulate.bias is not None:
            nn.init.zeros_(self.modulate.bias)

    def modulated(self, n: Tensor, guide: Tensor, scale: Tensor) -> Tensor:
        """a (S(g) n + M(g)) of normalised features n."""
        gain, shift = self.modulate(guide).chunk(2, 1)
        return scale * (gain * n + shift)


class TFA(nn.Module):
    """Temporal feature alignment of clips `(n, t, h, w, c)`: within tubelets, first with themselves, then with the
    guide."""

    def __init__(self, width: int, inner: int, guide: int, head: int) -> None:
        super().__init__()
        self.inner = inner
        self.enter, self.leave = nn.Linear(width, inner), nn.Linear(inner, width)
        self.attention = TubeletAttention(inner, guide, head)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, f: Tensor, guide: Tensor, place: Place) -> Tensor:
        """What is added to features of deviation 1; the guide is `(n, t, h, w, guide)`."""
        return self.leave(self.attention(self.enter(f), guide, place))


class _Level(nn.Module):
    """SFA, then TFA, on features of `width` channels."""

    def __init__(self, name: str, shape: SATeCoShape) -> None:
        super().__init__()
        self.width = shape.widths[name]
        self.scale: Tensor
        self.register_buffer("scale", torch.ones(()))
        self.sfa = SFA(self.width, shape.guide)
        self.tfa = TFA(self.width, shape.inner[name], shape.guide, shape.head)

    def forward(self, f: Tensor, guide: Tensor, frames: int, strengths: Strengths, place: Place) -> Tensor:
        """Features `(clips * frames, c, h, w)` adapted."""
        if strengths.spatial:
            change = (self.sfa.keep - 1) * f + self.modulated(self.sfa.norm(f), guide)
            f = f + strengths.spatial * change
        return f + strengths.temporal * self.aligned(f, guide, frames, place) if strengths.temporal else f

    def modulated(self, n: Tensor, guide: Tensor) -> Tensor:
        """What SFA makes of normalised features."""
        return self.sfa.modulated(n, guide, self.scale)

    def aligned(self, f: Tensor, guide: Tensor, frames: int, place: Place) -> Tensor:
        """What TFA adds at strength 1."""
        clips = (rearrange(x, "(n t) c h w -> n t h w c", t=frames) for x in (f / self.scale, guide))
        return self.scale * rearrange(self.tfa(*clips, place), "n t h w c -> (n t) c h w")


class LatentGuide(nn.Module):
    """E_z: what LR latents `(n, 4, h, w)` of deviation 1 say at their own size and at each half of it that is asked
    for."""

    def __init__(self, width: int, shrinks: set[int]) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(4, width, 3, padding=1), ResidualBlock(width))
        halvings = max(shrinks).bit_length() - 1
        if any(shrink != 1 << (shrink.bit_length() - 1) for shrink in shrinks):
            raise SettingError(f"SATeCo's shrinks are {sorted(shrinks)}: expected powers of two")
        self.halve = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, stride=2, padding=1), ResidualBlock(width))
            for _ in range(halvings)
        )

    def forward(self, z: Tensor) -> dict[int, Tensor]:
        """By shrink."""
        found = {1: self.enter(z)}
        for index, half in enumerate(self.halve):
            found[2 << index] = half(found[1 << index])
        return found


class SATeCo(nn.Module):
    """One half of SATeCo: a UNet's, whose guide is made of the LR latents, or a VAE's, whose guide is what the frozen
    encoder sees of the upscaled video."""

    def __init__(self, shape: SATeCoShape) -> None:
        super().__init__()
        self.shape = shape
        self.levels = nn.ModuleDict({key_of(name): _Level(name, shape) for name in shape.widths})
        if shape.shrinks is not None:
            self.guide: nn.Module = LatentGuide(shape.guide, set(shape.shrinks.values()))
        else:
            taps = shape.taps or {}
            self.guide = nn.ModuleDict({key_of(name): nn.Conv2d(width, shape.guide, 1) for name, width in taps.items()})

    def guides(self, lr: Tensor) -> dict[str, Tensor]:
        """By level, of LR latents `(n, 4, h, w)` of deviation 1: the guide of a UNet's half."""
        if self.shape.shrinks is None:
            raise SettingError("this half of SATeCo is a VAE's: expected a UNet's, whose guide is made of latents")
        found = self.guide(lr)
        return {name: found[shrink] for name, shrink in self.shape.shrinks.items()}

    def guide_of(self, level: str, tap: Tensor) -> Tensor:
        """Of what the encoder sees at a level `(n, tap, h, w)`: the guide of a VAE's half."""
        return cast(nn.ModuleDict, self.guide)[key_of(level)](tap)

    def part(self, level: str) -> _Level:
        """The adapters of one level; they move between devices with this module."""
        return self._level(level)

    def forward(
        self,
        level: str,
        features: Tensor,
        guide: Tensor,
        frames: int,
        strengths: Strengths = FULL,
        place: Place | None = None,
    ) -> Tensor:
        """Features `(clips * frames, c, h, w)` adapted by a guide of their size, in their dtype; the same tensor where
        both strengths are 0. All frames of a clip see each other. `place` says where a tile lies in its frame. Raises
        SettingError for an unknown level, another width, or a guide of another size."""
        block = self._level(level, features)
        if strengths.off:
            return features
        if guide.shape[-2:] != features.shape[-2:] or len(guide) != len(features):
            raise SettingError(
                f"SATeCo's guide at {level} is {len(guide)} frames of {guide.shape[-1]}x{guide.shape[-2]}, the features"
                f" {len(features)} of {features.shape[-1]}x{features.shape[-2]}: expected the same; give the LR latents"
                " of this very video"
            )
        given = features.to(block.tfa.enter.weight.dtype)
        here = place or Place(0, 0, features.shape[-2], features.shape[-1])
        return block(given, guide.to(given), frames, strengths, here).to(features.dtype)

    def over_time(
        self,
        level: str,
        features: Tensor,
        guide: Tensor,
        frames: int,
        strengths: Strengths = FULL,
        cuts: Sequence[int] = (),
    ) -> Tensor:
        """`forward` of videos `(videos * frames, c, h, w)` of any length, with the guide of one of them or of each: in
        windows of at most WINDOW frames that share a quarter and are blended there, none across a cut."""
        guide = guide.repeat(len(features) // len(guide), 1, 1, 1)
        windows = windows_of(frames, cuts)
        if len(windows) == 1:
            return self(level, features, guide, frames, strengths)
        videos, guides = (rearrange(x, "(n t) c h w -> n t c h w", t=frames) for x in (features, guide))
        out, end = videos.clone(), 0
        for span in windows:
            part, own = (x[:, span.slice].flatten(0, 1) for x in (videos, guides))
            made = rearrange(self(level, part, own, span.length, strengths), "(n t) c h w -> n t c h w", t=span.length)
            shared = max(end - span.start, 0)
            weight = torch.linspace(0, 1, shared + 2, device=made.device, dtype=made.dtype)[1:-1].view(-1, 1, 1, 1)
            made[:, :shared] = torch.lerp(out[:, span.start : end], made[:, :shared], weight)
            out[:, span.slice], end = made, span.stop
        return rearrange(out, "n t c h w -> (n t) c h w")

    @torch.no_grad()
    def settle(self, features: Mapping[str, Tensor]) -> None:
        """Sets the scale to the deviation of these features `(n, width, h, w)`, by level: before training."""
        for level, value in features.items():
            self._level(level, value).scale.copy_(value.float().std())

    def check_fits(self, backbone: str, widths: Mapping[str, int]) -> None:
        """Raises SettingError unless the model is of its backbone and `widths` by level are its own."""
        check_half("SATeCo", self, backbone, widths)

    def _level(self, level: str, features: Tensor | None = None) -> _Level:
        return cast(_Level, level_of("SATeCo", self, self.levels, level, features))


def windows_of(frames: int, cuts: Sequence[int] = ()) -> list[Span]:
    """A video's frames in windows of at most WINDOW, which share a quarter, none across a cut."""
    scenes = pairwise([0, *cuts, frames])
    return [Span(a + part.start, a + part.stop) for a, b in scenes for part in spans(b - a, WINDOW, OVERLAP)]


@dataclass(frozen=True)
class HostSATeCo:
    """A decoder's SATeCo (None: the file has none for it), and how far it goes."""

    model: SATeCo | None
    strengths: Strengths


@contextmanager
def attached(
    model: SATeCo, unet: nn.Module, told: Callable[[], tuple[Tensor, int]], strengths: Strengths
) -> Generator[None, None, None]:
    """Within, the levels of a diffusers UNet's decoder go through `model`. `told` is asked at every call of the UNet
    for the LR latents, of deviation 1, of what is evaluated, and how many frames a video has there."""
    guides: dict[str, Tensor] = {}
    frames = 1

    def begin(module: nn.Module, inputs: object) -> None:
        nonlocal frames
        lr, frames = told()
        guides.update(model.guides(lr))

    def hook(level: str) -> Any:
        def adapt(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
            return model.over_time(level, output, guides[level], frames, strengths)

        return adapt

    handles = [unet.register_forward_pre_hook(begin)]
    handles += [unet.get_submodule(level).register_forward_hook(hook(level)) for level in model.shape.widths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
