"""Single PNG and JPEG pictures: list them in a folder, check, read and write them, 8 or 16 bits a channel.

Colour profiles inside pictures are neither applied nor kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import torch
from av.codec.context import CodecContext
from av.error import FFmpegError
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from einops import rearrange
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..errors import VideoError
from . import yuv

SUFFIXES = (".png", ".jpg", ".jpeg")
"""What counts as a picture, in lower case."""

_ORIENTATION_TAG = 0x0112
_ORIENTATIONS = {
    1: (False, 0),
    2: (True, 0),
    3: (False, 180),
    4: (True, 180),
    5: (True, 270),
    6: (False, 90),
    7: (True, 90),
    8: (False, 270),
}
"""EXIF orientation as (mirror left to right first, then turn clockwise by so many degrees)."""


@dataclass(frozen=True)
class Picture:
    """What the header of a picture says. `width` and `height` are as shown, after EXIF orientation."""

    path: Path
    width: int
    height: int
    bits: int
    alpha: bool
    grey: bool
    mirrored: bool
    rotation: int


def is_picture(path: Path) -> bool:
    """Whether the name ends as a picture's does."""
    return path.suffix.lower() in SUFFIXES


def list_pictures(folder: Path) -> list[Path]:
    """The pictures in a folder, not in folders below it, in the order people count: frame_2 before frame_10.

    Hidden files and files with other endings are left out. Raises VideoError when nothing is left.
    """
    found = [path for path in folder.iterdir() if is_picture(path) and not path.name.startswith(".")]
    if not found:
        raise VideoError(f"'{folder}' holds no pictures; expected files that end in {', '.join(SUFFIXES)}")
    return sorted(found, key=lambda path: (_counted(path.name.lower()), path.name))


def read_header(path: Path) -> Picture:
    """Read a picture's header. Raises VideoError."""
    return _look_at(path, whole=False)


def check_picture(path: Path) -> Picture:
    """Read a picture's header and make sure that its data is whole. Raises VideoError."""
    return _look_at(path, whole=True)


def load_picture(picture: Picture) -> tuple[Tensor, Tensor | None]:
    """RGB (3, h, w) and alpha (1, h, w) or None, float32 in [0, 1], the right way up. Raises VideoError."""
    try:
        image, alpha = (_load_deep if picture.bits == 16 else _load_plain)(picture)
    except (OSError, SyntaxError, ValueError, FFmpegError, Image.DecompressionBombError) as error:
        raise _unreadable(picture.path, error) from error
    if image.shape[-2:] != _stored_size(picture):
        raise VideoError(f"'{picture.path}' changed while it was read; leave the input alone and run again")
    image = upright(image, picture.mirrored, picture.rotation)
    return image, None if alpha is None else upright(alpha, picture.mirrored, picture.rotation)


def upright(image: Tensor, mirrored: bool, rotation: int) -> Tensor:
    """Mirror (channels, h, w) left to right if asked, then turn it clockwise by 0, 90, 180 or 270 degrees."""
    flipped = image.flip(-1) if mirrored else image
    return torch.rot90(flipped, -(rotation // 90) % 4, (-2, -1)).contiguous()


def save_png16(path: Path, image: Tensor, alpha: Tensor | None) -> None:
    """Write RGB (3, h, w) and alpha (1, h, w) or None, in [0, 1], as PNG with 16 bits a channel."""
    # Pillow has no 16-bit RGB, so FFmpeg's encoder writes these.
    channels = _interleave(image, alpha)
    height, width, depth = channels.shape
    frame = VideoFrame(width, height, "rgba64be" if depth == 4 else "rgb48be")
    rows = np.zeros((height, frame.planes[0].line_size // 2), dtype=">u2")
    rows[:, : width * depth] = rearrange((channels * 65535).round().numpy(), "h w c -> h (w c)")
    frame.planes[0].update(rows.tobytes())
    encoder = CodecContext.create("png", "w")
    assert isinstance(encoder, VideoCodecContext)
    encoder.width, encoder.height, encoder.pix_fmt = width, height, frame.format.name
    encoder.framerate = Fraction(24)
    encode = cast(Callable[[VideoFrame | None], list[bytes]], cast(Any, encoder).encode)
    path.write_bytes(b"".join(bytes(packet) for packet in encode(frame) + encode(None)))


def save_png8(path: Path, image: Tensor, alpha: Tensor | None) -> None:
    """Write RGB (3, h, w) and alpha (1, h, w) or None, in [0, 1], as PNG with 8 bits a channel."""
    Image.fromarray(_bytes(image, alpha)).save(path, format="PNG")


def save_jpeg(path: Path, image: Tensor, alpha: Tensor | None) -> None:
    """Write RGB (3, h, w) in [0, 1] as JPEG of quality 95 with whole chroma. `alpha` cannot be kept."""
    Image.fromarray(_bytes(image, None)).save(path, format="JPEG", quality=95, subsampling=0)


SAVERS: dict[str, Callable[[Path, Tensor, Tensor | None], None]] = {
    "png": save_png16,
    "png8": save_png8,
    "jpeg": save_jpeg,
}
"""How a picture is written, by the codec's name. Each raises OSError when the disk does."""


def _look_at(path: Path, whole: bool) -> Picture:
    try:
        image = Image.open(path)
        with image:
            # MPO is JPEG with more pictures behind the first, as phones write it.
            if image.format not in ("PNG", "JPEG", "MPO"):
                raise VideoError(f"'{path}' is a {image.format} picture; expected PNG or JPEG: convert it")
            mirrored, rotation = _ORIENTATIONS.get(int(image.getexif().get(_ORIENTATION_TAG, 1)), (False, 0))
            width, height = image.size if rotation % 180 == 0 else (image.height, image.width)
            alpha = "A" in image.getbands() or "transparency" in image.info
            # Pillow turns grey of 16 bits with alpha into RGB: the file knows better.
            bits, grey = _png_kind(path) if image.format == "PNG" else (8, image.mode == "L")
            if whole:
                # A JPEG decoded to an eighth of its size still reads all of its data.
                image.draft("L", (1, 1))
                image.load()
    except VideoError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from error
    return Picture(path, width, height, bits, alpha, grey, mirrored, rotation)


def _load_plain(picture: Picture) -> tuple[Tensor, Tensor | None]:
    image = Image.open(picture.path)
    with image:
        pixels = np.asarray(image.convert("RGBA" if picture.alpha else "RGB"), dtype=np.float32)
    channels = rearrange(torch.as_tensor(pixels / 255), "h w c -> c h w")
    return channels[:3], channels[3:] if picture.alpha else None


def _load_deep(picture: Picture) -> tuple[Tensor, Tensor | None]:
    # Pillow would cut RGB of 16 bits down to 8.
    container = av.open(f"file:{picture.path}", options={"protocol_whitelist": "file"})
    with container:
        frame = next(container.decode(video=0))
    return yuv.to_rgb(frame, yuv.RGB_MATRIX, full=True)


def _png_kind(path: Path) -> tuple[int, bool]:
    """(bits, grey) from PNG's first chunk, where less than 8 bits counts as 8 (ISO 15948, 11.2.2)."""
    with path.open("rb") as file:
        depth, colour_type = file.read(26)[24:]
    return 16 if depth == 16 else 8, colour_type in (0, 4)


def _stored_size(picture: Picture) -> tuple[int, int]:
    turned = picture.rotation % 180 != 0
    return (picture.width, picture.height) if turned else (picture.height, picture.width)


def _interleave(image: Tensor, alpha: Tensor | None) -> Tensor:
    channels = image if alpha is None else torch.cat([image, alpha])
    return rearrange(channels.clamp(0, 1), "c h w -> h w c")


def _bytes(image: Tensor, alpha: Tensor | None) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return (_interleave(image, alpha) * 255).round().to(torch.uint8).contiguous().numpy()


def _counted(name: str) -> list[tuple[bool, int, str]]:
    """A sort key that compares digits as numbers, before the rest as text."""
    return [(False, int(p), "") if p.isdigit() else (True, 0, p) for p in re.findall(r"[0-9]+|[^0-9]+", name)]


def _unreadable(path: Path, error: Exception) -> VideoError:
    if isinstance(error, PermissionError):
        return VideoError(f"'{path}' may not be read ({error.strerror}); change its permissions")
    if isinstance(error, UnidentifiedImageError):
        return VideoError(f"'{path}' is not a picture that can be read; expected a PNG or JPEG file")
    reason = " ".join(str(error).split())
    return VideoError(f"'{path}' is a damaged picture ({reason}); expected whole data: export it again")
