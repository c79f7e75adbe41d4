"""PNG and JPEG of every kind, single and in folders."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from tests.support.video_files import picture
from vsr_ops.errors import VideoError
from vsr_ops.video import pictures, probe, read_frames


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_photographs_come_upright(tmp_path: Path, suffix: str, orientation: int) -> None:
    pixels = (picture(2, 12, 20) * 255).round().byte().permute(1, 2, 0).numpy()
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo{suffix}"
    Image.fromarray(pixels).save(path, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path))).astype(np.float32) / 255
    info = probe(path)
    image = next(iter(read_frames(info))).image
    assert (info.height, info.width) == expected.shape[:2] == tuple(image.shape[1:])
    assert np.abs(image.permute(1, 2, 0).numpy() - expected).max() < 1e-6


def _png16(path: Path, channels: np.ndarray[tuple[int, ...], np.dtype[np.uint16]]) -> None:
    """A PNG of 16 bits written by hand (ISO 15948): (h, w) grey, or (h, w, 2 to 4)."""
    height, width = channels.shape[:2]
    depth = 1 if channels.ndim == 2 else channels.shape[2]
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[depth]
    rows = channels.astype(">u2").reshape(height, width * depth)
    data = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_sixteen_bit_pictures_keep_every_level(tmp_path: Path, depth: int) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (5, 7, depth), dtype=np.uint16)
    _png16(tmp_path / "x.png", values[..., 0] if depth == 1 else values)
    info = probe(tmp_path / "x.png")
    assert (info.bits, info.grey, info.alpha) == (16, depth < 3, depth % 2 == 0)
    frame = next(iter(read_frames(info)))
    colours = values[..., :1].repeat(3, -1) if depth < 3 else values[..., :3]
    assert np.abs(frame.image.permute(1, 2, 0).numpy() * 65535 - colours).max() < 0.02
    assert (frame.alpha is not None) == (depth % 2 == 0)
    if frame.alpha is not None:
        assert np.abs(frame.alpha[0].numpy() * 65535 - values[..., -1]).max() < 0.02


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_kind_of_png_is_read_as_pillow_shows_it(tmp_path: Path, mode: str) -> None:
    generator = np.random.default_rng(1)
    image = Image.fromarray(generator.integers(0, 256, (6, 9, 4), dtype=np.uint8), "RGBA")
    image.convert("RGB" if mode == "P" else mode).convert(mode).save(tmp_path / "x.png")
    expected = np.asarray(Image.open(tmp_path / "x.png").convert("RGBA")).astype(np.float32) / 255
    info = probe(tmp_path / "x.png")
    frame = next(iter(read_frames(info)))
    assert np.abs(frame.image.permute(1, 2, 0).numpy() - expected[..., :3]).max() < 1e-6
    assert info.alpha == ("A" in mode) and info.grey == (mode in ("1", "L", "LA"))
    if frame.alpha is not None:
        assert np.abs(frame.alpha[0].numpy() - expected[..., 3]).max() < 1e-6


def test_a_palette_with_transparency_has_alpha(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "x.png", transparency=0)
    frame = next(iter(read_frames(probe(tmp_path / "x.png"))))
    assert frame.alpha is not None
    assert frame.alpha[0, 0, 0] == 0 and frame.alpha[0, 1:].min() == 1
    assert torch.equal(frame.image[:, 2, 2], torch.tensor([0.0, 1.0, 0.0]))


def test_a_folder_is_read_in_counting_order_and_only_its_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "shots"
    folder.mkdir()
    for number in (1, 2, 10, 9):
        Image.new("RGB", (8, 6), (number * 20, 0, 0)).save(folder / f"shot{number}.png")
    (folder / "notes.txt").write_text("not a picture")
    (folder / "._shot3.png").write_bytes(b"resource fork")
    info = probe(folder)
    assert (info.kind, info.frames, info.rate) == ("folder", 4, 24)
    reds = [round(float(frame.image[0, 0, 0]) * 255) for frame in read_frames(info)]
    assert reds == [20, 40, 180, 200]
    assert [round(float(f.image[0, 0, 0]) * 255) for f in read_frames(info, 1, 3)] == [40, 180]


def test_pictures_of_several_sizes_are_refused_with_both_named(tmp_path: Path) -> None:
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    Image.new("RGB", (9, 6)).save(tmp_path / "b.png")
    with pytest.raises(VideoError, match=r"b\.png' is 9x6 but 'a\.png' is 8x6"):
        probe(tmp_path)


def test_counting_order_of_names(tmp_path: Path) -> None:
    names = ["b1.png", "a10.png", "a2.PNG", "a02.jpg", "10.jpeg", "9.png"]
    for name in names:
        (tmp_path / name).touch()
    assert [p.name for p in pictures.list_pictures(tmp_path)] == [
        "9.png", "10.jpeg", "a02.jpg", "a2.PNG", "a10.png", "b1.png",
    ]  # fmt: skip
