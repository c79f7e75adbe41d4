"""Videos to latents and back by VAEs of any layout, in blended tiles and fixed chunks of frames: memory is flat in area
and length. Those of a known layout have `encode` and `stream`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from typing import Protocol

import torch
from torch import Tensor

from ..errors import SettingError
from ..image.video_tensor import empty_video
from ..sampling.layouts import even_spans
from ..sampling.tiling import Merger, Span, TilePlan, TileSize, cut_tile, plan_tiles, spans
from ..system.memory import home_of

#: Picture pixels of one latent pixel along each side.
CELL = 8
#: The VAE works on spatial tiles of this many latents.
VAE_TILE, VAE_OVERLAP = 64, 0.25
#: Chunks of frames that live together: the blend under way and its weights, its result, the frames held from before.
CHUNK_COPIES = 3


Encode = Callable[[Iterable[Tensor], int, int], Iterator[Tensor]]
"""Latents `(4, height, width)`, one by one, of frames `(3, h, w)`, given both and the latents' height and width."""


class VAE(Protocol):
    """SVD's autoencoder, headless or a host's; `device` is where it computes."""

    @property
    def device(self) -> torch.device: ...

    def encode(self, frames: Tensor) -> Tensor:
        """Unscaled latents `(n, 4, h, w)` float32 of frames `(n, 3, 8h, 8w)` in [0, 1]."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Frames `(n, 3, 8h, 8w)` of one chunk of unscaled latents `(n, 4, h, w)`, where these are."""
        ...


def pad_to(frame: Tensor, height: int, width: int) -> Tensor:
    """`(c, h, w)` grown at the bottom and right by repeating its edge; itself where it is as large."""
    if frame.shape[-2:] == (height, width):
        return frame
    rows = torch.arange(height).clamp(max=frame.shape[-2] - 1)
    cols = torch.arange(width).clamp(max=frame.shape[-1] - 1)
    return frame[:, rows][:, :, cols]


def chunk_bytes(latents: Tensor, cell: int) -> int:
    """What a chunk of latents `(n, c, h, w)` takes while its frames are blended; a latent is `cell` pixels a side."""
    frames, _, height, width = latents.shape
    return CHUNK_COPIES * frames * 3 * height * width * cell**2 * 4


def vae_plan(frames: int, height: int, width: int) -> TilePlan:
    """The tiles that latents of a size are encoded in, or decoded and blended: as few as can be, and all alike."""
    plan = plan_tiles(frames, height, width, TileSize(VAE_TILE, VAE_TILE, frames), VAE_OVERLAP, factor=1)
    return replace(plan, rows=_alike(height), cols=_alike(width))


def _alike(extent: int) -> tuple[Span, ...]:
    """Spans that overlap by a quarter of VAE_TILE: equal ones up to a quarter longer instead of more, of which the last
    would nearly be the one before. 136 latents are 2 x 76, not 64 at 0, 48 and 72."""
    shared = int(VAE_TILE * VAE_OVERLAP)
    longest = VAE_TILE + shared
    count = max(1, -(-(extent - shared) // (longest - shared)))
    tile = -(-(extent + (count - 1) * shared) // count)
    return even_spans(extent, tile, shared / tile)


@torch.no_grad()
def encode_frames(vae: VAE, frames: Iterable[Tensor], height: int, width: int) -> Iterator[Tensor]:
    """Unscaled latents `(4, height, width)` of frames `(3, h, w)`, padded to fit, one by one, in spatial tiles that are
    blended: each has group norms of its own."""
    plan = vae_plan(1, height, width)
    for frame in frames:
        padded = pad_to(frame, height * CELL, width * CELL)[None]
        merger = Merger(plan)
        for m in range(len(plan.spatial)):
            merger.add(0, m, vae.encode(cut_tile(plan.magnified(CELL), 0, m, padded)))
        yield merger.result()[0]


@torch.no_grad()
def decode_frames(vae: VAE, latents: Tensor, chunk: int, cuts: Sequence[int] = ()) -> Iterator[Tensor]:
    """Frames `(3, 8h, 8w)` of unscaled latents `(n, 4, h, w)`, not clamped, one by one.

    Fixed chunks of `chunk` frames overlap by a quarter and are blended; none crosses a cut. Only frames that a later
    chunk still adds to are held.
    """
    for start, stop in pairwise([0, *cuts, latents.shape[0]]):
        windows = spans(stop - start, chunk, VAE_OVERLAP)
        held: Tensor | None = None
        for n, window in enumerate(windows):
            z = latents[start + window.start : start + window.stop]
            out = _decode_chunk(vae, z.to(home_of(vae.device, chunk_bytes(z, CELL))))
            if held is not None:
                # Linear cross-fade over the frames both chunks hold.
                shared = held.shape[0]
                weight = torch.linspace(0, 1, shared + 2, device=out.device)[1:-1].view(-1, 1, 1, 1)
                out[:shared] = torch.lerp(held.to(out.device), out[:shared], weight)
            following = windows[n + 1].start if n + 1 < len(windows) else window.stop
            ready = following - window.start
            held = out[ready:].clone()
            yield from (frame.to(z.device) for frame in out[:ready])


def _decode_chunk(vae: VAE, latents: Tensor) -> Tensor:
    plan = vae_plan(latents.shape[0], *latents.shape[-2:])
    merger = Merger(plan.magnified(CELL))
    for m in range(len(plan.spatial)):
        merger.add(0, m, vae.decode(cut_tile(plan, 0, m, latents)))
    return merger.result()


def with_augmentation(frames: Tensor, level: float, seed: int = 0) -> Iterator[Tensor]:
    """Frames `(3, h, w)` with Gaussian noise of deviation `level` in [-1, 1] units, as SVD was trained; 0 adds none."""
    rng = torch.Generator().manual_seed(seed)
    for frame in frames:
        yield frame if level == 0 else frame + torch.randn(frame.shape, generator=rng).to(frame) * level


def encode_video(
    encode: Encode, frames: Iterable[Tensor], tick: Callable[[int], None] = lambda done: None, factor: int = 1
) -> Tensor:
    """Unscaled latents `(n, 4, h/8, w/8)` of frames `(3, h, w)`, padded to multiples of 8 * `factor` pixels; `tick` is
    told of every frame done. Raises SettingError for a video without frames."""
    latents: list[Tensor] = []
    first, rest = _peek(frames)
    height, width = (-(-side // (CELL * factor)) * factor for side in first.shape[-2:])
    for z in encode(rest, height, width):
        latents.append(z)
        tick(1)
    return torch.stack(latents)


def decode_video(
    vae: VAE,
    latents: Tensor,
    chunk: int,
    cuts: Sequence[int] = (),
    size: tuple[int, int] | None = None,
    tick: Callable[[int], None] = lambda done: None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Frames `(n, 3, height, width)` in [0, 1] of unscaled latents, cropped to `size`, in the frames' precision or in
    `dtype`.

    Raises SettingError for latents that hold NaN or are no video, and for a size that they do not cover.
    """
    if latents.ndim != 4 or latents.shape[0] == 0:
        raise SettingError(f"the latent has shape {tuple(latents.shape)}: expected (frames, 4, height, width)")
    return collect(decode_frames(vae, latents, chunk, cuts), latents, CELL, size, tick, dtype)


def collect(
    frames: Iterable[Tensor],
    latents: Tensor,
    cell: int,
    size: tuple[int, int] | None,
    tick: Callable[[int], None],
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The video `(n, c, height, width)` in [0, 1] of the frames that `latents` `(n, 4, h, w)` are decoded to, cropped
    to `size`; a latent is `cell` pixels a side, and `tick` is told of every frame done.

    Raises SettingError for a size that the latents do not cover, and for frames that hold NaN.
    """
    whole = (latents.shape[-2] * cell, latents.shape[-1] * cell)
    height, width = size or whole
    if not all(max(side - cell * 8, 0) < wanted <= side for side, wanted in zip(whole, (height, width), strict=True)):
        raise SettingError(
            f"the latent is {whole[1]}x{whole[0]} pixels (width x height), the size to crop to {width}x{height}:"
            " expected the size that was encoded; give the reference that went into the conditioning"
        )
    out: Tensor | None = None
    for i, frame in enumerate(frames):
        if not bool(torch.isfinite(frame).all()):
            raise SettingError(f"frame {i + 1} decoded to NaN or infinity: run the VAE in float32, or check the latent")
        if out is None:
            out = empty_video(frame, latents.shape[0], (height, width), dtype)
        out[i] = frame[:, :height, :width].clamp(0, 1)
        tick(1)
    assert out is not None
    return out


def _peek(frames: Iterable[Tensor]) -> tuple[Tensor, Iterator[Tensor]]:
    rest = iter(frames)
    first = next(rest, None)
    if first is None:
        raise SettingError("the video has no frames: expected at least one")
    return first, chain([first], rest)
