"""Between a decoder's pixels and RGB: exact YUV matrices, ranges, bit depths and chroma siting.

FFmpeg's scaler only unpacks here, at an unchanged bit depth. Its own YUV to RGB is off by up to one code of
255 at 16 bits out, its depth changes differ by plane, and where it takes chroma to sit depends on the file.
"""

from __future__ import annotations

import numpy as np
import torch
from av.video.format import VideoFormat
from av.video.frame import VideoFrame
from einops import rearrange
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
    planes = [_read_plane(flat, index, bits) for index in range(len(flat.planes))]
    alpha = planes[3].unsqueeze(0) / top if len(planes) == 4 else None
    if len(planes) == 1:
        step = 2.0 ** (bits - 8)
        grey = planes[0] / top if full else (planes[0] - 16 * step) / (219 * step)
        image = grey.expand(3, -1, -1)
    elif target.startswith("gbr"):
        image = torch.stack([planes[2], planes[0], planes[1]]) / top
    else:
        chroma = _widen(torch.stack(planes[1:3]), planes[0].shape[-2], planes[0].shape[-1], centred)
        image = _yuv_to_rgb(planes[0], chroma, matrix, full, bits)
    return image.clamp(0, 1).contiguous(), alpha


def from_rgb(image: Tensor, alpha: Tensor | None, pixels: str, matrix: int, full: bool) -> VideoFrame:
    """A frame to encode, of planar pixel format `pixels`, from RGB (3, h, w), alpha (1, h, w) in [0, 1].

    Values are clipped and rounded to the nearest code. Subsampled chroma is sited as H.264 says by default:
    left in a row, centred between rows. A format with alpha and no `alpha` is written opaque.
    """
    _, height, width = image.shape
    frame = VideoFrame(width, height, pixels)
    bits = bit_depth(frame.format)
    top = 2**bits - 1
    rgb = image.clamp(0, 1)
    if frame.format.is_rgb:
        planes = list(rgb[[1, 2, 0]] * top)
    else:
        luma, chroma = _rgb_to_yuv(rgb, matrix, full, bits)
        planes = [luma, *_shrink(chroma, frame.planes[1].width < width, frame.planes[1].height < height)]
    if has_alpha(frame.format):
        opacity = torch.ones_like(image[0]) if alpha is None else alpha[0].clamp(0, 1)
        planes.append(opacity * top)
    for index, plane in enumerate(planes):
        _write_plane(frame, index, plane.round().clamp(0, top), bits)
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


def _yuv_to_rgb(codes: Tensor, chroma: Tensor, matrix: int, full: bool, bits: int) -> Tensor:
    kr, kb = MATRICES[matrix]
    step = 2.0 ** (bits - 8)
    top = 2.0**bits - 1
    luma = codes / top if full else (codes - 16 * step) / (219 * step)
    blue, red = (chroma - 128 * step) / (top if full else 224 * step)
    r = luma + 2 * (1 - kr) * red
    b = luma + 2 * (1 - kb) * blue
    return torch.stack([r, (luma - kr * r - kb * b) / (1 - kr - kb), b])


def _rgb_to_yuv(rgb: Tensor, matrix: int, full: bool, bits: int) -> tuple[Tensor, Tensor]:
    """Luma (h, w) and chroma (2, h, w) in code values, not rounded."""
    kr, kb = MATRICES[matrix]
    step = 2.0 ** (bits - 8)
    top = 2.0**bits - 1
    luma = kr * rgb[0] + (1 - kr - kb) * rgb[1] + kb * rgb[2]
    chroma = torch.stack([(rgb[2] - luma) / (2 * (1 - kb)), (rgb[0] - luma) / (2 * (1 - kr))])
    codes = luma * top if full else 16 * step + luma * 219 * step
    return codes, 128 * step + chroma * (top if full else 224 * step)


def _widen(chroma: Tensor, height: int, width: int, centred: bool) -> Tensor:
    """Chroma (2, h, w) at the size of luma, linearly; between rows, and on even columns unless centred."""
    if chroma.shape[-2] < height:
        chroma = _double(chroma)[..., :height, :]
    if chroma.shape[-1] < width and centred:
        chroma = _double(chroma.mT).mT[..., :width]
    elif chroma.shape[-1] < width:
        following = torch.cat([chroma[..., 1:], chroma[..., -1:]], dim=-1)
        chroma = rearrange([chroma, (chroma + following) / 2], "two c h w -> c h (w two)")[..., :width]
    return chroma


def _double(rows: Tensor) -> Tensor:
    """(2, h, w) to (2, 2h, w): each row is split in two that lie a quarter of its height off its centre."""
    before = torch.cat([rows[:, :1], rows[:, :-1]], dim=1)
    after = torch.cat([rows[:, 1:], rows[:, -1:]], dim=1)
    return rearrange([(3 * rows + before) / 4, (3 * rows + after) / 4], "two c h w -> c (h two) w")


def _shrink(chroma: Tensor, across: bool, down: bool) -> Tensor:
    """Halve chroma (2, h, w): [1 2 1]/4 around every even column, the mean of two rows."""
    width, height = chroma.shape[-1], chroma.shape[-2]
    if across:
        padded = F.pad(chroma.unsqueeze(0), (1, 1 + width % 2, 0, 0), mode="replicate")[0]
        left, middle, right = padded[..., 0:-2:2], padded[..., 1:-1:2], padded[..., 2::2]
        chroma = (left + 2 * middle + right) / 4
    if down:
        padded = F.pad(chroma.unsqueeze(0), (0, 0, 0, height % 2), mode="replicate")[0]
        chroma = (padded[..., 0::2, :] + padded[..., 1::2, :]) / 2
    return chroma


def _read_plane(frame: VideoFrame, index: int, bits: int) -> Tensor:
    plane = frame.planes[index]
    raw = np.frombuffer(bytes(plane), dtype=np.dtype("u1" if bits == 8 else "<u2")).astype(np.float32)
    return rearrange(torch.as_tensor(raw), "(h w) -> h w", h=plane.height)[:, : plane.width]


def _write_plane(frame: VideoFrame, index: int, values: Tensor, bits: int) -> None:
    plane = frame.planes[index]
    kind = np.dtype(np.uint8 if bits == 8 else "<u2")
    # Rows are padded to what the encoder likes; the padding is never shown.
    rows = np.zeros((plane.height, plane.line_size // kind.itemsize), dtype=kind)
    rows[:, : plane.width] = values.cpu().numpy()
    plane.update(rows.tobytes())
