"""Small videos made on the spot, for the tests."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from vsr_ops.video import Frame, VideoInfo, open_writer

NTSC = Fraction(30000, 1001)


def picture(index: int, height: int, width: int) -> Tensor:
    """Smooth colours that differ from frame to frame, from near black to near white."""
    y = torch.linspace(0, 1, height)[:, None].expand(height, width)
    x = torch.linspace(0, 1, width)[None, :].expand(height, width)
    return torch.stack([0.1 + 0.8 * x, 0.9 - 0.7 * y, (0.2 + 0.05 * index) * (x + y) / 2 + 0.1])


def write(path: Path, info: VideoInfo, codec: str = "h264", size: tuple[int, int] | None = None) -> list[Tensor]:
    size = size or (info.height, info.width)
    images = [picture(i, *size) for i in range(info.frames)]
    with open_writer(path, info, size=size, codec=codec) as writer:
        for image, pts in zip(images, info.times, strict=True):
            writer.write(Frame(image, None, pts))
    return images


def raw_video(
    path: Path,
    times: list[int],
    time_base: Fraction,
    rate: Fraction,
    *,
    sound: str | None = None,
    tracks: int = 1,
    rotate: Callable[[av.VideoStream], None] | None = None,
    size: tuple[int, int] = (48, 64),
    encoder: str = "libx264",
    pixels: str = "yuv420p",
    tags: tuple[int, int, int, int] | None = None,
) -> Path:
    """A video made with PyAV alone: frame i is flat grey of code 60 + 10 i (modulo 150) in every plane."""
    height, width = size
    with av.open(str(path), "w") as output:
        stream = output.add_stream(encoder, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.codec_context.time_base = time_base
        if tags is not None:
            context = stream.codec_context
            context.color_range, context.colorspace, context.color_primaries, context.color_trc = tags
        if rotate is not None:
            rotate(stream)
        if sound is not None:
            audios = [output.add_stream(sound, rate=48000) for _ in range(tracks)]
        for i, pts in enumerate(times):
            frame = av.VideoFrame(width, height, pixels)
            for plane in frame.planes:
                plane.update(bytes([60 + 10 * i % 150]) * plane.buffer_size)
            frame.pts, frame.time_base = pts, time_base
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
        if sound is not None:
            seconds = float((times[-1] + 1) * time_base) + 0.2
            wave = np.sin(np.arange(int(48000 * seconds)) * 0.05).astype(np.float32) * 0.3
            tone = av.AudioFrame.from_ndarray(np.stack([wave, wave]), format="fltp", layout="stereo")
            tone.rate, tone.pts = 48000, 0
            for audio in audios:
                shape = av.AudioResampler(audio.format, "stereo", 48000, audio.codec_context.frame_size or 1024)
                for part in [*shape.resample(tone), *shape.resample(None)]:
                    output.mux(audio.encode(part))
                output.mux(audio.encode(None))
    return path


def steady(path: Path, count: int = 6, **more: object) -> Path:
    return raw_video(path, list(range(count)), Fraction(1, 25), Fraction(25), **more)  # type: ignore[arg-type]


def sound_packets(path: Path) -> list[tuple[float, bytes]]:
    with av.open(str(path)) as source:
        stream = source.streams.audio[0]
        return [(float(p.pts * p.time_base), bytes(p)) for p in source.demux(stream) if p.pts is not None and p.size]
