"""Between a decoder's pixels and RGB: exact YUV matrices, ranges, bit depths and chroma siting.

FFmpeg's scaler only unpacks here, at an unchanged bit depth. Its own YUV to RGB is off by up to one code of
255 at 16 bits out, its depth changes differ by plane, and where it takes chroma to sit depends on the file.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from av.video.format import VideoFormat
from av.video.frame import VideoFrame
from av.video.plane import VideoPlane
from torch import Tensor
from torch.nn import functional as F

MATRICES: dict[int, tuple[float, float]] = {
    1: (0.2126, 0.0722),
    4: (0.30, 0.11),
    5: (0.299, 0.114),
    6: (0.299, 0.114),
    7: (0.212, 0.087),
    9: (0.2627, 0.0593),
}
"""(Kr, Kb) by the code of ITU-T H.273 table 4, which FFmpeg's AVColorSpace repeats: 709, FCC, 601, 601,
SMPTE 240M, BT.2020. Kg = 1 - Kr - Kb."""

RGB_MATRIX = 0
"""The H.273 code of pixels that are already RGB."""

UNSPECIFIED = 2
"""The H.273 code for "not said", in matrices, primaries and transfers alike."""

_TOGETHER = 2**18
"""Pixels that are converted together, about: what lies between stays in the processor's cache."""

_DEEP = (9, 10, 12, 14, 16)
_SAMPLINGS = {(8, 8): "420", (8, 16): "422"}
"""By the size of the chroma of a picture of 16 by 16."""


def guess_matrix(width: int, height: int) -> int:
    """The matrix of YUV that names none, as players guess it: 709 from 1280 wide or 577 high, else 601."""
    return 1 if width >= 1280 or height > 576 else 6


def has_alpha(pixels: VideoFormat) -> bool:
    """Whether a pixel format has an alpha channel; a palette may hold one, so it counts."""
    return pixels.has_palette or any(part.is_alpha for part in pixels.components)


def is_grey(pixels: VideoFormat) -> bool:
    """Whether a pixel format has one channel besides alpha, and no palette."""
    return not pixels.has_palette and sum(not part.is_alpha for part in pixels.components) == 1


def is_rgb(pixels: VideoFormat) -> bool:
    """Whether a pixel format holds RGB, directly or through a palette or a Bayer mosaic."""
    return pixels.is_rgb or pixels.has_palette or pixels.is_bayer


def bit_depth(pixels: VideoFormat) -> int:
    """Bits of the deepest channel."""
    return max(part.bits for part in pixels.components)


def to_rgb(frame: VideoFrame, matrix: int, full: bool, centred: bool = False) -> tuple[Tensor, Tensor | None]:
    """A decoded frame as RGB (3, h, w) and alpha (1, h, w) or None, float32 in [0, 1].

    `matrix` is a key of MATRICES (not read for RGB and grey); `full` says that YUV and grey use all codes
    rather than 16..235 and 16..240; `centred` that halved chroma sits between two columns, as in JPEG, and
    not on the left one. Range and matrix equations: ITU-T H.273, section 8.3. Colours outside RGB's cube are
    clipped.
    """
    pixels = frame.format
    target = _planar(pixels)
    # Equal ranges on both sides, or the scaler would stretch what it only has to unpack.
    span = 2 if full or is_rgb(pixels) else 1
    flat = frame.reformat(format=target, src_color_range=span, dst_color_range=span, interpolation="BICUBIC")
    bits = bit_depth(flat.format)
    top = 2.0**bits - 1
    planes = [_codes(flat, index, bits) for index in range(len(flat.planes))]
    alpha = planes[3].unsqueeze(0) / top if len(planes) == 4 else None
    image = torch.empty(3, flat.height, flat.width)
    if len(planes) == 1:
        torch.clamp(_luma(planes[0], full, bits), 0, 1, out=image[0])
        image[1:] = image[0]
    elif target.startswith("gbr"):
        for out, plane in zip(image, (planes[2], planes[0], planes[1]), strict=True):
            torch.div(plane, top, out=out)
    else:
        _fill_from_yuv(image, planes[0], planes[1:3], _from_chroma(matrix, full, bits), full, bits, centred)
    return image, alpha


def from_rgb(image: Tensor, alpha: Tensor | None, pixels: str, matrix: int, full: bool) -> VideoFrame:
    """A frame to encode, of planar pixel format `pixels`, from RGB (3, h, w), alpha (1, h, w) in [0, 1].

    Values are clipped and rounded to the nearest code. Subsampled chroma is sited as H.264 says by default:
    left in a row, centred between rows. A format with alpha and no `alpha` is written opaque.
    """
    _, height, width = image.shape
    frame = VideoFrame(width, height, pixels)
    bits = bit_depth(frame.format)
    top = 2**bits - 1
    for index in range(len(frame.planes)):
        _blank_padding(frame.planes[index])
    planes = [_codes(frame, index, bits) for index in range(len(frame.planes))]
    halved = planes[1].shape[0] < height
    rows = 2 * max(1, _TOGETHER // (2 * width))
    for start in range(0, height, rows):
        part = slice(start, min(start + rows, height))
        rgb = image[:, part].clamp(0, 1)
        if frame.format.is_rgb:
            values = list(rgb[[1, 2, 0]] * top)
        else:
            luma, chroma = _rgb_to_yuv(rgb, matrix, full, bits)
            values = [luma, *_shrink(chroma, planes[1].shape[1] < width, halved)]
        if has_alpha(frame.format):
            opacity = torch.ones_like(rgb[0]) if alpha is None else alpha[0, part].clamp(0, 1)
            values.append(opacity * top)
        for index, value in enumerate(values):
            there = slice(start // 2, (part.stop + 1) // 2) if halved and index in (1, 2) else part
            planes[index][there] = value.round_().clamp_(0, top).to(planes[index].dtype)
    return frame


def _planar(pixels: VideoFormat) -> str:
    """The planar format of the same bit depth, and the same subsampling where it is 4:2:0 or 4:2:2."""
    bits, alpha = bit_depth(pixels), "a" if has_alpha(pixels) else ""
    # Float pixels are 32 bits: the only depth that changes.
    deep = next((depth for depth in _DEEP if bits <= depth), 16) if bits > 8 else 0
    suffix = f"{deep}le" if deep else ""
    if is_grey(pixels) and not alpha:
        return f"gray{suffix}"
    # Grey with alpha has no planar format; FFmpeg copies its one channel into three.
    if is_rgb(pixels) or is_grey(pixels):
        return f"gbr{alpha}p{suffix}"
    sampling = _SAMPLINGS.get((pixels.chroma_width(16), pixels.chroma_height(16)), "444")
    # The old names that say "full range" keep their range only among themselves.
    letters = "yuvj" if pixels.name.startswith("yuvj") else f"yuv{alpha}"
    return f"{letters}{sampling}p{suffix}"


def _fill_from_yuv(
    image: Tensor, luma: Tensor, chroma: Sequence[Tensor], from_chroma: Tensor, full: bool, bits: int, centred: bool
) -> None:
    """Writes codes as RGB, clipped, into `image` (3, h, w), some rows at a time."""
    height, width = luma.shape
    halved = chroma[0].shape[0] < height
    rows = 2 * max(1, _TOGETHER // (2 * width))
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        first, last = (max(top // 2 - 1, 0), bottom // 2 + 2) if halved else (top, bottom)
        codes = torch.stack([plane[first:last].float() for plane in chroma]).sub_(128 * 2.0 ** (bits - 8))
        # Linear, so that it may come before chroma is widened, where there is a quarter of it.
        shares = torch.mm(from_chroma, codes.flatten(1)).view(3, *codes.shape[1:])
        wide = _widen(shares, shares.shape[1] * (2 if halved else 1), width, centred)
        start = top - 2 * first if halved else 0
        mixed = wide[:, start : start + bottom - top].add_(_luma(luma[top:bottom], full, bits))
        torch.clamp(mixed, 0, 1, out=image[:, top:bottom])


def _luma(codes: Tensor, full: bool, bits: int) -> Tensor:
    """Luma codes from 0, black, to 1, white."""
    step = 2.0 ** (bits - 8)
    return codes.float().div_(2.0**bits - 1) if full else codes.float().sub_(16 * step).div_(219 * step)


def _from_chroma(matrix: int, full: bool, bits: int) -> Tensor:
    """What codes of blue and red difference, less their middle, add to luma: (3, 2), RGB by chroma."""
    kr, kb = MATRICES[matrix]
    span = 2.0**bits - 1 if full else 224 * 2.0 ** (bits - 8)
    red, blue = 2 * (1 - kr), 2 * (1 - kb)
    green = 1 - kr - kb
    rows = [[0, red], [-kb * blue / green, -kr * red / green], [blue, 0]]
    return torch.tensor(rows, dtype=torch.float64).div(span).float()


def _rgb_to_yuv(rgb: Tensor, matrix: int, full: bool, bits: int) -> tuple[Tensor, Tensor]:
    """Luma (h, w) and chroma (2, h, w) in code values, not rounded."""
    kr, kb = MATRICES[matrix]
    step = 2.0 ** (bits - 8)
    top = 2.0**bits - 1
    luma = (kr * rgb[0]).add_(rgb[1], alpha=1 - kr - kb).add_(rgb[2], alpha=kb)
    span = top if full else 224 * step
    chroma = torch.stack([rgb[2] - luma, rgb[0] - luma])
    for difference, share in zip(chroma, (kb, kr), strict=True):
        difference.mul_(span / (2 * (1 - share))).add_(128 * step)
    return luma.mul_(top) if full else luma.mul_(219 * step).add_(16 * step), chroma


def _widen(chroma: Tensor, height: int, width: int, centred: bool) -> Tensor:
    """Chroma (c, h, w) at the size of luma, linearly; between rows, and on even columns unless centred."""
    if chroma.shape[-2] < height:
        chroma = _double(chroma)[..., :height, :]
    if chroma.shape[-1] < width and centred:
        chroma = _double(chroma.mT.contiguous()).mT[..., :width]
    elif chroma.shape[-1] < width:
        between = torch.empty_like(chroma)
        between[..., -1] = chroma[..., -1]
        torch.lerp(chroma[..., :-1], chroma[..., 1:], 0.5, out=between[..., :-1])
        # Two by two, as the parts of a complex number lie: nothing else interleaves as fast.
        chroma = torch.view_as_real(torch.complex(chroma, between)).flatten(-2)[..., :width]
    return chroma


def _double(rows: Tensor) -> Tensor:
    """(c, h, w) to (c, 2h, w): each row is split in two that lie a quarter of its height off its centre."""
    out = rows.new_empty(rows.shape[0], 2 * rows.shape[1], rows.shape[2])
    out[:, 0], out[:, -1] = rows[:, 0], rows[:, -1]
    torch.lerp(rows[:, 1:], rows[:, :-1], 0.25, out=out[:, 2::2])
    torch.lerp(rows[:, :-1], rows[:, 1:], 0.25, out=out[:, 1:-1:2])
    return out


def _shrink(chroma: Tensor, across: bool, down: bool) -> Tensor:
    """Halve chroma (2, h, w): the mean of two rows, [1 2 1]/4 around every even column."""
    width, height = chroma.shape[-1], chroma.shape[-2]
    if down:
        padded = F.pad(chroma.unsqueeze(0), (0, 0, 0, height % 2), mode="replicate")[0] if height % 2 else chroma
        chroma = (padded[..., 0::2, :] + padded[..., 1::2, :]).div_(2)
    if across:
        padded = F.pad(chroma.unsqueeze(0), (1, 1 + width % 2, 0, 0), mode="replicate")[0]
        left, middle, right = padded[..., 0:-2:2], padded[..., 1:-1:2], padded[..., 2::2]
        chroma = (left + right).add_(middle, alpha=2).div_(4)
    return chroma


def _codes(frame: VideoFrame, index: int, bits: int) -> Tensor:
    """A plane's codes as they lie in the frame, which they keep alive."""
    plane = frame.planes[index]
    kind = np.dtype("u1" if bits == 8 else "<u2")
    # A copy where memory is read-only, which torch has no tensors of.
    raw = np.require(np.frombuffer(plane, kind), requirements="W")
    return torch.from_numpy(raw.reshape(plane.height, -1))[:, : plane.width]


def _blank_padding(plane: VideoPlane) -> None:
    """Rows are padded to what the encoder likes; the padding is never shown, but no old memory goes into it."""
    if plane.line_size != plane.width:
        plane.update(bytes(plane.buffer_size))
