"""Real video codecs on clips in memory, one thread each, so that the same clip gives the same bits every time.

So they do on one kind of processor and one build of PyAV; x264's macroblock tree is in floating point.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast

import numpy as np
import torch
from av.codec.context import CodecContext
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from einops import rearrange
from torch import Tensor

from ..errors import SettingError

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
"""RGB bytes, channels last."""

DECODERS = {"libx264": "h264", "mpeg4": "mpeg4"}
"""Encoders by name, each with its decoder."""

_REPEATABLE = "asm=SSE4.2"
"""x264's AVX-512 code for macroblock trees gives other bits from run to run (in up to half of the runs, by where
memory lies); its older code, as fast here, gives the same ones. `mbtree=0` would too, but is not what real files
have: it gives the first frame 2 dB more, and the others less. x264 for other processors ignores this."""

_LONG = 100
"""Frames of the clips (REDS) whose bit rates are published: of so many, one is a key frame."""

_KEY_TO_OTHER = 5
"""Key frames take 2 to 8 times the bits of others; assumed where a clip of one frame has no others."""

_KEY_FRAME = b"\0\0\1\x65"
"""What an H.264 key frame's slice starts with."""

_FINE = 10_000
"""Bits per second that are told apart well enough in whole kilobits."""


@dataclass(frozen=True)
class Codec:
    """An encoder and its one aim: a constant rate factor, or a bit rate in bits per second at `fps`."""

    name: str = "libx264"
    crf: int | None = None
    bit_rate: int | None = None
    fps: int = 24


def compress(clip: Tensor, codec: Codec) -> Tensor:
    """`(frames, 3, h, w)` RGB in [0, 1] as it comes back from the codec (8-bit, YUV 4:2:0, BT.601).

    Raises SettingError for an unknown codec, one without an aim, and for a height or width that is odd.
    """
    decoded = np.stack(list(decode(encode(_pixels(clip), codec), codec)))
    return rearrange(torch.tensor(decoded), "t h w c -> t c h w").float().div(255)


def h264(clip: Tensor, crf: int) -> Tensor:
    """`compress` by libx264 (preset medium, 24 frames per second) at a constant rate factor."""
    return compress(clip, Codec(crf=crf))


def at_bit_rate(clip: Tensor, bits: float) -> Codec:
    """libx264 at the finest constant rate factor at which `clip` takes at most `bits` a frame, as part of a long one.

    For short crops, on which x264's own rate control fails: it has no time to settle, the key frame is a large part
    of so few frames, and the 700 bytes x264 writes about itself are held against the rest. Here the key frame counts
    once in 100 frames and the stream's headers not at all, which is within 2 dB of the same crop of a whole frame;
    x264's rate control is 3 to 7 dB below. 51, the coarsest, where that still takes more.
    """
    pixels = _pixels(clip)
    return Codec(crf=min(51, bisect_left(range(52), True, key=lambda crf: _frame_bits(pixels, crf) <= bits)))


def _frame_bits(pixels: Pixels, crf: int) -> float:
    first, *others = encode(pixels, Codec(crf=crf))
    key = len(first) - first.index(_KEY_FRAME)
    other = sum(map(len, others)) / len(others) if others else key / _KEY_TO_OTHER
    return 8 * (key + (_LONG - 1) * other) / _LONG


def encode(pixels: Pixels, codec: Codec) -> list[bytes]:
    """The packets of `(frames, h, w, 3)` RGB bytes. Raises SettingError as `compress` does."""
    height, width = pixels.shape[1:3]
    _check(height, width, codec)
    encoder = CodecContext.create(codec.name, "w")
    assert isinstance(encoder, VideoCodecContext)
    encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
    # FFmpeg hands x264 whole kilobits per second: small rates are told as more frames in less time.
    haste = max(1, math.ceil(_FINE / codec.bit_rate)) if codec.bit_rate and codec.name == "libx264" else 1
    encoder.time_base, encoder.framerate = Fraction(1, codec.fps * haste), Fraction(codec.fps * haste)
    encoder.thread_count = 1
    if codec.name == "libx264":
        encoder.options = {"preset": "medium", "x264-params": _REPEATABLE} | (
            {} if codec.crf is None else {"crf": str(codec.crf)}
        )
    if codec.bit_rate is not None:
        encoder.bit_rate = codec.bit_rate * haste
        # FFmpeg's own tolerance, but for rates at which MPEG-4 refuses it.
        encoder.bit_rate_tolerance = max(codec.bit_rate * haste, 4_000_000)
    step = cast("Callable[[VideoFrame | None], list[Packet[VideoStream]]]", cast(Any, encoder).encode)
    packets: list[bytes] = []
    for index, picture in enumerate(pixels):
        frame = VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
        frame.pts, frame.time_base = index, encoder.time_base
        packets += [bytes(packet) for packet in step(frame)]
    return packets + [bytes(packet) for packet in step(None)]


def decode(packets: list[bytes], codec: Codec) -> Iterator[Pixels]:
    """The frames of `packets`, `(h, w, 3)` RGB bytes, in the order shown."""
    decoder = CodecContext.create(DECODERS[codec.name], "r")
    assert isinstance(decoder, VideoCodecContext)
    decoder.thread_count = 1
    for packet in [*map(_padded, packets), None]:
        for frame in cast(Any, decoder).decode(packet):
            yield frame.to_ndarray(format="rgb24")


def _padded(data: bytes) -> Packet[VideoStream]:
    """A packet with FFmpeg's zeros behind it: decoders read on a little, and `Packet(data)` has what lies there."""
    packet: Packet[VideoStream] = cast(Any, Packet)(len(data))
    packet.update(data)
    return packet


def _pixels(clip: Tensor) -> Pixels:
    return rearrange((clip.clamp(0, 1) * 255).round().to(torch.uint8), "t c h w -> t h w c").contiguous().numpy()


def _check(height: int, width: int, codec: Codec) -> None:
    if codec.name not in DECODERS:
        raise SettingError(f"unknown codec {codec.name!r}: expected one of {', '.join(DECODERS)}")
    if (codec.crf is None) == (codec.bit_rate is None):
        raise SettingError(f"codec {codec.name} has crf {codec.crf} and bit rate {codec.bit_rate}: give one of them")
    if codec.bit_rate is not None and codec.bit_rate < 1:
        raise SettingError(f"bit rate {codec.bit_rate} cannot be met: expected 1 or more bits per second")
    if codec.crf is not None and codec.name != "libx264":
        raise SettingError(f"codec {codec.name} has no constant rate factor: give it a bit rate")
    if height % 2 or width % 2:
        raise SettingError(
            f"frames of {width}x{height} cannot be compressed: YUV 4:2:0 needs an even width and height;"
            f" crop them to {width - width % 2}x{height - height % 2} (of the clean clip, that times the scale)"
        )
