"""Tiles that are computed once, over whole activations; and what passes over tiles carry from frame to frame."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.modules.test_cfw import filled
from tests.support.small_vaes import CELL, noise, picture_vae, pictures, stream, streamed, video_vae
from vsr_ops.vae import lockstep
from vsr_ops.vae.budget import features_bytes, kept_bytes
from vsr_ops.vae.decoder_modules import DecoderModules
from vsr_ops.vae.stream import Streaming, _assemble
from vsr_ops.vae.tiles import TiledDecoder


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small pictures have several."""
    monkeypatch.setattr(lockstep, "TILE_BYTES", 1 << 12)


def decoder_of(vae: Any, tile: int, **named: Any) -> TiledDecoder:
    return _assemble(vae, DecoderModules(), Streaming(tile=tile, **named))


def calls_of(module: nn.Module) -> list[Tensor]:
    """What a module gives from now on."""
    found: list[Tensor] = []
    module.register_forward_hook(lambda _, __, out: found.append(out))
    return found


@torch.no_grad()
@pytest.mark.parametrize("make", [picture_vae, video_vae])
def test_every_tile_is_computed_once(make: Any) -> None:
    vae, z = make(), noise(1, 4, 24, 20)
    pixels = z[0, 0].numel() * CELL**2
    once, passes = calls_of(vae.decoder.conv_out), 0
    streamed(vae, z, tile=12)
    seen = sum(out[0, 0].numel() for out in once)
    once.clear()
    streamed(vae, z, tile=12, kept=0.0)
    passes = sum(out[0, 0].numel() for out in once)
    # A border of one pixel around tiles of 16.
    assert pixels <= seen <= (18 / 16) ** 2 * pixels and passes > 3 * pixels


@torch.no_grad()
def test_activations_take_what_is_said_and_the_next_chunk_no_more() -> None:
    vae, z = video_vae(), noise(3, 4, 24, 20)
    decoder = decoder_of(vae, 12)
    first = decoder(z, None)
    assert decoder.arena is not None and not decoder.arena.lent
    rooms = {part.data_ptr(): part.nbytes for part in decoder.arena.free}
    said = kept_bytes(vae, DecoderModules(), 3, z.shape[-2:], 4)
    assert said / 2 <= sum(rooms.values()) <= said
    assert torch.equal(decoder(z, None), first)
    assert {part.data_ptr(): part.nbytes for part in decoder.arena.free} == rooms


@torch.no_grad()
def test_without_room_tiles_go_in_passes_and_give_the_same_picture() -> None:
    vae, z = video_vae(), noise(2, 4, 12, 14)
    needed = kept_bytes(vae, DecoderModules(), 2, z.shape[-2:], 4)
    with_room, without = decoder_of(vae, 7, kept=needed), decoder_of(vae, 7, kept=needed - 1)
    assert float((with_room(z, None) - without(z, None)).abs().max()) <= 1e-3
    assert with_room.arena is not None and without.arena is None


def passes_of(z: Tensor, cuts: tuple[int, ...] = ()) -> list[int]:
    """Passes over four tiles and the mosaic that each frame took."""
    vae, counts = picture_vae(), [0]

    def check_interrupted() -> None:
        counts[-1] += 1

    for _ in stream(vae, z, cuts, tile=9, kept=0.0, check_interrupted=check_interrupted):
        counts.append(0)
    return [count // 5 for count in counts[:-1]]


def test_a_cut_forgets_what_the_frames_before_lent() -> None:
    z = noise(1, 4, 18, 18).repeat(2, 1, 1, 1)
    first, second = passes_of(z)
    assert second < first
    assert passes_of(z, (1,)) == [first, first]


@torch.no_grad()
def test_a_change_that_moves_the_statistics_is_seen_and_decoded_again() -> None:
    vae, z = picture_vae(), noise(1, 4, 18, 18).repeat(3, 1, 1, 1)
    z[2] = 2 - 3 * noise(1, 4, 18, 18, seed=5)[0]
    _, still, changed = passes_of(z)
    assert changed > still
    whole = streamed(vae, z, tile=64)
    assert float((streamed(vae, z, tile=9, kept=0.0) - whole).abs().max()) <= 1e-3


@torch.no_grad()
def test_passes_keep_what_the_encoder_made_where_there_is_room() -> None:
    vae, model = picture_vae(), filled()
    z, reference = 3 * noise(1, 4, 16, 13), pictures(1, 3, 16 * CELL, 13 * CELL)
    room = features_bytes(vae, DecoderModules(cfw=model), 1, z.shape[-2:], 4)
    calls = calls_of(vae.encoder.conv_in)
    named: dict[str, Any] = {"cfw": model, "reference": reference, "tile": 8}
    kept = streamed(vae, z, kept=room, **named)
    few = len(calls)
    anew = streamed(vae, z, kept=room - 1, **named)
    assert torch.equal(kept, anew) and few < len(calls) - few - 10
