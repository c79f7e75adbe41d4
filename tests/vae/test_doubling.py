"""Doubling and convolving in the short way gives what diffusers' upsampler gives, for four products of nine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.support.small_vaes import noise
from vsr_ops.vae.doubling import upsampling


def layer(**settings: Any) -> Any:
    torch.manual_seed(1)
    return Upsample2D(8, use_conv=True, **settings).requires_grad_(False)


def products(run: Any, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counted:
        run(x)
    return counted.get_total_flops()


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 4), (16, 9)])
def test_it_is_the_layers_own_picture_up_to_the_border(size: tuple[int, int]) -> None:
    own, x = layer(out_channels=6), noise(3, 8, *size)
    short = upsampling(own)
    assert short(x).shape == (3, 6, 2 * size[0], 2 * size[1])
    torch.testing.assert_close(short(x), own(x), atol=1e-5, rtol=0)
    torch.testing.assert_close(short(x.contiguous(memory_format=torch.channels_last)), own(x), atol=1e-5, rtol=0)


@torch.no_grad()
def test_it_takes_four_products_for_nine() -> None:
    own, x = layer(), noise(1, 8, 32, 32)
    short = upsampling(own)
    short(x)  # adds the weights, once
    # One row and column of windows more than there are pixels.
    assert products(short, x) == pytest.approx(products(own, x) * 4 / 9 * (33 / 32) ** 2)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_precision_is_the_layers_own_to_the_bit(dtype: torch.dtype) -> None:
    own, x = layer(), noise(1, 8, 6, 6).to(dtype)
    short = upsampling(own)
    own.to(dtype)
    assert torch.equal(short(x), own(x))


def test_who_learns_gets_the_gradients_of_the_layer() -> None:
    own = layer().requires_grad_(True)
    upsampling(own)(noise(1, 8, 4, 4)).sum().backward()
    assert own.conv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("settings", [{"use_conv_transpose": True}, {"norm_type": "rms_norm"}, {"kernel_size": 5}])
def test_a_layer_of_another_kind_runs_as_it_is(settings: dict[str, Any]) -> None:
    own = layer(**settings)
    assert upsampling(own) is own
