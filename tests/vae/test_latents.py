"""Encoding and decoding in tiles and chunks on a real small VAE: nothing is lost, held back or mixed across a cut."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from tests.support.tensors import randn, relative
from vsr_ops.errors import SettingError
from vsr_ops.sampling.tiling import spans
from vsr_ops.vae import latents as module
from vsr_ops.vae.encode import stream_encode
from vsr_ops.vae.latents import (
    decode_frames,
    decode_video,
    encode_frames,
    encode_video,
    pad_to,
    vae_plan,
    with_augmentation,
)

if TYPE_CHECKING:
    from vsr_ops.backbones.svd import SVD


def test_padding_repeats_the_edge() -> None:
    frame = randn(3, 5, 7)
    padded = pad_to(frame, 8, 16)
    assert padded.shape == (3, 8, 16) and torch.equal(padded[:, :5, :7], frame)
    assert torch.equal(padded[:, 5:, :7], frame[:, -1:].expand(3, 3, 7))
    assert torch.equal(padded[..., 7:], padded[..., 6:7].expand(3, 8, 9))


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 7, 8])
def test_decoding_in_chunks_keeps_count_and_order(tiny: SVD, chunk: int) -> None:
    z = randn(7, 4, 2, 2)
    with torch.no_grad():
        whole = tiny.decode(z)
    frames = torch.stack(list(decode_frames(tiny, z, chunk)))
    assert frames.shape == whole.shape == (7, 3, 16, 16)
    if chunk >= 7:
        assert torch.equal(frames, whole)
    # A frame is what the chunks that hold it make of it, in its place in them.
    windows = spans(7, chunk, 0.25)
    with torch.no_grad():
        chunks = [tiny.decode(z[window.slice]) for window in windows]
    for i, frame in enumerate(frames):
        parts = [part[i - w.start] for part, w in zip(chunks, windows, strict=True) if w.start <= i < w.stop]
        if len(parts) == 1:
            assert torch.equal(frame, parts[0])
        low, high = torch.stack(parts).amin(0), torch.stack(parts).amax(0)
        assert (frame >= low - 1e-6).all() and (frame <= high + 1e-6).all()


def test_decoded_chunks_fade_into_each_other(tiny: SVD) -> None:
    """Chunks of 8 of 14 frames start at 0 and 6: frames 6 and 7 are in both, at 1/3 and 2/3 of the way."""
    z = randn(14, 4, 2, 2)
    with torch.no_grad():
        a, b = tiny.decode(z[:8]), tiny.decode(z[6:])
    frames = torch.stack(list(decode_frames(tiny, z, 8)))
    assert torch.equal(frames[:6], a[:6]) and torch.equal(frames[8:], b[2:])
    for i, share in ((6, 1 / 3), (7, 2 / 3)):
        assert relative(frames[i], (1 - share) * a[i] + share * b[i - 6]) < 1e-6
        assert relative(a[i], b[i - 6]) > 1e-3


def test_no_decoded_chunk_crosses_a_cut(tiny: SVD) -> None:
    z = randn(7, 4, 2, 2)
    cut = torch.stack(list(decode_frames(tiny, z, 4, cuts=(2, 3))))
    alone = [frame for part in (z[:2], z[2:3], z[3:]) for frame in decode_frames(tiny, part, 4)]
    assert torch.equal(cut, torch.stack(alone))
    assert not torch.equal(cut, torch.stack(list(decode_frames(tiny, z, 4))))


def test_decoding_holds_back_only_what_a_later_chunk_adds_to(tiny: SVD) -> None:
    z = randn(12, 4, 1, 1)
    seen: list[int] = []

    class Watched:
        """Latents that say how far they have been read."""

        shape = z.shape

        def __getitem__(self, part: slice) -> Tensor:
            seen.append(part.stop)
            return z[part]

    frames: Iterator[Tensor] = decode_frames(tiny, Watched(), 4)  # type: ignore[arg-type]
    for i, _ in enumerate(frames):
        assert seen[-1] <= i + 4
    assert i == 11


@pytest.fixture
def small_vae_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "VAE_TILE", 4)


@pytest.mark.parametrize("extent", [1, 16, 17, 64, 80, 81, 136, 137, 240, 1000])
def test_the_vaes_tiles_are_few_and_alike(extent: int) -> None:
    plan = vae_plan(3, extent, extent)
    assert plan.rows == plan.cols and plan.rows[0].start == 0 and plan.rows[-1].stop == extent
    assert len({span.length for span in plan.rows}) == 1 and plan.rows[0].length <= 80
    assert all(a.stop - b.start >= 16 for a, b in pairwise(plan.rows))
    # Never more of them, nor more gone over, than in flush tiles of 64.
    flush = spans(extent, 64, 0.25)
    assert len(plan.rows) <= len(flush)
    assert sum(span.length for span in plan.rows) <= sum(span.length for span in flush)


@pytest.mark.usefixtures("small_vae_tiles")
def test_encoding_in_tiles_covers_the_frame(tiny: SVD) -> None:
    frames = [torch.rand(3, 70, 50, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    encoded = list(encode_frames(tiny, iter(frames), 10, 8))
    assert [z.shape for z in encoded] == [(4, 10, 8)] * 2 and all(torch.isfinite(z).all() for z in encoded)
    # The corner that one tile alone covers is that tile's own encoding.
    first = vae_plan(1, 10, 8)
    height, width = first.rows[0].length * 8, first.cols[0].length * 8
    with torch.no_grad():
        corner = tiny.encode(frames[1][None, :, :height, :width])[0]
    assert relative(encoded[1][:, :2, :2], corner[:, :2, :2]) < 1e-5
    # What lies in another tile does not reach it; what lies in a tile does reach that one.
    changed = frames[1].clone()
    changed[:, 60:, 40:] = 0
    other = next(encode_frames(tiny, [changed], 10, 8))
    assert torch.equal(other[:, :6, :4], encoded[1][:, :6, :4])
    assert not torch.equal(other[:, 8:, 6:], encoded[1][:, 8:, 6:])


@pytest.mark.usefixtures("small_vae_tiles")
def test_decoding_in_tiles_covers_the_frame(tiny: SVD) -> None:
    z = randn(2, 4, 10, 7)
    frames = torch.stack(list(decode_frames(tiny, z, 4)))
    assert frames.shape == (2, 3, 80, 56) and torch.isfinite(frames).all()
    with torch.no_grad():
        corner = tiny.decode(z[..., :4, :4])
    assert relative(frames[..., :16, :16], corner[..., :16, :16]) < 1e-5
    changed = z.clone()
    changed[..., 8:, 5:] = 0
    other = torch.stack(list(decode_frames(tiny, changed, 4)))
    assert torch.equal(other[..., :48, :24], frames[..., :48, :24])
    assert not torch.equal(other[..., 64:, 40:], frames[..., 64:, 40:])


def test_a_frame_of_one_vae_tile_is_encoded_as_it_is(tiny: SVD) -> None:
    frame = torch.rand(3, 37, 20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = tiny.encode(pad_to(frame, 40, 24)[None])[0]
    assert torch.equal(next(encode_frames(tiny, [frame], 5, 3)), expected)


@pytest.mark.parametrize(("height", "width"), [(32, 40), (33, 47), (5, 3)])
def test_a_video_of_any_size_comes_back_at_its_size(tiny: SVD, height: int, width: int) -> None:
    frames = torch.rand(3, 3, height, width, generator=torch.Generator().manual_seed(0))
    done: list[int] = []
    encode = partial(stream_encode, tiny.vae)
    z = encode_video(encode, frames, done.append, factor=tiny.factor)
    cell = 8 * tiny.factor
    assert z.shape == (3, 4, -(-height // cell) * tiny.factor, -(-width // cell) * tiny.factor)
    assert torch.equal(z[1], next(encode(frames[1:2], *z.shape[-2:])))
    out = decode_video(tiny, z, 2, size=(height, width), tick=done.append)
    assert out.shape == frames.shape and sum(done) == 6
    whole = torch.stack(list(decode_frames(tiny, z, 2)))
    assert torch.equal(out, whole[:, :, :height, :width].clamp(0, 1))


@pytest.mark.parametrize("size", [(170, 32), (160, 1000), (1, 32)])
def test_a_crop_that_the_latent_does_not_cover_is_refused(tiny: SVD, size: tuple[int, int]) -> None:
    with pytest.raises(SettingError, match="expected the size that was encoded"):
        decode_video(tiny, randn(2, 4, 20, 4), 2, size=size)


def test_what_is_no_latent_video_is_refused(tiny: SVD) -> None:
    for shape in [(4, 8, 8), (0, 4, 8, 8)]:
        with pytest.raises(SettingError, match="expected \\(frames"):
            decode_video(tiny, torch.zeros(shape), 2)
    with pytest.raises(SettingError, match="frame 1 decoded to NaN"):
        decode_video(tiny, torch.full((1, 4, 4, 4), torch.nan), 2)
    with pytest.raises(SettingError, match="no frames"):
        encode_video(partial(stream_encode, tiny.vae), [])


def test_augmentation_is_the_same_noise_every_time_and_none_at_zero() -> None:
    frames = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert all(a is not b and torch.equal(a, b) for a, b in zip(with_augmentation(frames, 0), frames, strict=True))
    once, again = (torch.stack(list(with_augmentation(frames, 0.3))) for _ in range(2))
    assert torch.equal(once, again)
    assert abs(float((once - frames).std()) - 0.3) < 0.01
