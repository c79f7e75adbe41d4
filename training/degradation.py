"""Degradation: x4 antialiased bicubic downsampling, then real H.264 at a random quality (SDATC, section IV)."""

from __future__ import annotations

import io

import av
import torch
from einops import rearrange
from torch import Tensor

from training.data import uniform
from vsr_ops.resize import quantize8, resize_bicubic


def h264(clip: Tensor, crf: int) -> Tensor:
    """`(frames, 3, h, w)` RGB in [0, 1] (h, w even) encoded and decoded again by libx264 at `crf`.

    One thread, so that the result is the same bit for bit every time.
    """
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=24, options={"crf": str(crf), "preset": "medium", "threads": "1"})
        stream.height, stream.width = clip.shape[-2:]
        stream.pix_fmt = "yuv420p"
        for frame in rearrange((clip * 255).round().to(torch.uint8), "t c h w -> t h w c").numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    file.seek(0)
    with av.open(file) as container:
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return rearrange(torch.stack(frames), "t h w c -> t c h w").float() / 255


def degrade(clip: Tensor, rng: torch.Generator, scale: int = 4, clean_share: float = 0.2) -> Tensor:
    """The low-resolution input for a clean clip: 8-bit, compressed at CRF 15 to 35 but for a `clean_share`."""
    height, width = clip.shape[-2] // scale, clip.shape[-1] // scale
    small = quantize8(resize_bicubic(clip, (height, width)))
    if uniform(rng, 0, 1) < clean_share:
        return small
    return h264(small, round(uniform(rng, 15, 35)))
