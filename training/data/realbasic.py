"""RealBasicVSR's degradation (arXiv 2111.12704; DC-VSR's too): Real-ESRGAN's second-order chain, on video.

A plan is drawn once per clip and then applied: a tuple of stages, each a frozen value. The figures are those of
the public configuration `realbasicvsr_wogan-c64b20-2x30x8_8xb2-lr1e-4-300k_reds`, with its slow walk of the
parameters from frame to frame. Where it differs:

- bit rates belong to its 256x256 crops at one frame per second and grow with the clean clip's area, so that a
  large frame is compressed like a crop of it. They are aims, there as here: encoders of so few frames meet them
  badly. On 5 to 15 frames libx264 took 0.3 to 6 times its aim, MPEG-4 (which has no quantiser coarse or fine enough)
  0.1 to 24 times, most on short noisy clips at low rates;
- its encoder "h264" is libx264 under another name, so that libx264 has two thirds;
- noise is in units of the full range, as in Real-ESRGAN (mmagic 1.x feeds its Poisson noise values up to 255);
- the sharpening of the ground truth is left out: it is the loss's business.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from training.data.kernels import Shape, kernel
from training.loop.draws import integer, pick, pick_weighted, uniform
from vsr_ops.errors import SettingError
from vsr_ops.video.codec import Codec, decode, encode

Picture = np.ndarray[Any, np.dtype[np.float32]]
"""(h, w, 3) RGB about [0, 1]."""

KERNEL_SHARES = {
    "iso": 0.405,
    "aniso": 0.225,
    "generalized_iso": 0.108,
    "generalized_aniso": 0.027,
    "plateau_iso": 0.108,
    "plateau_aniso": 0.027,
    "sinc": 0.1,
}
KERNEL_SIZES = (7, 9, 11, 13, 15, 17, 19, 21)
RESIZERS = ("bilinear", "area", "bicubic")
CODEC_SHARES = {"libx264": 2 / 3, "mpeg4": 1 / 3}
BIT_RATES = (10_000, 100_000)
REFERENCE_AREA = 256 * 256
"""Pixels of the clean crop whose bit rates are published."""

FIRST = {"sigma": (0.2, 3.0), "scale": (0.15, 1.5), "gaussian": (1, 30), "poisson": (0.05, 3.0)}
SECOND = {"sigma": (0.2, 1.5), "scale": (0.3, 1.2), "gaussian": (1, 25), "poisson": (0.05, 2.5)}
FIRST_MODES = {"up": 0.2, "down": 0.7, "keep": 0.1}
SECOND_MODES = {"up": 0.3, "down": 0.4, "keep": 0.3}


@dataclass(frozen=True)
class Blur:
    """One kernel per frame, of one kind and size."""

    kind: str
    shapes: tuple[Shape, ...]

    def apply(self, frames: list[Picture]) -> list[Picture]:
        import cv2

        kernels = [kernel(self.kind, shape).numpy() for shape in self.shapes]
        return [cv2.filter2D(f, -1, k).astype(np.float32) for f, k in zip(frames, kernels, strict=True)]


@dataclass(frozen=True)
class Resize:
    """One (height, width) per frame, each even."""

    way: str
    sizes: tuple[tuple[int, int], ...]

    def apply(self, frames: list[Picture]) -> list[Picture]:
        return [_resized(frame, size, self.way) for frame, size in zip(frames, self.sizes, strict=True)]


@dataclass(frozen=True)
class Noise:
    """`kind` "gaussian": `levels` are deviations out of 255; "poisson": factors on shot noise. One per frame."""

    kind: str
    grey: bool
    levels: tuple[float, ...]
    seed: int

    def apply(self, frames: list[Picture]) -> list[Picture]:
        rng = torch.Generator().manual_seed(self.seed)
        noise = {"gaussian": _gaussian, "poisson": _poisson}[self.kind]
        return [f + noise(f, self.grey, level, rng) for f, level in zip(frames, self.levels, strict=True)]


@dataclass(frozen=True)
class Jpeg:
    """One quality per frame."""

    qualities: tuple[int, ...]

    def apply(self, frames: list[Picture]) -> list[Picture]:
        return [_jpeg(frame, quality) for frame, quality in zip(frames, self.qualities, strict=True)]


@dataclass(frozen=True)
class Compress:
    """Real video compression; frames of another size take the first one's."""

    codec: Codec

    def apply(self, frames: list[Picture]) -> list[Picture]:
        size = (frames[0].shape[0], frames[0].shape[1])
        pixels = np.stack([_bytes(_resized(frame, size, "bicubic")) for frame in frames])
        return [_unit(frame) for frame in decode(encode(pixels, self.codec), self.codec)]


Stage = Blur | Resize | Noise | Jpeg | Compress
Plan = tuple[Stage, ...]


def draw_plan(rng: torch.Generator, frames: int, size: tuple[int, int], scale: int = 4, walk: float = 1.0) -> Plan:
    """Every parameter of one clip of `frames` clean frames of `size` = (h, w), to be `scale` times smaller.

    `walk` multiplies the published steps of the parameters from frame to frame; 0 holds them still. Raises
    SettingError for a size whose low-resolution frames are not even.
    """
    height, width = size
    if height % (2 * scale) or width % (2 * scale):
        raise SettingError(
            f"a clip of {width}x{height} cannot be degraded for x{scale}: the codecs need even low-resolution"
            f" frames; crop it to a multiple of {2 * scale}, such as"
            f" {width - width % (2 * scale)}x{height - height % (2 * scale)}"
        )
    rate = height * width / REFERENCE_AREA
    plan: list[Stage] = [_draw_blur(rng, frames, FIRST, walk)]
    resize = _draw_resize(rng, frames, size, FIRST, FIRST_MODES, 0.015 * walk)
    plan += [resize, _draw_noise(rng, frames, FIRST, walk), _draw_jpeg(rng, frames, walk), _draw_codec(rng, rate)]
    if uniform(rng, 0, 1) < 0.8:
        plan.append(_draw_blur(rng, frames, SECOND, walk))
    # Video compression has given every frame the first one's size.
    plan.append(_draw_resize(rng, frames, resize.sizes[0], SECOND, SECOND_MODES, 0.03 * walk))
    plan += [_draw_noise(rng, frames, SECOND, walk), _draw_jpeg(rng, frames, walk)]
    last: list[Stage] = [Resize(pick(rng, RESIZERS), ((height // scale, width // scale),) * frames)]
    if uniform(rng, 0, 1) < 0.8:
        last.append(_draw_sinc(rng, frames, walk))
    video = _draw_codec(rng, rate)
    plan += [video, *last] if uniform(rng, 0, 1) < 0.5 else [*last, video]
    return tuple(plan)


def apply_plan(clip: Tensor, plan: Plan) -> Tensor:
    """`(frames, 3, h, w)` RGB in [0, 1] through every stage of `plan`; clamped to [0, 1] and rounded to 8 bit."""
    frames: list[Picture] = list(rearrange(clip.float(), "t c h w -> t h w c").contiguous().numpy())
    for stage in plan:
        frames = stage.apply(frames)
    pixels = torch.from_numpy(np.stack([_bytes(frame) for frame in frames]))
    return rearrange(pixels, "t h w c -> t c h w").float().div(255)


def _walk(rng: torch.Generator, frames: int, low: float, high: float, step: float, start: float) -> list[float]:
    values: list[float] = [start]
    for _ in range(frames - 1):
        values.append(min(max(values[-1] + uniform(rng, -step, step), low), high))
    return values


def _drift(rng: torch.Generator, frames: int, limits: tuple[float, float], step: float) -> list[float]:
    return _walk(rng, frames, *limits, step, uniform(rng, *limits))


def _draw_blur(rng: torch.Generator, frames: int, level: dict[str, tuple[float, float]], walk: float) -> Blur:
    kind, size = pick_weighted(rng, KERNEL_SHARES), pick(rng, KERNEL_SIZES)
    # Real-ESRGAN: small sinc kernels cannot hold the lower cutoffs.
    omega = (math.pi / 3 if size < 13 else math.pi / 5, math.pi)
    columns = [
        _drift(rng, frames, level["sigma"], 0.02 * walk),
        _drift(rng, frames, level["sigma"], 0.02 * walk),
        _drift(rng, frames, (-math.pi, math.pi), 0.31416 * walk),
        _drift(rng, frames, (0.5, 4), 0.05 * walk),
        _drift(rng, frames, (1, 2), 0.1 * walk),
        _drift(rng, frames, omega, 0.0628 * walk),
    ]
    return Blur(kind, tuple(Shape(size, *values) for values in zip(*columns, strict=True)))


def _draw_sinc(rng: torch.Generator, frames: int, walk: float) -> Blur:
    size = pick(rng, KERNEL_SIZES)
    cutoffs = _drift(rng, frames, (math.pi / 3, math.pi), 0.0628 * walk)
    return Blur("sinc", tuple(Shape(size, 1, 1, 0, 1, 1, omega) for omega in cutoffs))


def _draw_resize(
    rng: torch.Generator,
    frames: int,
    size: tuple[int, int],
    level: dict[str, tuple[float, float]],
    modes: dict[str, float],
    step: float,
) -> Resize:
    way, mode = pick(rng, RESIZERS), pick_weighted(rng, modes)
    low, high = level["scale"]
    start = {"up": uniform(rng, 1, high), "down": uniform(rng, low, 1), "keep": 1.0}[mode]
    factors = _walk(rng, frames, low, high, step, start)
    return Resize(way, tuple((_even(size[0] * factor), _even(size[1] * factor)) for factor in factors))


def _draw_noise(rng: torch.Generator, frames: int, level: dict[str, tuple[float, float]], walk: float) -> Noise:
    kind = pick(rng, ("gaussian", "poisson"))
    step = {"gaussian": 0.1, "poisson": 0.005}[kind] * walk
    grey = uniform(rng, 0, 1) < 0.4
    return Noise(kind, grey, tuple(_drift(rng, frames, level[kind], step)), integer(rng, 2**31))


def _draw_jpeg(rng: torch.Generator, frames: int, walk: float) -> Jpeg:
    return Jpeg(tuple(round(value) for value in _drift(rng, frames, (30, 95), 3 * walk)))


def _draw_codec(rng: torch.Generator, rate: float) -> Compress:
    bits = max(1, round(uniform(rng, *BIT_RATES) * rate))
    return Compress(Codec(pick_weighted(rng, CODEC_SHARES), bit_rate=bits, fps=1))


def _even(length: float) -> int:
    return max(2, 2 * int(length // 2))


def _resized(frame: Picture, size: tuple[int, int], way: str) -> Picture:
    import cv2

    if (frame.shape[0], frame.shape[1]) == size:
        return frame
    ways = {"bilinear": cv2.INTER_LINEAR, "area": cv2.INTER_AREA, "bicubic": cv2.INTER_CUBIC}
    return cast(Picture, cv2.resize(frame, size[::-1], interpolation=ways[way]))


def _gaussian(frame: Picture, grey: bool, level: float, rng: torch.Generator) -> Picture:
    depth = 1 if grey else 3
    return (torch.randn(*frame.shape[:2], depth, generator=rng) * (level / 255)).numpy()


def _poisson(frame: Picture, grey: bool, level: float, rng: torch.Generator) -> Picture:
    """Shot noise of the frame in 8 bit; as many photons at white as a power of two no less than its levels."""
    pixels = torch.from_numpy(_bytes(frame)).float()
    if grey:
        pixels = (pixels @ torch.tensor([0.299, 0.587, 0.114]))[..., None].round()
    photons = 2 ** math.ceil(math.log2(len(pixels.unique())))
    light = pixels / 255
    return ((torch.poisson(light * photons, generator=rng) / photons - light) * level).numpy()


def _jpeg(frame: Picture, quality: int) -> Picture:
    file = io.BytesIO()
    Image.fromarray(_bytes(frame)).save(file, "JPEG", quality=quality)
    with Image.open(file) as image:
        return _unit(np.asarray(image.convert("RGB")))


def _bytes(frame: Picture) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return (frame.clip(0, 1) * 255).round().astype(np.uint8)


def _unit(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> Picture:
    return cast(Picture, pixels.astype(np.float32) / 255)
