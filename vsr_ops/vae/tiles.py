"""A picture or video VAE's decoder in spatial tiles that give the picture of one pass.

A tile needs two kinds of things from outside itself.

Convolutions reach a few pixels. Each tile is cut with exactly the margin that its layers reach, worked out backwards
from its own pixels, and is cropped as the need shrinks.

Group norms reach the whole picture: all tiles take one set of means and variances, gathered over every tile's own
pixels. A norm's are right only once all norms before it are. Where there is room to keep every tile until then, all
step from one norm to the next together, and each is computed once (`lockstep`). Where there is not, for that room grows
with the picture, all tiles are run again, each time with what the last pass saw, until nothing moves; after n passes
the first n norms are exact, so this ends. To end after about four passes, a mosaic, one tile in size, of runs of
latents from all over the picture goes before each of them: it estimates every norm in one go, corrected by how far the
picture's statistics were off the mosaic's in the pass before. The corrections serve the next frames of the scene too.

In passes nothing is ever held but the picture, the latents' own level (1/64 of the area: what comes before the first
doubling runs over whole frames), one tile's activations and, where they fit, the encoder's features of the reference. A
picture of one tile takes one pass, through the VAE's own modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby, product
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..sampling.tiling import Span
from ..system.precision import widen
from .budget import features_bytes, home_of_kept, kept_bytes
from .capm_tiles import TiledCAPM
from .decoder_modules import DecoderModules
from .group_norm import Statistics
from .layout import DecoderOp, cell_of
from .lockstep import Arena, Lockstep
from .passes import Features, run_passes, walk
from .places import (
    Box,
    Tap,
    at_level,
    axis_parts,
    crop,
    magnified,
    mosaic_index,
    needed_boxes,
    pick,
)
from .sweeps import frame_by_frame, sweeps_of


class ComputedIn(NamedTuple):
    """Where a decoder computes, and in what: its weights may lie elsewhere, in another precision, until they are
    used."""

    device: torch.device
    dtype: torch.dtype


@dataclass
class TiledDecoder:
    """One VAE's decoder with what stands beside it: `tail` and `encoder` run over tiles, and so does `head`, at the
    latents' own level, where each is computed once; else it runs over whole frames."""

    vae: Any
    head: list[DecoderOp]
    tail: list[DecoderOp]
    encoder: list[DecoderOp]
    modules: DecoderModules
    tile: int
    tolerance: float
    kept: float | None
    check_interrupted: Callable[[], None]
    prompts: TiledCAPM | None = None
    computed_in: ComputedIn | None = None

    def __post_init__(self) -> None:
        self.of_tail, self.of_encoder = Statistics(self.tail), Statistics(self.encoder)
        self.cell = cell_of(self.vae)
        self.arena: Arena | None = None

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._in(self.vae.decoder).device

    def _in(self, half: nn.Module) -> ComputedIn:
        """Where the VAE's decoder or encoder computes."""
        weight = next(cast("Iterator[Tensor]", half.parameters()))
        return self.computed_in or ComputedIn(weight.device, weight.dtype)

    def _there(self, x: Tensor) -> Tensor:
        return x.to(*self._in(self.vae.decoder))

    def widen(self, vae: Any) -> bool:
        """As `precision.widen`, but not where it was said what to compute in; what was gathered is forgotten."""
        self.forget()
        return self.computed_in is None and widen(vae)

    def forget(self) -> None:
        """A new scene: nothing is known of its statistics."""
        self.of_tail.offset, self.of_encoder.offset = {}, {}
        if self.prompts is not None:
            self.prompts.offset = {}

    def _begin(self, z: Tensor, hint: Tensor | None) -> Tensor:
        """All frames through `head`."""
        for step in self.head:
            z = step.run(z) if step.placed is None else step.placed(z, None, None, hint)
        return z

    def __call__(self, latents: Tensor, reference: Tensor | None, hint: Tensor | None = None) -> Tensor:
        """Frames `(t, 3, h, w)` of latents that may see each other, [0, 1], not clamped. `hint` are their compression
        levels `(t,)`, NaN where unknown; None where all are."""
        z = self._there(latents)
        if (post := getattr(self.vae, "post_quant_conv", None)) is not None:
            z = post(z)
        extent = (latents.shape[-2] * self.cell, latents.shape[-1] * self.cell)
        out = torch.empty((latents.shape[0], self._channels, *extent), device=latents.device)
        down, across = (axis_parts(side, self.tile, self.cell) for side in latents.shape[-2:])
        tiles = list(product(down, across))
        if len(tiles) == 1:
            z = self._begin(z, hint).to(latents.device)
            self._put(out, tiles[0], self._tile(z, reference, tiles[0], extent, hint, gather=False))
            return out
        if (arena := self._room(latents)) is not None:
            self._once(arena, z, reference, hint, out)
            return out
        z, known = self._begin(z, hint).to(latents.device), self._known(latents)
        little = [mosaic_index(side, self.tile) for side in latents.shape[-2:]]
        rows, cols = (Span(0, index.numel() * self.cell) for index in little)
        size = (rows.stop, cols.stop)
        mosaic = pick(z, little)
        seen = None if reference is None else pick(reference, [magnified(index, self.cell) for index in little])
        if reference is not None and seen is not None:
            run_passes(
                self.of_encoder,
                lambda: self._see(seen, (rows, cols), size),
                lambda: [self._see(reference, tile, extent) for tile in tiles],
                self.tolerance,
            )
        with self.of_encoder.applied():
            run_passes(
                self.of_tail,
                lambda: self._tile(mosaic, seen, (rows, cols), size, hint, known=known),
                lambda: [
                    self._put(out, tile, self._tile(z, reference, tile, extent, hint, known=known)) for tile in tiles
                ],
                self.tolerance,
                self.prompts,
            )
        for gathered in (self.of_tail, self.of_encoder, self.prompts):
            if gathered is not None:
                gathered.lend()
        return out

    def _room(self, latents: Tensor) -> Arena | None:
        """Memory for whole activations, where there is enough and the steps are known to be made of sweeps."""
        if self.arena is None and sweeps_of([*self.encoder, *self.tail]) is not None:
            itemsize = self._in(self.vae.decoder).dtype.itemsize
            needed = kept_bytes(self.vae, self.modules, latents.shape[0], latents.shape[-2:], itemsize)
            home = home_of_kept(needed, self.device, self.kept)
            self.arena = None if home is None else Arena(home, self.device.type == "cpu")
        return self.arena

    def _known(self, latents: Tensor) -> dict[tuple[Box, tuple[int, int]], Features] | None:
        """For what the encoder makes of each tile, which no later pass changes; None where there is no room."""
        itemsize = self._in(self.vae.encoder).dtype.itemsize
        needed = features_bytes(self.vae, self.modules, latents.shape[0], latents.shape[-2:], itemsize)
        return {} if home_of_kept(needed, self.device, self.kept) == self.device else None

    def _once(self, arena: Arena, z: Tensor, reference: Tensor | None, hint: Tensor | None, out: Tensor) -> None:
        """Every tile once, from one group norm to the next."""
        steps = Lockstep(self.device, arena, self.check_interrupted, self.tile * self.cell)
        features = {} if reference is None else self._whole_features(steps, reference)
        head, tail = sweeps_of(self.head), sweeps_of(self.tail) or []
        if head is None:
            z = self._begin(z, hint).to(out.device)
        together, alone, last = frame_by_frame([*(head or []), *tail])
        if len(alone) < 2 or len(z) == 1:
            steps.run([*together, *alone, *last], z, partial(self._put, out), hint, features)
            return
        x = steps.run(together, z, None, hint, features)
        assert x is not None
        frames: list[Tensor] = []
        for i in range(len(z)):
            # A copy, whose room nobody takes back.
            frame = x[i : i + 1].clone()
            if last:
                made = steps.run(alone, frame)
                assert made is not None
                frames.append(made.clone())
                arena.give(made)
            else:
                steps.run(alone, frame, partial(self._put, out[i : i + 1]))
        arena.give(x)
        if last:
            steps.run(last, torch.cat(frames), partial(self._put, out))

    def _whole_features(self, steps: Lockstep, reference: Tensor) -> dict[str, Tensor]:
        """What the encoder makes of whole frames, one by one, by the steps that it goes into."""
        found: dict[str, list[Tensor]] = {step.name: [] for step in self.tail if step.guided is not None}
        for frame in reference:
            x = frame[None].to(*self._in(self.vae.encoder)) * 2 - 1
            for level, part in groupby(self.encoder, lambda step: step.level + (step.resize < 0)):
                x = steps.run(sweeps_of(list(part)) or [], x)
                assert x is not None
                for step in self.tail:
                    if step.guided is not None and step.level == level:
                        found[step.name].append(x.clone())
            steps.arena.give(x)
        return {name: torch.cat(frames) for name, frames in found.items()}

    @property
    def _channels(self) -> int:
        return next(int(part.out_channels) for part in self.tail[-1].modules if isinstance(part, nn.Conv2d))

    def _put(self, out: Tensor, tile: Box, x: Tensor) -> None:
        out[..., tile[0].slice, tile[1].slice] = (x.float() / 2 + 0.5).to(out.device)

    def _tile(
        self,
        z: Tensor,
        reference: Tensor | None,
        tile: Box,
        extent: tuple[int, int],
        hint: Tensor | None,
        gather: bool = True,
        known: dict[tuple[Box, tuple[int, int]], Features] | None = None,
    ) -> Tensor:
        """The decoder's picture of one tile, in [-1, 1], of whole latent-level activations `z`; what the encoder made
        of it before, in a picture of the size, is `known`, where there is room to keep it."""
        self.check_interrupted()
        boxes = needed_boxes(self.tail, tile, extent)
        fused = {
            step.name: Tap(step.level, box)
            for step, box in zip(self.tail, boxes, strict=False)
            if step.guided is not None
        }
        features: Features = {}
        if reference is not None:
            features = (known or {}).get((tile, extent)) or self._features(reference, fused, extent)
            if known is not None:
                # Copies: a view would keep all around it.
                known.setdefault((tile, extent), {name: value.clone() for name, value in features.items()})
        rows, cols = boxes[0]
        x = self._there(z[..., rows.slice, cols.slice])
        return walk(self.tail, x, boxes, features, self.of_tail, extent, tile if gather else None, hint=hint)[0]

    def _see(self, reference: Tensor, tile: Box, extent: tuple[int, int]) -> None:
        """One tile of the reference, for the encoder's statistics."""
        self.check_interrupted()
        boxes = needed_boxes(self.encoder, at_level(tile, self.encoder[-1].level), extent)
        walk(self.encoder, self._cut(reference, boxes[0]), boxes, {}, self.of_encoder, extent, tile)

    def _features(self, reference: Tensor, taps: Mapping[str, Tap], extent: tuple[int, int]) -> Features:
        last = self.encoder[-1].level
        deepest = {name: tap.box for name, tap in taps.items() if tap.level == last}
        (first, *more) = deepest.values()
        rows, cols = (
            Span(min(box[axis].start for box in (first, *more)), max(box[axis].stop for box in (first, *more)))
            for axis in (0, 1)
        )
        boxes = needed_boxes(self.encoder, (rows, cols), extent, taps.values())
        x = self._cut(reference, boxes[0])
        x, features = walk(self.encoder, x, boxes, {}, self.of_encoder, extent, taps=taps)
        return {**features, **{name: crop(x, (rows, cols), box) for name, box in deepest.items()}}

    def _cut(self, reference: Tensor, box: Box) -> Tensor:
        return reference[..., box[0].slice, box[1].slice].to(*self._in(self.vae.encoder)) * 2 - 1
