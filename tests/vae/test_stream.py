"""The streaming decoder: its tiles are the picture of one pass, its chunks stay in their scene, its memory is flat."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.small_vaes import CELL, WIDTHS, noise, picture_vae, stream, streamed, video_vae
from vsr_ops.errors import SettingError
from vsr_ops.vae.group_norm import Statistics
from vsr_ops.vae.latents import collect, decode_frames
from vsr_ops.vae.layout import LAYOUTS, DecoderOp, level_widths, residual_widths

#: As far as a picture of tiles may be from that of one pass; what is aimed at is well below. Tiles that are computed
#: once have its statistics, but for rounding.
ALLOWED, AIM, ONCE = 2 / 255, 1e-3, 1e-5
#: Tiles in passes: where there is no room for whole activations.
PASSES = {"kept": 0.0}


@torch.no_grad()
def one_pass(vae: Any, z: Tensor) -> Tensor:
    if hasattr(vae.decoder, "time_conv_out"):
        return vae.decode(z, num_frames=z.shape[0]).sample / 2 + 0.5
    return torch.cat([vae.decode(frame[None]).sample for frame in z]) / 2 + 0.5


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


# --- Tiles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width", "tile"), [(16, 16, 8), (13, 25, 8), (9, 30, 10), (17, 6, 5), (10, 11, 4)])
def test_tiles_are_one_pass(height: int, width: int, tile: int) -> None:
    vae, z = picture_vae(), noise(2, 4, height, width)
    whole = one_pass(vae, z)
    assert whole.std() > 0.2
    assert apart(streamed(vae, z, tile=tile), whole) <= ONCE
    assert apart(streamed(vae, z, tile=tile, kept=0), whole) <= AIM


@pytest.mark.parametrize(("height", "width", "tile"), [(8, 14, 7), (9, 12, 6)])
def test_tiles_of_frames_that_see_each_other_are_one_pass(height: int, width: int, tile: int) -> None:
    vae, z = video_vae(), noise(3, 4, height, width)
    whole = one_pass(vae, z)
    assert apart(streamed(vae, z, tile=tile), whole) <= ONCE
    assert apart(streamed(vae, z, tile=tile, kept=0), whole) <= AIM


def test_one_tile_is_the_plain_decoder() -> None:
    for vae in (picture_vae(), video_vae()):
        z = noise(2, 4, 7, 9)
        assert apart(streamed(vae, z), one_pass(vae, z)) <= ONCE


def test_passes_end_exactly_where_no_tolerance_is_left() -> None:
    vae, z = picture_vae(), noise(1, 4, 12, 12)
    assert apart(streamed(vae, z, tile=6, tolerance=0.0, **PASSES), one_pass(vae, z)) < 1e-5


def test_passes_are_few() -> None:
    """The mosaic foretells a pass: without it every norm but the first would need one."""
    vae, z, tiles = picture_vae(), noise(1, 4, 24, 24), list[int]()
    streamed(vae, z, tile=12, check_interrupted=lambda: tiles.append(1), **PASSES)
    assert len(tiles) <= 5 * (4 + 1)


def test_the_frame_before_lends_its_statistics() -> None:
    vae = picture_vae()
    z = noise(1, 4, 18, 18).repeat(2, 1, 1, 1)
    counts: list[int] = [0]

    def check_interrupted() -> None:
        counts[-1] += 1

    for _ in stream(vae, z, tile=9, check_interrupted=check_interrupted, **PASSES):
        counts.append(0)
    assert counts[1] < counts[0]


def test_statistics_of_each_tile_would_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison of tiles with one pass can fail: it does where every tile is normalised by itself."""
    vae, z = picture_vae(), noise(1, 4, 16, 16)
    monkeypatch.setattr(Statistics, "applied", lambda self: contextlib.nullcontext())
    assert apart(streamed(vae, z, tile=8, **PASSES), one_pass(vae, z)) > 4 * ALLOWED


def test_the_margin_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, z = picture_vae(), noise(1, 4, 16, 16)
    monkeypatch.setattr(DecoderOp, "reach", property(lambda self: 0))
    assert apart(streamed(vae, z, tile=8, **PASSES), one_pass(vae, z)) > 4 * ALLOWED


@pytest.mark.parametrize(("tile", "kept", "sides"), [(8, 0.0, (24, 48)), (4, None, (48, 96))])
def test_what_is_made_at_once_does_not_grow_with_the_picture(
    tile: int, kept: float | None, sides: tuple[int, int]
) -> None:
    """Of the levels above the latents' own, no module's output is larger for a larger picture of as large tiles."""
    vae, largest = picture_vae(), list[int]()

    def note(_: nn.Module, __: Any, out: Tensor) -> None:
        largest[-1] = max(largest[-1], out.numel())

    for block in (*vae.decoder.up_blocks[0].upsamplers, *vae.decoder.up_blocks[1:], vae.decoder.conv_norm_out):
        for part in block.modules():
            part.register_forward_hook(note)
    for side in sides:
        largest.append(0)
        next(stream(vae, noise(1, 4, 24, side), tile=tile, kept=kept))
    assert largest[0] == largest[1] < 8 * 48 * 24 * CELL**2


def test_the_vae_is_left_as_it_was() -> None:
    vae, z = picture_vae(), noise(1, 4, 10, 10)
    before = one_pass(vae, z)

    def stop() -> None:
        raise KeyboardInterrupt

    streamed(vae, z, tile=5)
    streamed(vae, z, tile=5, **PASSES)
    with pytest.raises(KeyboardInterrupt):
        streamed(vae, z, tile=5, check_interrupted=stop, **PASSES)
    assert torch.equal(one_pass(vae, z), before)
    assert not any("forward" in vars(part) for part in vae.modules())


def test_half_precision_stays_close() -> None:
    z = noise(1, 4, 12, 12)
    whole = one_pass(picture_vae(), z)
    tiled = streamed(picture_vae().to(torch.bfloat16), z, tile=6)
    assert tiled.dtype == torch.float32
    assert apart(tiled, whole) < 2 * max(apart(one_pass(picture_vae().to(torch.bfloat16), z.bfloat16()), whole), AIM)


# --- Chunks and cuts --------------------------------------------------------------------------------------------------


class Plain:
    """What `decode_frames` wants of a VAE."""

    device = torch.device("cpu")

    def __init__(self, vae: Any) -> None:
        self.vae = vae

    def encode(self, frames: Tensor) -> Tensor:
        return self.vae.encode(2 * frames - 1).latent_dist.mode()

    def decode(self, latents: Tensor) -> Tensor:
        return one_pass(self.vae, latents)


@pytest.mark.parametrize(("frames", "chunk", "cuts"), [(9, 4, ()), (7, 14, ()), (8, 4, (3,)), (5, 4, (1, 3))])
def test_chunks_are_those_of_the_other_decoder(
    monkeypatch: pytest.MonkeyPatch, frames: int, chunk: int, cuts: tuple[int, ...]
) -> None:
    monkeypatch.setattr("vsr_ops.vae.latents.CELL", CELL)
    vae, z = video_vae(), noise(frames, 4, 4, 5)
    other = torch.stack(list(decode_frames(Plain(vae), z, chunk, cuts)))
    assert apart(streamed(vae, z, cuts, chunk=chunk), other) < 1e-5


def test_no_frame_sees_past_a_cut() -> None:
    vae, z = video_vae(), noise(6, 4, 4, 4)
    changed = torch.cat([z[:3], -z[3:]])
    assert torch.equal(streamed(vae, z, (3,))[:3], streamed(vae, changed, (3,))[:3])
    assert not torch.equal(streamed(vae, z)[:3], streamed(vae, changed)[:3])


def test_pictures_do_not_depend_on_chunks() -> None:
    vae, z = picture_vae(), noise(5, 4, 4, 4)
    assert torch.equal(streamed(vae, z, chunk=2), streamed(vae, z, (2,), chunk=14))


def test_frames_come_as_soon_as_they_are_done() -> None:
    vae, done = picture_vae(), list[int]()
    frames: Iterator[Tensor] = stream(vae, noise(4, 4, 4, 4), check_interrupted=lambda: done.append(1))
    assert next(frames).shape == (3, 4 * CELL, 4 * CELL) and len(done) == 1


def test_a_video_is_the_frames_cropped_and_limited() -> None:
    vae, z, done = picture_vae(), 3 * noise(3, 4, 5, 6), list[int]()
    frames = torch.stack(list(stream(vae, z, tile=4)))
    assert float(frames.min()) < 0 or float(frames.max()) > 1
    assert torch.equal(
        collect(stream(vae, z, tile=4), z, CELL, (18, 23), done.append), frames[..., :18, :23].clamp(0, 1)
    )
    assert done == [1, 1, 1]
    assert torch.equal(collect(stream(vae, z, tile=4), z, CELL, None, done.append), frames.clamp(0, 1))


@pytest.mark.parametrize("size", [(21, 24), (20, 25), (0, 24)])
def test_a_video_of_another_size_is_refused_with_both(size: tuple[int, int]) -> None:
    with pytest.raises(SettingError, match=f"24x20 .*{size[1]}x{size[0]}: expected the size that was encoded"):
        collect(stream(picture_vae(), z := noise(1, 4, 5, 6)), z, CELL, size, lambda done: None)


def test_frames_that_are_not_finite_are_refused() -> None:
    z = noise(2, 4, 4, 4)
    z[1, 0, 0, 0] = float("nan")
    with pytest.raises(SettingError, match="frame 2 decoded to NaN"):
        collect(stream(picture_vae(), z), z, CELL, None, lambda done: None)


# --- What is known and refused ----------------------------------------------------------------------------------------


def test_blocks_and_levels_are_found() -> None:
    assert residual_widths(picture_vae()) == {
        "mid_0": 16,
        "mid_1": 16,
        "up_2_0": 16,
        "up_2_1": 16,
        "up_1_0": 8,
        "up_1_1": 8,
        "up_0_0": 8,
        "up_0_1": 8,
    }
    assert level_widths(picture_vae()) == dict(enumerate(WIDTHS))


def test_another_kind_of_vae_is_refused_by_name() -> None:
    from diffusers import AutoencoderTiny

    with pytest.raises(SettingError, match="DecoderTiny") as caught:
        stream(AutoencoderTiny(), noise(1, 4, 4, 4))
    assert all(name in str(caught.value) for name in LAYOUTS)


@pytest.mark.parametrize("named", [{"tile": 0}, {"chunk": 0}, {"w": -0.1}, {"w": 1.5}, {"w": float("nan")}])
def test_settings_that_cannot_work_are_refused(named: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="expected"):
        stream(picture_vae(), noise(1, 4, 4, 4), **named)


def test_latents_that_are_no_video_are_refused() -> None:
    with pytest.raises(SettingError, match=r"\(frames, 4, height, width\)"):
        stream(picture_vae(), torch.zeros(4, 8, 8))
