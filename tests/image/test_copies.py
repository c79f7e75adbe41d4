"""What makes a video makes one: no second copy of it lives beside the result, which hosts take as it lies in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from benchmarks.common import peak_bytes
from tests.support.tensors import randn
from vsr_ops.image.color import COLOR, correct, correct_clamped
from vsr_ops.image.upscale import upscale_frames
from vsr_ops.modules.refiner import Refiner, RefinerShape, refine
from vsr_ops.vae.latents import decode_video
from vsr_ops.views.compare import COMPARE, compare

if TYPE_CHECKING:
    from vsr_ops.backbones.svd import SVD

FRAMES, SIDE = 96, 64


def video(frames: int, side: int, seed: int = 0) -> Tensor:
    """As a host gives it: its memory has the channels last."""
    return rearrange(
        torch.rand(frames, side, side, 3, generator=torch.Generator().manual_seed(seed)), "t h w c -> t c h w"
    )


def one_copy(work: Callable[[], Tensor], spare: float = 0.35) -> Tensor:
    """The result of `work`, which takes no more than it and a share for what is under way."""
    made: list[Tensor] = []
    peak = peak_bytes(lambda: made.append(work()), torch.device("cpu"))
    assert peak <= (1 + spare) * made[0].nbytes, f"{peak / made[0].nbytes:.2f} times the result"
    assert rearrange(made[0], "t c h w -> t h w c").is_contiguous()
    return made[0]


@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("method", ["bicubic", "lanczos"])
def test_upscaling(method: str, dtype: torch.dtype | None) -> None:
    small = video(FRAMES, SIDE // 4)
    found = one_copy(lambda: upscale_frames(small, (SIDE, SIDE), method, dtype=dtype))
    expected = upscale_frames(small.contiguous(), (SIDE, SIDE), method)
    assert torch.equal(found, expected.to(dtype or torch.float32))


@pytest.mark.parametrize("method", [name for name in COLOR if name != "none"])
def test_colours(method: str) -> None:
    x, reference = video(FRAMES, SIDE), video(FRAMES, SIDE, seed=1)
    found = one_copy(lambda: correct_clamped(method, x, reference))
    assert torch.equal(found, correct(method, x, reference).clamp(0, 1))
    assert correct_clamped(method, x, reference, strength=0) is x
    assert correct_clamped("none", x, reference) is x


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_refining(dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    model = Refiner(RefinerShape(width=2, blocks=1, mixes=1)).eval()
    torch.nn.init.normal_(model.leave.weight, std=0.1)
    peaks: list[int] = []
    for frames in (FRAMES // 2, FRAMES):
        pair = video(frames, SIDE), video(frames, SIDE, seed=1)
        made: list[Tensor] = []
        peaks.append(peak_bytes(lambda: made.append(refine(model, *pair, dtype=dtype)), torch.device("cpu")))  # noqa: B023
        assert torch.equal(made[0], refine(model, *pair).to(dtype or torch.float32))
        assert rearrange(made[0], "t c h w -> t h w c").is_contiguous()
    # A chunk is under way whatever the length: what grows is the result.
    assert peaks[1] - peaks[0] <= 1.1 * made[0].nbytes / 2


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_decoding(tiny: SVD, dtype: torch.dtype | None) -> None:
    """One frame at a time is under way, whatever the length."""
    z = randn(6, 4, 2, 2)
    found = decode_video(tiny, z, 2, dtype=dtype)
    assert rearrange(found, "t c h w -> t h w c").is_contiguous()
    assert torch.equal(found, decode_video(tiny, z, 2).to(dtype or torch.float32))


@pytest.mark.parametrize("mode", [mode for mode in COMPARE if mode != "temporal profile"])
def test_comparing(mode: str) -> None:
    videos: list[Any] = [video(FRAMES, SIDE), video(FRAMES, SIDE, seed=1)]
    one_copy(lambda: compare(mode, videos, ["", ""]))
