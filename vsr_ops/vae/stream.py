"""A VAE's decoder with what stands beside it, over a whole video: frames in fixed chunks, tiles that are one pass.

`decode_tiles` has the tiles. Frames that see each other go in chunks that overlap and are blended, none across a cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import SettingError
from ..modules.capm import CAPM
from ..modules.capm_hints import check_hint, check_strength
from ..modules.cfw import CFW, check_w
from ..modules.stam import STAM
from ..sampling.tiling import spans
from .capm_tiles import TiledCAPM
from .latents import VAE_OVERLAP, VAE_TILE, collect, pad_to
from .layout import (
    DecoderOp,
    backbone_of,
    cell_of,
    is_temporal,
    layout_of,
    level_widths,
    output_name,
    output_widths,
    residual_widths,
)
from .tiles import TOLERANCE, ComputedIn, TiledDecoder

#: Frames that see each other: what SVD's decoder was trained on.
CHUNK = 14
#: A UNet's latents are whole multiples of at most so many, so the picture may be so many smaller than they are.
FACTOR = 8


class Video(Protocol):
    """Frames `(n, 3, H, W)` in [0, 1], asked for by slices in their order: a tensor, or what reads them by then."""

    @property
    def shape(self) -> torch.Size: ...

    def __getitem__(self, frames: slice, /) -> Tensor: ...


def _assemble(
    vae: Any,
    tile: int,
    stam: STAM | None,
    cfw: CFW | None,
    w: float,
    prompts: TiledCAPM | None,
    tolerance: float,
    check_interrupted: Callable[[], None],
    computed_in: ComputedIn | None,
) -> TiledDecoder:
    layout = layout_of(vae)
    steps: list[DecoderOp] = []
    plain = layout.decoder(vae.decoder)
    for index, step in enumerate(plain):
        steps.append(step)
        if stam is not None and step.name in stam.names:
            block = stam.block(step.name)
            steps.append(replace(step, name=f"{step.name}_stam", modules=(block,), run=block, residual=False))
        if cfw is not None and step.residual and step.level in cfw.shape.levels and not plain[index + 1].residual:
            fuse = partial(cfw.fuse, step.level, w=w)
            modules = (cfw.layer(step.level),)
            steps.append(DecoderOp(f"fuse_{step.level}", modules, lambda x: x, step.level, fuse=fuse))
        if prompts is not None and (step.resize or index == len(plain) - 2):
            name = output_name(plain[0].level, step)
            # One that does not act would only widen the margins, and so the rounding.
            if name in prompts.model.shape.widths and prompts.model.acts(name):
                steps.append(prompts.step(name, step.level - step.resize))
    split = next((index for index, step in enumerate(steps) if step.resize), len(steps) - 1)
    encoder: list[DecoderOp] = []
    if cfw is not None:
        deepest = max(cfw.shape.levels)
        all_steps = layout.encoder(vae.encoder)
        last = max(index for index, step in enumerate(all_steps) if step.residual and step.level == deepest)
        encoder = all_steps[: last + 1]
    return TiledDecoder(
        vae, steps[:split], steps[split:], encoder, tile, tolerance, check_interrupted, prompts, computed_in
    )


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
    check_interrupted: Callable[[], None] = lambda: None,
    computed_in: ComputedIn | None = None,
) -> Iterator[Tensor]:
    """Frames `(3, 8h, 8w)` in [0, 1], not clamped, of unscaled latents `(n, 4, h, w)`, one by one.

    `vae` is diffusers' or a host's autoencoder module. Where frames see each other (SVD's decoder, or `stam`), they go
    in fixed chunks of `chunk` that overlap by a quarter and are blended, none across a cut; else one by one. Tiles are
    of at most `tile` latents a side. `cfw` mixes in what the encoder makes of `reference`, a video `(n, 3, H, W)` in
    [0, 1] of the picture's size, or under eight latents smaller; w = 0 is the decoder without it. `capm` is told the
    frames' compression `levels` `(n,)`, NaN where unknown: there it reads them in the whole frame's features; strength
    0 is the decoder without it. `check_interrupted` is called before every tile and may raise. `computed_in` says
    where the decoder computes; else where its weights lie, and in their precision.

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
    prompts: TiledCAPM | None = None
    if capm is not None and strength != 0:
        capm.check_fits(f"{backbone_of(vae)}-vae", output_widths(vae))
        _check_levels(latents, levels)
        prompts = TiledCAPM(capm, strength)
    decoder = _assemble(vae, tile, stam, cfw, w, prompts, tolerance, check_interrupted, computed_in)
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
    decoder: TiledDecoder,
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
