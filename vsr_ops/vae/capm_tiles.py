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
from .layout import Box, DecoderOp


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
        run = partial(self._run, name)
        return DecoderOp(f"{name}_capm", (self.model.part(name),), lambda x: x, level, window=WINDOW, placed=run)

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
        codes = self.model.codes(name, x)
        rows, cols = (
            slice(-(-(span.start - start) // CODE_STRIDE), -(-(span.stop - start) // CODE_STRIDE))
            for span, start in zip(own, (place.top, place.left), strict=True)
        )
        inner = exact(codes[..., rows, cols])
        if self.sketching:
            self.sketch[name] = inner.mean((2, 3))
            self.used[name] = self.sketch[name] + self.offset.get(name, 0)
        else:
            total, count = self.seen.get(name, (0, 0))
            self.seen[name] = (total + inner.sum((2, 3)), count + inner[0, 0].numel())
        return self.used[name].to(codes)

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
