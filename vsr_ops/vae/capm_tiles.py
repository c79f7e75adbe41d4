"""CAPM in a decoder of tiles: every tile takes its frame's weights of the prompts, and its own part of them.

Where a frame's compression level is known, its weights are. Where it is not, they come from d, a mean over the picture:
it is gathered over the tiles' own parts and estimated by the mosaic, pass by pass, as the group norms' statistics are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from ..modules.capm import CAPM, CODE_STRIDE
from ..modules.windows import WINDOW, Place
from .group_norm import exact
from .layout import DecoderOp
from .places import Box
from .sweeps import At, Sweep


@dataclass
class TiledCAPM:
    """A CAPM with its `strength`, and by level of the decoder: `used`, the d that tiles take; `seen`, what this pass
    gathered of it over the tiles, as a sum and a count; `sketch`, that of the mosaic, and `offset`, what has to be
    added to it to give the whole picture's. `sketching` is whether the mosaic is being run."""

    model: CAPM
    strength: float
    used: dict[str, Tensor] = field(default_factory=lambda: {})
    seen: dict[str, tuple[Tensor, int]] = field(default_factory=lambda: {})
    sketch: dict[str, Tensor] = field(default_factory=lambda: {})
    offset: dict[str, Tensor] = field(default_factory=lambda: {})
    sketching: bool = False

    def op(self, name: str, level: int) -> DecoderOp:
        """The prompts after the level `name` of the decoder, whose output lies on `level` of the picture."""
        modules, run = (self.model.part(name),), partial(self._run, name)
        return DecoderOp(
            f"{name}_capm",
            modules,
            lambda x: x,
            level,
            window=WINDOW,
            placed=run,
            sweeps=lambda: self._sweeps(name, DecoderOp("", modules, lambda x: x, level).reach),
        )

    def _sweeps(self, name: str, reach: int) -> list[Sweep]:
        """One that gathers d, where a frame's level is not known, and one that applies the prompts."""

        def gather(x: Tensor, beside: Tensor | None, at: At) -> None:
            if at.hint is None or bool(at.hint.isnan().any()):
                self._codes(name, x, at.place, at.own)

        def apply(x: Tensor, beside: Tensor | None, at: At) -> Tensor:
            code = self.model.told(name, at.hint, lambda: self._taken(name))
            return self.model(name, x, weights=self.model.weigh(name, code), strength=self.strength, place=at.place)

        return [
            Sweep(gather, writes=None, reach=reach, window=WINDOW, ends=self._known),
            Sweep(apply, reach=reach, window=WINDOW),
        ]

    def _known(self) -> None:
        """Ends a sweep that gathered: what was seen is what there is."""
        self.used.update({name: total / count for name, (total, count) in self.seen.items()})
        self.seen = {}

    def _run(self, name: str, x: Tensor, place: Place | None, own: Box | None, hint: Tensor | None) -> Tensor:
        """Features `x` at `place` of their picture (None: all of it); `own` is the part of the picture to gather,
        `hint` the frames' compression levels, NaN where unknown; None where all are."""
        if own is None or place is None:
            weights = self.model.weights(name, x, hint)
        else:
            weights = self.model.weigh(name, self.model.told(name, hint, lambda: self._code(name, x, place, own)))
        return self.model(name, x, weights=weights, strength=self.strength, place=place)

    def _code(self, name: str, x: Tensor, place: Place, own: Box) -> Tensor:
        """d of the whole picture as far as it is known; what lies in `own` is gathered."""
        inner = self._codes(name, x, place, own)
        if self.sketching:
            self.sketch[name] = inner.mean((2, 3))
            self.used[name] = self.sketch[name] + self.offset.get(name, 0)
        return self._taken(name)

    def _taken(self, name: str) -> Tensor:
        """The d that tiles take, as the model computes."""
        return self.used[name].to(next(self.model.parameters()))

    def _codes(self, name: str, x: Tensor, place: Place, own: Box) -> Tensor:
        """What d is the mean of, in `own`; gathered where no mosaic is run."""
        codes = self.model.codes(name, x)
        rows, cols = (
            slice(-(-(span.start - start) // CODE_STRIDE), -(-(span.stop - start) // CODE_STRIDE))
            for span, start in zip(own, (place.top, place.left), strict=True)
        )
        inner = exact(codes[..., rows, cols])
        if not self.sketching:
            total, count = self.seen.get(name, (0, 0))
            self.seen[name] = (total + inner.sum((2, 3)), count + inner[0, 0].numel())
        return inner

    def settle(self) -> list[Tensor]:
        """Ends a pass over the tiles; returns by how much the d they took was off what they saw, as a share, level by
        level."""
        moved: list[Tensor] = []
        for name, (total, count) in self.seen.items():
            mean = total / count
            apart = (self.used[name] - mean).abs().amax()
            moved.append(apart / mean.square().mean().sqrt().clamp(min=1e-6))
            self.offset[name] = mean - self.sketch[name]
            self.used[name] = mean
        self.seen = {}
        return moved

    def lend(self) -> None:
        """Leaves the last frame's offsets for the next frames to begin with."""
        self.offset = {name: offset[-1:] for name, offset in self.offset.items()}
