"""The encoder over whole pictures: its tiles are one pass, its activations stay where they are, its passes agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.small_vaes import CELL, ldm_encoder, picture_vae, pictures, video_vae
from tests.support.tensors import relative
from tests.vae.test_idle import thin
from vsr_ops.errors import SettingError
from vsr_ops.modules.idle import Idle
from vsr_ops.vae import lockstep
from vsr_ops.vae.budget import encoding_bytes
from vsr_ops.vae.encode import TiledEncoder, stream_encode
from vsr_ops.vae.group_norm import Statistics
from vsr_ops.vae.latents import pad_to
from vsr_ops.vae.layout import encoding_steps
from vsr_ops.vae.stream import Streaming
from vsr_ops.vae.tiles import ComputedIn

#: Tiles that are computed once are one pass but for rounding; passes end within their tolerance of it.
ONCE, PASSES = 1e-5, 1e-3
MADE = {
    "picture": picture_vae,
    "video": video_vae,
    "ldm": ldm_encoder,
    "ldm without quant_conv": lambda: ldm_encoder(quantised=False),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small pictures have several."""
    monkeypatch.setattr(lockstep, "TILE_BYTES", 1 << 12)


@torch.no_grad()
def one_pass(vae: Any, frames: Tensor) -> Tensor:
    """The VAE's own encoder over each whole frame."""
    quantise = getattr(vae, "quant_conv", None) or torch.nn.Identity()
    return torch.cat([quantise(vae.encoder(2 * frame[None] - 1))[:, :4] for frame in frames])


def encoded(vae: Any, frames: Tensor, **named: Any) -> Tensor:
    height, width = (-(-side // CELL) for side in frames.shape[-2:])
    return torch.stack(list(stream_encode(vae, frames, height, width, Streaming(**named))))


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize(("height", "width", "tile"), [(16, 16, 8), (13, 25, 8), (9, 30, 10), (17, 6, 5), (10, 11, 4)])
def test_tiles_are_one_pass(name: str, height: int, width: int, tile: int) -> None:
    vae, frames = MADE[name](), pictures(2, 3, height * CELL, width * CELL)
    whole = one_pass(vae, frames)
    assert whole.std() > 0.1
    assert relative(encoded(vae, frames, tile=tile), whole) <= ONCE
    assert relative(encoded(vae, frames, tile=tile, kept=0.0), whole) <= PASSES


@pytest.mark.parametrize("name", MADE)
def test_one_tile_is_the_plain_encoder(name: str) -> None:
    vae, frames = MADE[name](), pictures(2, 3, 7 * CELL, 9 * CELL)
    assert torch.equal(encoded(vae, frames), one_pass(vae, frames))


@pytest.mark.parametrize("kept", [None, 0.0], ids=["once", "in passes"])
def test_blocks_that_add_nothing_are_left_out(kept: float | None) -> None:
    whole, less = thin()
    assert any(isinstance(part, Idle) for part in less.encoder.modules())
    frames = pictures(1, 3, 13 * CELL, 22 * CELL)
    found = encoded(less, frames, tile=6, kept=kept)
    assert relative(found, one_pass(whole, frames)) <= (PASSES if kept == 0 else ONCE)


def test_frames_of_any_size_repeat_their_edge() -> None:
    vae, frames = picture_vae(), pictures(2, 3, 45, 37)
    padded = torch.stack([pad_to(frame, 48, 40) for frame in frames])
    assert torch.equal(encoded(vae, frames, tile=5), encoded(vae, padded, tile=5))
    assert encoded(vae, frames).shape == (2, 4, 12, 10)


def test_statistics_of_each_tile_would_not_do() -> None:
    """The comparison of tiles with one pass can fail: it does where every tile is encoded by itself."""
    vae, frames = picture_vae(), pictures(1, 3, 16 * CELL, 16 * CELL)
    corner = one_pass(vae, frames[..., : 8 * CELL, : 8 * CELL])
    assert relative(corner[..., :4, :4], one_pass(vae, frames)[..., :4, :4]) > 10 * PASSES


def test_the_margin_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, frames = picture_vae(), pictures(1, 3, 16 * CELL, 16 * CELL)
    monkeypatch.setattr("vsr_ops.vae.lockstep._around", lambda sweep, own, extent: own)
    assert relative(encoded(vae, frames, tile=8), one_pass(vae, frames)) > 10 * PASSES


@pytest.mark.parametrize("kept", [None, 0.0], ids=["once", "in passes"])
def test_it_asks_before_every_tile_and_leaves_the_vae_as_it_was(kept: float | None) -> None:
    vae, frames, asked = picture_vae(), pictures(1, 3, 16 * CELL, 16 * CELL), list[int]()
    before = one_pass(vae, frames)

    def stop() -> None:
        asked.append(1)
        if len(asked) == 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        for _ in range(40):
            encoded(vae, frames, tile=8, kept=kept, check_interrupted=stop)
    assert torch.equal(one_pass(vae, frames), before)
    assert not any("forward" in vars(part) for part in vae.modules())


def encoder_of(vae: Any, **named: Any) -> TiledEncoder:
    steps = encoding_steps(vae)
    assert steps is not None
    return TiledEncoder(vae, steps, Streaming(tile=8, **named))


@torch.no_grad()
@pytest.mark.parametrize("name", MADE)
def test_activations_take_what_is_said_and_the_next_frame_no_more(name: str) -> None:
    vae, frame = MADE[name](), pictures(1, 3, 24 * CELL, 20 * CELL)[0]
    encoder = encoder_of(vae)
    first = encoder(frame)
    assert encoder.arena is not None and not encoder.arena.lent
    taken = sum(part.nbytes for part in encoder.arena.free)
    said = encoding_bytes(encoder.steps, (24, 20), 4)
    assert said / 2 <= taken <= said
    assert torch.equal(encoder(frame), first)
    assert sum(part.nbytes for part in encoder.arena.free) <= said


@torch.no_grad()
def test_a_byte_too_few_means_passes() -> None:
    vae, frame = picture_vae(), pictures(1, 3, 12 * CELL, 14 * CELL)[0]
    needed = encoding_bytes(encoder_of(vae).steps, (12, 14), 4)
    with_room, without = encoder_of(vae, kept=needed), encoder_of(vae, kept=needed - 1)
    assert relative(without(frame), with_room(frame)) <= PASSES
    assert without.in_passes and not with_room.in_passes


def test_passes_hold_no_more_of_a_larger_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the latents' own level."""
    vae, largest = picture_vae(), list[int]()
    for block in vae.encoder.down_blocks[:-1]:
        for part in block.modules():
            part.register_forward_hook(lambda _, __, out: largest.append(out.numel()))
    sizes: list[int] = []
    for side in (24, 48):
        encoded(vae, pictures(1, 3, 24 * CELL, side * CELL), tile=8, kept=0.0)
        sizes.append(max(largest))
        largest.clear()
    assert sizes[0] == sizes[1]


def test_it_computes_where_it_is_told() -> None:
    frames = pictures(1, 3, 12 * CELL, 13 * CELL)
    narrow = ComputedIn(torch.device("cpu"), torch.bfloat16)
    found = encoded(picture_vae().to(torch.bfloat16), frames, tile=6, computed_in=narrow)
    assert found.dtype == torch.float32 and 1e-4 < relative(found, one_pass(picture_vae(), frames)) < 0.1


def test_another_kind_of_vae_is_refused_by_name() -> None:
    from diffusers import AutoencoderTiny

    with pytest.raises(SettingError, match="EncoderTiny"):
        stream_encode(AutoencoderTiny(), [], 4, 4)


def test_statistics_are_gathered_on_the_way_down_alone() -> None:
    encoder = encoder_of(picture_vae())
    assert isinstance(encoder.statistics, Statistics)
    assert [step.name for step in encoder.deepest] == [
        "down_2_0",
        "mid_0",
        "mid_attention_0",
        "mid_1",
        "out",
        "quant",
    ]
