"""Degradation: from a clean clip to the low-resolution one an artist would have. Ways in a table, by name.

Each takes a clean clip `(frames, 3, h, w)` RGB in [0, 1], a generator and the scale, draws its parameters once for
the clip, and gives `(frames, 3, h/scale, w/scale)` in 8-bit levels: the same bits for the same generator.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from training.data.realbasic import apply_plan, draw_plan
from training.loop.draws import pick, uniform
from vsr_ops.errors import SettingError
from vsr_ops.image.resize import quantize8, resize_bicubic
from vsr_ops.video.codec import Codec, at_bit_rate, compress, h264

__all__ = ["DEGRADATIONS", "degrade", "degrade_by", "draw_bitrate", "draw_crf", "h264", "shrink"]

Degradation = Callable[[Tensor, torch.Generator, int], Tensor]

SDATC_CRF = (15, 25, 35)
SDATC_BIT_RATES = (10_000, 100_000)
SDATC_AREA = 320 * 180
"""Pixels of the paper's low-resolution frames (REDS over 4), to which its bit rates belong."""
SDATC_FPS = 24
_HEADER_BITS = 80
"""Of each of x264's frames, about; a crop does not shrink them."""


def shrink(clip: Tensor, scale: int = 4) -> Tensor:
    """Antialiased bicubic downsampling, in 8-bit levels. Raises SettingError for a size that scale does not divide."""
    height, width = clip.shape[-2:]
    if height % scale or width % scale:
        raise SettingError(
            f"a clip of {width}x{height} cannot be made {scale} times smaller: crop it to a multiple of {scale},"
            f" such as {width - width % scale}x{height - height % scale}"
        )
    return quantize8(resize_bicubic(clip, (height // scale, width // scale)))


def draw_crf(rng: torch.Generator) -> Codec:
    """One of SDATC's three qualities (section IV)."""
    return Codec(crf=pick(rng, SDATC_CRF))


def draw_bitrate(rng: torch.Generator, size: tuple[int, int], rates: tuple[float, ...] = SDATC_BIT_RATES) -> float:
    """Bits a frame of (h, w) = `size`: a random rate from the first to the second of `rates`, in bits a second of 24
    frames of 320x180; SDATC's are 10K to 100K (section IV-A).

    A crop has its area's part of them. Left whole they would spoil full frames and spare small crops.
    """
    frame = uniform(rng, rates[0], rates[1]) / SDATC_FPS
    return _HEADER_BITS + (frame - _HEADER_BITS) * size[0] * size[1] / SDATC_AREA


def clean(clip: Tensor, rng: torch.Generator, scale: int = 4) -> Tensor:
    """Downsampling alone; draws nothing."""
    del rng
    return shrink(clip, scale)


def crf(clip: Tensor, rng: torch.Generator, scale: int = 4) -> Tensor:
    """H.264 at CRF 15, 25 or 35."""
    return compress(shrink(clip, scale), draw_crf(rng))


def bitrate(clip: Tensor, rng: torch.Generator, scale: int = 4) -> Tensor:
    """H.264 at a random bit rate, met as `at_bit_rate` says: crops look as they do in whole frames, within 2 dB."""
    small = shrink(clip, scale)
    return compress(small, at_bit_rate(small, draw_bitrate(rng, (small.shape[-2], small.shape[-1]))))


def sdatc(clip: Tensor, rng: torch.Generator, scale: int = 4) -> Tensor:
    """SDATC's: by constant quality or by bit rate, as likely."""
    return (crf if uniform(rng, 0, 1) < 0.5 else bitrate)(clip, rng, scale)


def realbasicvsr(clip: Tensor, rng: torch.Generator, scale: int = 4, walk: float = 1.0) -> Tensor:
    """RealBasicVSR's pipeline, as DC-VSR has it. Raises SettingError unless h and w are multiples of 2 * scale."""
    frames, _, height, width = clip.shape
    return apply_plan(clip, draw_plan(rng, frames, (height, width), scale, walk))


def degrade(clip: Tensor, rng: torch.Generator, scale: int = 4, clean_share: float = 0.2) -> Tensor:
    """The bundled weights' own: a `clean_share` without compression, the rest H.264 at any CRF of 15 to 35."""
    small = shrink(clip, scale)
    if uniform(rng, 0, 1) < clean_share:
        return small
    return h264(small, round(uniform(rng, 15, 35)))


DEGRADATIONS: dict[str, Degradation] = {
    "clean": clean,
    "crf": crf,
    "bitrate": bitrate,
    "sdatc": sdatc,
    "realbasicvsr": realbasicvsr,
    "realbasicvsr-steady": partial(realbasicvsr, walk=0.0),
    "lite": degrade,
}
"""Ways to degrade by name. "realbasicvsr" lets its parameters walk from frame to frame as published, "-steady" keeps
one draw for all frames."""


def degrade_by(name: str, clip: Tensor, rng: torch.Generator, scale: int = 4) -> Tensor:
    """Degrade in the way called `name`. Raises SettingError, naming the known ones, for another."""
    if name not in DEGRADATIONS:
        raise SettingError(f"unknown degradation {name!r}: expected one of {', '.join(DEGRADATIONS)}")
    return DEGRADATIONS[name](clip, rng, scale)
