"""A VAE in half precision: how far off it is, where float16 overflows, and that it is only then widened."""

from __future__ import annotations

import logging
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from tests.support.small_vaes import pictures
from tests.support.tensors import relative
from vsr_ops.system.precision import dtype_of, narrow
from vsr_ops.vae.latents import decode_frames
from vsr_ops.vae.stream import Streaming, stream_decode
from vsr_ops.vae.tiles import ComputedIn

if TYPE_CHECKING:
    from vsr_ops.backbones.svd import SVD


def in_dtype(model: SVD, dtype: torch.dtype) -> SVD:
    """The same model with its VAE in another precision."""
    other = deepcopy(model)
    narrow(other.vae, dtype)
    return other


def wild(model: Any) -> Any:
    """A copy whose features pass float16's largest number on their way to a norm, which takes that back."""
    other = deepcopy(model)
    with torch.no_grad():
        for part in (other.vae.decoder.conv_in.weight, other.vae.decoder.conv_in.bias):
            part.mul_(2e4 / part.abs().max())
    return other


@pytest.fixture(scope="module")
def lite() -> SVD:
    from vsr_ops.backbones.svd import load_svd

    return load_svd("lite", torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def z(lite: SVD) -> Tensor:
    with torch.no_grad():
        return lite.encode(torch.nn.functional.interpolate(pictures(2, 3, 8, 8), scale_factor=8, mode="bicubic"))


@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_how_far_the_bundled_decoder_is_off(lite: SVD, z: Tensor, dtype: torch.dtype, most: float) -> None:
    exact = torch.stack(list(decode_frames(lite, z, 14)))
    half = in_dtype(lite, dtype)
    found = torch.stack(list(decode_frames(half, z, 14)))
    print(f"{dtype}: {relative(found, exact):.2e}")
    assert 0 < relative(found, exact) < most
    assert dtype_of(half.vae.decoder) == dtype


def test_only_the_encoder_of_a_float16_vae_is_float32(lite: SVD) -> None:
    half = in_dtype(lite, torch.float16)
    assert {p.dtype for p in half.vae.encoder.parameters()} == {torch.float32}
    assert {p.dtype for p in half.vae.quant_conv.parameters()} == {torch.float32}
    assert {p.dtype for p in half.vae.decoder.parameters()} == {torch.float16}
    x = pictures(2, 3, 16, 16)
    with torch.no_grad():
        assert relative(half.encode(x), lite.encode(x)) < 2e-3


def test_a_decoder_that_overflows_goes_on_in_bfloat16_and_says_so(
    lite: SVD, z: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    exact = torch.stack(list(decode_frames(wild(lite), z, 14)))
    half = in_dtype(wild(lite), torch.float16)
    assert all(torch.isfinite(p).all() for p in half.vae.parameters())
    with caplog.at_level(logging.WARNING):
        found = torch.stack(list(decode_frames(half, z, 14)))
    assert torch.isfinite(found).all() and relative(found, exact) < 2e-2
    assert dtype_of(half.vae.decoder) == torch.bfloat16
    assert caplog.text.count("The VAE's decoder overflowed float16: it goes on in bfloat16") == 1


@pytest.mark.parametrize("tile", [64, 4])
def test_so_does_one_in_tiles(lite: SVD, z: Tensor, tile: int) -> None:
    exact = torch.stack(list(stream_decode(wild(lite).vae, z, how=Streaming(tile=tile))))
    half = in_dtype(wild(lite), torch.float16)
    found = torch.stack(list(stream_decode(half.vae, z, how=Streaming(tile=tile))))
    assert torch.isfinite(found).all() and relative(found, exact) < 2e-2
    assert dtype_of(half.vae.decoder) == torch.bfloat16


def test_where_a_host_says_what_to_compute_in_it_is_left_alone(lite: SVD, z: Tensor) -> None:
    half = in_dtype(wild(lite), torch.float16)
    how = Streaming(computed_in=ComputedIn(torch.device("cpu"), torch.float16))
    assert not torch.isfinite(torch.stack(list(stream_decode(half.vae, z, how=how)))).all()
    assert dtype_of(half.vae.decoder) == torch.float16
