"""A picture or video VAE's decoder in spatial tiles that give the picture of one pass.

What a tile needs from outside is of two kinds. Convolutions reach a few pixels: each tile is cut with exactly the
margin that its steps reach, worked out backwards from its own pixels, and is cropped as the need shrinks. Group norms
reach the whole picture: they take one set of means and variances, gathered over the own pixels of all tiles. A norm's
can only be known when all norms before it are right, and keeping every tile until then would take memory that grows
with the picture. So the passes over the tiles are repeated, each with what the one before it saw, until nothing moves.
After n passes the first n norms are exact, so that this ends; to end after about four, a mosaic of runs of latents from
all over the picture, one tile in size, foretells every pass: the next statistics are the mosaic's own, norm by norm in
one go, offset by as much as the picture's were off the mosaic's in the pass before. The offsets also serve the next
frames of the scene. Nothing but the picture, the latents' own level (1/64 of the area: the convolutions and attention
before the first doubling run over whole frames) and one tile's activations is ever held. A picture of one tile takes
one pass, through the VAE's own modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, product
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from .capm import CAPM, Place
from .capm_hints import check_hint, check_strength
from .cfw import CFW, check_w
from .decode_layout import (
    Box,
    Step,
    at_level,
    axis_parts,
    backbone_of,
    cell_of,
    crop,
    is_temporal,
    layout_of,
    level_widths,
    magnified,
    mosaic_index,
    needed_boxes,
    output_name,
    output_widths,
    pick,
    residual_widths,
    resized,
)
from .decode_prompts import Prompts
from .decode_statistics import Statistics
from .errors import SettingError
from .latents import VAE_OVERLAP, VAE_TILE, collect, pad_to
from .stam import STAM
from .tiling import Span, spans

#: Frames that see each other: what SVD's decoder was trained on.
CHUNK = 14
#: Passes end when no group's mean or deviation moves by more than this share of the deviation: 4 or 5 passes, and a
#: picture within 1e-3 of that of one pass. At 1e-2 it is about a pass less, and within 2/255.
TOLERANCE = 1e-3


class Video(Protocol):
    """Frames `(n, 3, H, W)` in [0, 1], asked for by slices in their order: a tensor, or what reads them by then."""

    @property
    def shape(self) -> torch.Size: ...

    def __getitem__(self, frames: slice, /) -> Tensor: ...


#: A UNet's latents are whole multiples of at most so many, so the picture may be so many smaller than they are.
FACTOR = 8

Features = Mapping[int, Tensor]
"""What the encoder makes of the reference, by level: 0 is the picture's resolution, 1 half of it ..."""


def _walk(
    steps: Sequence[Step],
    x: Tensor,
    boxes: Sequence[Box],
    features: Features,
    statistics: Statistics,
    extent: tuple[int, int],
    own: Box | None = None,
    taps: Mapping[int, Box] | None = None,
) -> tuple[Tensor, dict[int, Tensor]]:
    """One tile through `steps`: what comes out over the last of `boxes`, and the features over `taps`.

    `extent` is the whole picture's size, `own` the part of it that is this tile's alone, for the statistics to be
    gathered from.
    """
    tapped: dict[int, Tensor] = {}
    for index, step in enumerate(steps):
        have = boxes[index]
        if taps and step.resize < 0 and step.level in taps:
            tapped[step.level] = crop(x, have, taps[step.level])
        statistics.inner = None
        if own is not None:
            rows, cols = (
                slice(o.start - h.start, o.stop - h.start) for o, h in zip(at_level(own, step.level), have, strict=True)
            )
            statistics.inner = (rows, cols)
        if step.placed is not None:
            place = Place(have[0].start, have[1].start, extent[0] >> step.level, extent[1] >> step.level)
            x = step.placed(x, place, None if own is None else at_level(own, step.level))
        else:
            x = step.run(x) if step.fuse is None else step.fuse(features[step.level], x)
        rows, cols = (resized(span, step.resize) for span in have)
        x = crop(x, (rows, cols), boxes[index + 1])
    return x, tapped


@dataclass
class _Decoder:
    """One VAE's decoder with what stands beside it. `head` runs over whole frames, `tail` and `encoder` over tiles."""

    vae: Any
    head: list[Step]
    tail: list[Step]
    encoder: list[Step]
    tile: int
    tolerance: float
    alive: Callable[[], None]
    prompts: Prompts | None = None

    def __post_init__(self) -> None:
        self.of_tail, self.of_encoder = Statistics(self.tail), Statistics(self.encoder)
        self.parameter = next(cast("Iterator[Tensor]", self.vae.decoder.parameters()))
        self.cell = cell_of(self.vae)

    def forget(self) -> None:
        """A new scene: nothing is known of its statistics."""
        self.of_tail.offset, self.of_encoder.offset = {}, {}
        if self.prompts is not None:
            self.prompts.offset = {}

    def _begin(self, latents: Tensor) -> Tensor:
        """All frames through `head`, kept where the latents are."""
        z = latents.to(self.parameter)
        if (post := getattr(self.vae, "post_quant_conv", None)) is not None:
            z = post(z)
        for step in self.head:
            z = step.run(z)
        return z.to(latents.device)

    def __call__(self, latents: Tensor, reference: Tensor | None) -> Tensor:
        """Frames `(t, 3, h, w)` of latents that may see each other, [0, 1], not clamped."""
        z = self._begin(latents)
        extent = (latents.shape[-2] * self.cell, latents.shape[-1] * self.cell)
        out = torch.empty((latents.shape[0], self._channels, *extent), device=latents.device)
        down, across = (axis_parts(side, self.tile, self.cell) for side in latents.shape[-2:])
        tiles = list(product(down, across))
        if len(tiles) == 1:
            self._put(out, tiles[0], self._tile(z, reference, tiles[0], extent, gather=False))
            return out
        little = [mosaic_index(side, self.tile) for side in latents.shape[-2:]]
        rows, cols = (Span(0, index.numel() * self.cell) for index in little)
        size = (rows.stop, cols.stop)
        mosaic = pick(z, little)
        seen = None if reference is None else pick(reference, [magnified(index, self.cell) for index in little])
        if reference is not None and seen is not None:
            self._passes(
                self.of_encoder,
                lambda: self._see(seen, (rows, cols), size),
                lambda: [self._see(reference, tile, extent) for tile in tiles],
            )
        with self.of_encoder.applied():
            self._passes(
                self.of_tail,
                lambda: self._tile(mosaic, seen, (rows, cols), size),
                lambda: [self._put(out, tile, self._tile(z, reference, tile, extent)) for tile in tiles],
                self.prompts,
            )
        for known in (self.of_tail, self.of_encoder, self.prompts):
            if known is not None:
                known.lend()
        return out

    @property
    def _channels(self) -> int:
        return next(int(part.out_channels) for part in self.tail[-1].modules if isinstance(part, nn.Conv2d))

    def _passes(
        self,
        statistics: Statistics,
        sketch: Callable[[], object],
        run: Callable[[], object],
        prompts: Prompts | None = None,
    ) -> None:
        """Runs until the statistics stand still; at the latest when the last norm's are exact."""
        gathered: list[Statistics | Prompts] = [statistics] if prompts is None else [statistics, prompts]
        unknown = len(statistics.norms) + (0 if prompts is None else len(prompts.model.shape.widths))
        with statistics.applied():
            for _ in range(unknown + 1):
                for part in gathered:
                    part.sketching = True
                sketch()
                for part in gathered:
                    part.sketching = False
                run()
                if max([part.settle() for part in gathered]) <= self.tolerance:
                    return

    def _put(self, out: Tensor, tile: Box, x: Tensor) -> None:
        out[..., tile[0].slice, tile[1].slice] = (x.float() / 2 + 0.5).to(out.device)

    def _tile(
        self, z: Tensor, reference: Tensor | None, tile: Box, extent: tuple[int, int], gather: bool = True
    ) -> Tensor:
        """The decoder's picture of one tile, in [-1, 1], of whole latent-level activations `z`."""
        self.alive()
        boxes = needed_boxes(self.tail, tile, extent)
        fused = {step.level: box for step, box in zip(self.tail, boxes, strict=False) if step.fuse is not None}
        features: Features = {}
        if reference is not None:
            features = self._features(reference, fused, extent)
        rows, cols = boxes[0]
        x = z[..., rows.slice, cols.slice].to(self.parameter)
        return _walk(self.tail, x, boxes, features, self.of_tail, extent, tile if gather else None)[0]

    def _see(self, reference: Tensor, tile: Box, extent: tuple[int, int]) -> None:
        """One tile of the reference, for the encoder's statistics."""
        self.alive()
        boxes = needed_boxes(self.encoder, at_level(tile, self.encoder[-1].level), extent)
        _walk(self.encoder, self._cut(reference, boxes[0]), boxes, {}, self.of_encoder, extent, tile)

    def _features(self, reference: Tensor, taps: Mapping[int, Box], extent: tuple[int, int]) -> Features:
        deepest = self.encoder[-1].level
        boxes = needed_boxes(self.encoder, taps[deepest], extent, taps)
        x = self._cut(reference, boxes[0])
        last, features = _walk(self.encoder, x, boxes, {}, self.of_encoder, extent, taps=taps)
        return {**features, deepest: last}

    def _cut(self, reference: Tensor, box: Box) -> Tensor:
        return reference[..., box[0].slice, box[1].slice].to(self.parameter) * 2 - 1


def _assemble(
    vae: Any,
    tile: int,
    stam: STAM | None,
    cfw: CFW | None,
    w: float,
    prompts: Prompts | None,
    tolerance: float,
    alive: Callable[[], None],
) -> _Decoder:
    layout = layout_of(vae)
    steps: list[Step] = []
    plain = layout.decoder(vae.decoder)
    for index, step in enumerate(plain):
        steps.append(step)
        if stam is not None and step.name in stam.names:
            block = stam.block(step.name)
            steps.append(replace(step, name=f"{step.name}_stam", modules=(block,), run=block, residual=False))
        if cfw is not None and step.residual and step.level in cfw.shape.levels and not plain[index + 1].residual:
            fuse = partial(cfw.fuse, step.level, w=w)
            modules = (cfw.layer(step.level),)
            steps.append(Step(f"fuse_{step.level}", modules, lambda x: x, step.level, fuse=fuse))
        if prompts is not None and (step.resize or index == len(plain) - 2):
            name = output_name(plain[0].level, step)
            # One that does not act would only widen the margins, and so the rounding.
            if name in prompts.model.shape.widths and prompts.model.acts(name):
                steps.append(prompts.step(name, step.level - step.resize))
    split = next((index for index, step in enumerate(steps) if step.resize), len(steps) - 1)
    encoder: list[Step] = []
    if cfw is not None:
        deepest = max(cfw.shape.levels)
        all_steps = layout.encoder(vae.encoder)
        last = max(index for index, step in enumerate(all_steps) if step.residual and step.level == deepest)
        encoder = all_steps[: last + 1]
    return _Decoder(vae, steps[:split], steps[split:], encoder, tile, tolerance, alive, prompts)


def stream_decode(
    vae: Any,
    latents: Tensor,
    cuts: Sequence[int] = (),
    *,
    reference: Video | None = None,
    cfw: CFW | None = None,
    w: float = 0.75,
    stam: STAM | None = None,
    capm: CAPM | None = None,
    levels: Tensor | None = None,
    strength: float = 1.0,
    chunk: int = CHUNK,
    tile: int = VAE_TILE,
    tolerance: float = TOLERANCE,
    alive: Callable[[], None] = lambda: None,
) -> Iterator[Tensor]:
    """Frames `(3, 8h, 8w)` in [0, 1], not clamped, of unscaled latents `(n, 4, h, w)`, one by one.

    `vae` is diffusers' or a host's autoencoder module. Where frames see each other (SVD's decoder, or `stam`), they go
    in fixed chunks of `chunk` that overlap by a quarter and are blended, none across a cut; else one by one. Tiles are
    of at most `tile` latents a side. `cfw` mixes in what the encoder makes of `reference`, a video `(n, 3, H, W)` in
    [0, 1] of the picture's size, or under eight latents smaller; w = 0 is the decoder without it. `capm` is told the
    frames' compression `levels` `(n,)`, NaN where unknown: there it reads them in the whole frame's features; strength
    0 is the decoder without it. `alive` is called before every tile and may raise to end the work.

    Raises SettingError for a `w` outside [0, 1], a `strength` outside [0, 2], a missing or unfitting reference, levels
    that are not one a frame, modules made for another backbone or other widths, and a VAE of no known layout.
    """
    check_w(w)
    check_strength(strength)
    if latents.ndim != 4 or latents.shape[0] == 0:
        raise SettingError(f"the latent has shape {tuple(latents.shape)}: expected (frames, 4, height, width)")
    if tile < 1 or chunk < 1:
        raise SettingError(f"tile is {tile} latents and chunk {chunk} frames: expected at least 1 of each")
    if stam is not None:
        stam.check_fits(backbone_of(vae), residual_widths(vae))
    if cfw is None or w == 0:
        cfw = reference = None
    else:
        cfw.check_fits(backbone_of(vae), level_widths(vae))
    prompts: Prompts | None = None
    if capm is not None and strength != 0:
        capm.check_fits(f"{backbone_of(vae)}-vae", output_widths(vae))
        _check_levels(latents, levels)
        prompts = Prompts(capm, strength)
    decoder = _assemble(vae, tile, stam, cfw, w, prompts, tolerance, alive)
    if cfw is not None:
        _check_reference(latents, reference, decoder.cell)
    together = stam is not None or is_temporal(vae.decoder)
    return _stream(decoder, latents, reference, levels, cuts, chunk if together else 1)


def stream_video(
    vae: Any,
    latents: Tensor,
    cuts: Sequence[int] = (),
    size: tuple[int, int] | None = None,
    tick: Callable[[int], None] = lambda done: None,
    **settings: Any,
) -> Tensor:
    """Frames `(n, 3, height, width)` in [0, 1] of unscaled latents, cropped to `size`; `settings` as `stream_decode`'s.

    Raises SettingError as `stream_decode`, for latents that hold NaN, and for a size that they do not cover.
    """
    return collect(stream_decode(vae, latents, cuts, **settings), latents, cell_of(vae), size, tick)


def _check_levels(latents: Tensor, levels: Tensor | None) -> None:
    if levels is None:
        return
    check_hint(levels)
    if levels.shape[0] != latents.shape[0]:
        raise SettingError(
            f"levels are {levels.shape[0]} compression levels, the latent is of {latents.shape[0]} frames: expected one"
            " a frame; estimate them on the video that was upscaled"
        )


def _check_reference(latents: Tensor, reference: Video | None, cell: int) -> None:
    if reference is None:
        raise SettingError("CFW needs a reference: give the upscaled video that was encoded, or set w to 0")
    sides = [(cell * (z - FACTOR), cell * z) for z in latents.shape[-2:]]
    fits = all(low < side <= high for (low, high), side in zip(sides, reference.shape[-2:], strict=True))
    if not fits or reference.shape[0] != latents.shape[0]:
        raise SettingError(
            f"the reference is {tuple(reference.shape)} (frames, channels, height, width), the latent is"
            f" {latents.shape[0]} frames of {sides[0][1]} x {sides[1][1]}: expected the same video"
        )


@torch.no_grad()
def _stream(
    decoder: _Decoder,
    latents: Tensor,
    reference: Video | None,
    levels: Tensor | None,
    cuts: Sequence[int],
    chunk: int,
) -> Iterator[Tensor]:
    for first, end in pairwise([0, *cuts, latents.shape[0]]):
        decoder.forget()
        windows = spans(end - first, chunk, VAE_OVERLAP if chunk > 1 else 0.0)
        held: Tensor | None = None
        for n, window in enumerate(windows):
            frames = slice(first + window.start, first + window.stop)
            z = latents[frames]
            seen = None if reference is None else _padded(reference[frames], z, decoder.cell)
            if decoder.prompts is not None:
                decoder.prompts.hint = None if levels is None else levels[frames]
            out = decoder(z, seen)
            if held is not None:
                # Linear cross-fade over the frames both chunks hold.
                shared = held.shape[0]
                weight = torch.linspace(0, 1, shared + 2, device=out.device)[1:-1].view(-1, 1, 1, 1)
                out[:shared] = torch.lerp(held, out[:shared], weight)
            ready = (windows[n + 1].start if n + 1 < len(windows) else window.stop) - window.start
            held = out[ready:].clone()
            yield from out[:ready]


def _padded(reference: Tensor, latents: Tensor, cell: int) -> Tensor:
    height, width = (cell * side for side in latents.shape[-2:])
    if tuple(reference.shape[-2:]) == (height, width):
        return reference
    return torch.stack([pad_to(frame, height, width) for frame in reference])
