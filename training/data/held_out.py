"""Clips kept out of training, and what is upscaled of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from training.data.data import HELD_OUT, PICTURES, halve, read_picture
from training.data.degradation import h264
from vsr_ops.cli.demo_clip import camera_path
from vsr_ops.image.resize import quantize8, resize_bicubic

SCALE = 4
#: The photograph whose clip is large enough for many tiles; the others are SMALL.
LARGE_PHOTO = "roman-colosseum"
LARGE, SMALL = (720, 1280), (256, 384)


@dataclass(frozen=True)
class Clip:
    """A clean clip `(frames, 3, h, w)` in 8-bit levels and what is upscaled: a quarter of its size."""

    name: str
    truth: Tensor
    small: Tensor


def truths(root: Path, frames: int, large: bool = True) -> dict[str, Tensor]:
    """Held-out clips by name, sides multiples of 8: videos halved whole, photographs under a moving camera."""
    found: dict[str, Tensor] = {}
    for folder in sorted(path for path in root.rglob("*") if path.is_dir() and path.name in HELD_OUT):
        paths = sorted(path for path in folder.iterdir() if path.suffix in PICTURES)[:frames]
        video = halve(torch.stack([read_picture(path) for path in paths])).float() / 255
        height, width = (side // 8 * 8 for side in video.shape[-2:])
        found[folder.name] = video[..., :height, :width]
    for path in sorted(path for path in root.rglob("*") if path.suffix in PICTURES and path.stem in HELD_OUT):
        wide = path.stem == LARGE_PHOTO
        photo = read_picture(path).float() / 255 if wide else halve(read_picture(path)[None])[0].float() / 255
        if large or not wide:
            found[path.stem] = camera_path(photo, frames, *(LARGE if wide else SMALL))
    return {name: quantize8(clip) for name, clip in found.items()}


def shrunk(clips: Mapping[str, Tensor], crf: int | None) -> list[Clip]:
    """The clips a quarter as large (antialiased bicubic, 8-bit), then H.264 at `crf`; None leaves them clean."""
    made: list[Clip] = []
    for name, truth in clips.items():
        small = quantize8(resize_bicubic(truth, (truth.shape[-2] // SCALE, truth.shape[-1] // SCALE)))
        made.append(Clip(name, truth, small if crf is None else h264(small, crf)))
    return made
