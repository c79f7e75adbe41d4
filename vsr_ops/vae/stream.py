"""A VAE's decoder with what stands beside it, over a whole video: frames in fixed chunks, tiles that are one pass.

`tiles` has the tiles. Frames that see each other go in chunks that overlap and are blended, none across a cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import SettingError
from ..modules.capm_hints import check_hint
from ..modules.cfw import FuseLayer
from ..modules.windows import Place
from ..sampling.tiling import spans
from ..system.memory import home_of
from ..system.precision import decoded_within, run_like
from .adapting import adapting
from .capm_tiles import TiledCAPM
from .decoder_modules import DecoderModules
from .latents import VAE_OVERLAP, VAE_TILE, chunk_bytes, pad_to
from .layout import DecoderOp, is_temporal, layout_of, output_name
from .passes import TOLERANCE
from .places import Box
from .sweeps import fuse_sweeps
from .tiles import ComputedIn, TiledDecoder

#: Frames that see each other: what SVD's decoder was trained on.
CHUNK = 14
#: A UNet's latents are whole multiples of at most so many, so the picture may be so many smaller than they are.
FACTOR = 8


class Video(Protocol):
    """Frames `(n, 3, H, W)` in [0, 1], asked for by slices that only move forward: a tensor, or a video that is read
    from the disk as it is asked."""

    @property
    def shape(self) -> torch.Size: ...

    def __getitem__(self, frames: slice, /) -> Tensor: ...


@dataclass(frozen=True)
class Streaming:
    """How a decoder goes over a video: frames that see each other in chunks of `chunk`, tiles of at most `tile` latents
    a side. Whole activations may take `kept` bytes, so that each tile is computed once (None: half of what is free);
    where they do not fit, tiles are run in passes until the group norms move by less than `tolerance`.
    `check_interrupted` is called before every tile and may raise. `computed_in` says where the decoder computes; else
    where its weights lie, and in their precision.

    Raises SettingError for a tile or chunk under 1.
    """

    chunk: int = CHUNK
    tile: int = VAE_TILE
    tolerance: float = TOLERANCE
    kept: float | None = None
    check_interrupted: Callable[[], None] = lambda: None
    computed_in: ComputedIn | None = None

    def __post_init__(self) -> None:
        if self.tile < 1 or self.chunk < 1:
            raise SettingError(
                f"tile is {self.tile} latents and chunk {self.chunk} frames: expected at least 1 of each"
            )


def stream_decode(
    vae: Any,
    latents: Tensor,
    cuts: Sequence[int] = (),
    modules: DecoderModules | None = None,
    reference: Video | None = None,
    levels: Tensor | None = None,
    how: Streaming | None = None,
) -> Iterator[Tensor]:
    """Frames `(3, 8h, 8w)`, nominally in [0, 1], of unscaled latents `(n, 4, h, w)`, one by one.

    `vae` is diffusers' or a host's autoencoder module. Where frames see each other (SVD's decoder, STAM, SATeCo's
    TFA), they go in fixed chunks that overlap by a quarter and are blended, none across a cut; else one by one. A CFW
    mixes in what the encoder makes of `reference`, and SATeCo is guided by it: a video `(n, 3, H, W)` in [0, 1] of the
    picture's size, or under eight latents smaller. A CAPM is told the frames' compression `levels` `(n,)`, NaN where
    unknown: there it reads them in the whole frame's features.

    Raises SettingError for a missing or unfitting reference, levels that are not one a frame, modules made for another
    backbone or other widths, and a VAE of no known layout.
    """
    modules, how = (modules or DecoderModules()).acting, how or Streaming()
    if latents.ndim != 4 or latents.shape[0] == 0:
        raise SettingError(f"the latent has shape {tuple(latents.shape)}: expected (frames, 4, height, width)")
    modules.check_fits(vae)
    if modules.capm is not None:
        _check_levels(latents, levels)
    decoder = _assemble(vae, modules, how)
    if modules.sees_reference:
        _check_reference(latents, reference, decoder.cell)
    else:
        reference = None
    together = modules.joins_frames or is_temporal(vae.decoder)
    return _stream(decoder, latents, reference, levels, cuts, how.chunk if together else 1)


def _assemble(vae: Any, modules: DecoderModules, how: Streaming) -> TiledDecoder:
    layout, cfw, stam, sateco = layout_of(vae), modules.cfw, modules.stam, modules.sateco
    prompts = None if modules.capm is None else TiledCAPM(modules.capm, modules.strength)
    ops: list[DecoderOp] = []
    plain = layout.decoder(vae.decoder)
    for index, op in enumerate(plain):
        ops.append(op)
        if stam is not None and op.name in stam.names:
            block = stam.block(op.name)
            run = partial(run_like, block)
            ops.append(replace(op, name=f"{op.name}_stam", modules=(block,), run=run, residual=False))
        ends, name = op.residual and not plain[index + 1].residual, output_name(plain[0].level, op)
        if sateco is not None and ends and name in sateco.shape.widths and op.name.startswith("up_"):
            ops.append(adapting(sateco, modules.strengths, name, op.level))
        if cfw is not None and ends and op.level in cfw.shape.levels:
            ops.append(_fusing(f"fuse_{op.level}", op.level, cfw.layer(op.level), modules.w))
        known = prompts is not None and name in prompts.model.shape.widths and (op.resize or index == len(plain) - 2)
        # One that does not act would only widen the margins, and so the rounding.
        if prompts is not None and known and prompts.model.acts(name):
            ops.append(prompts.op(name, op.level - op.resize))
    split = next((index for index, op in enumerate(ops) if op.resize), len(ops) - 1)
    encoder: list[DecoderOp] = []
    if modules.sees_reference:
        deepest = max(op.level for op in ops if op.guided is not None)
        whole = layout.encoder(vae.encoder)
        last = max(index for index, op in enumerate(whole) if op.residual and op.level == deepest)
        encoder = whole[: last + 1]
    return TiledDecoder(
        vae,
        ops[:split],
        ops[split:],
        encoder,
        modules,
        how.tile,
        how.tolerance,
        how.kept,
        how.check_interrupted,
        prompts,
        how.computed_in,
    )


def _fusing(name: str, level: int, layer: FuseLayer, w: float) -> DecoderOp:
    """CFW at one level: as `CFW.fuse`, in the decoder's precision; no module that acts has w 0."""

    def guided(encoded: Tensor, decoded: Tensor, place: Place | None, own: Box | None) -> Tensor:
        # The layer takes the encoder's features first.
        return decoded + w * run_like(layer, encoded.to(decoded), decoded)

    return DecoderOp(name, (layer,), lambda x: x, level, guided=guided, sweeps=lambda: fuse_sweeps(layer, name, w))


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
        raise SettingError(
            "CFW and SATeCo need a reference: give the upscaled video that was encoded, or set w or SATeCo's strengths"
            " to 0"
        )
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
            z = z.to(home_of(decoder.device, chunk_bytes(z, decoder.cell)))
            seen = None if reference is None else _padded(reference[frames].to(z.device), z, decoder.cell)
            hint = None if levels is None else levels[frames]
            out = decoded_within(decoder.vae, partial(decoder, z, seen, hint), decoder.widen)
            if held is not None:
                # Linear cross-fade over the frames both chunks hold.
                shared = held.shape[0]
                weight = torch.linspace(0, 1, shared + 2, device=out.device)[1:-1].view(-1, 1, 1, 1)
                out[:shared] = torch.lerp(held.to(out.device), out[:shared], weight)
            ready = (windows[n + 1].start if n + 1 < len(windows) else window.stop) - window.start
            held = out[ready:].clone()
            yield from (frame.to(latents.device) for frame in out[:ready])


def _padded(reference: Tensor, latents: Tensor, cell: int) -> Tensor:
    height, width = (cell * side for side in latents.shape[-2:])
    if tuple(reference.shape[-2:]) == (height, width):
        return reference
    return torch.stack([pad_to(frame, height, width) for frame in reference])
