"""The host's upscale models, device and progress bar around what enlarges a video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
from torch import Tensor

from ...vsr_ops.image.upscale import upscale_frames
from ...vsr_ops.image.video_tensor import empty_video
from ...vsr_ops.modules.enlarging import Enlarging
from ...vsr_ops.modules.video_upscaler import VideoUpscaler
from .device import intermediate_dtype
from .picture import progress, upscaler


@dataclass(frozen=True)
class HostVideoUpscaler:
    """A video upscaler, and the UPSCALE_MODEL that it stands on."""

    model: VideoUpscaler
    base: Any


def enlarged(frames: Tensor, size: tuple[int, int], method: str, upscale_model: Any = None) -> Tensor:
    """`upscale_frames` by the host's own node, where there is an UPSCALE_MODEL, with the node's progress bar."""
    upscale_fn = None if upscale_model is None else upscaler(upscale_model)
    return upscale_frames(frames, size, method, upscale_fn, progress(len(frames)), intermediate_dtype())


def enlarged_over_time(
    frames: Tensor, size: tuple[int, int], method: str, by: HostVideoUpscaler, strength: float, cuts: Sequence[int]
) -> Tensor:
    """Frames `(n, 3, h, w)` in [0, 1] by a video upscaler on the host's device, with the node's progress bar; it goes
    back afterwards."""
    enlarging = Enlarging(upscaler(by.base), by.model, strength, method)
    out = empty_video(frames, len(frames), size, intermediate_dtype())
    manage, tick = comfy.model_management, progress(len(frames))
    try:
        by.model.to(manage.get_torch_device())
        for index, frame in enumerate(enlarging(frames, size, cuts)):
            out[index] = frame
            tick(1)
    finally:
        by.model.to(manage.unet_offload_device())
    return out
