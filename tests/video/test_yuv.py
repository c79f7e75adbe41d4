"""RGB from a decoder's pixels and back: published code values, float64 equations, chroma where it sits."""

from __future__ import annotations

import av
import numpy as np
import pytest
import torch

from vsr_ops.video import yuv


@pytest.mark.parametrize(
    ("matrix", "full", "codes", "rgb"),
    [
        # Published code values of 100 % colour bars: ITU-R BT.709, BT.601 and BT.2020, limited range.
        (1, False, (235, 128, 128), (1, 1, 1)),
        (1, False, (16, 128, 128), (0, 0, 0)),
        (1, False, (63, 102, 240), (1, 0, 0)),
        (1, False, (173, 42, 26), (0, 1, 0)),
        (1, False, (32, 240, 118), (0, 0, 1)),
        (6, False, (81, 90, 240), (1, 0, 0)),
        (5, False, (145, 54, 34), (0, 1, 0)),
        (9, False, (74, 97, 240), (1, 0, 0)),
        # JFIF: BT.601 with all codes.
        (6, True, (255, 128, 128), (1, 1, 1)),
        (6, True, (76, 85, 255), (1, 0, 0)),
        (6, True, (29, 255, 107), (0, 0, 1)),
    ],
)
def test_published_code_values_are_the_colours_they_name(
    matrix: int, full: bool, codes: tuple[int, int, int], rgb: tuple[int, int, int]
) -> None:
    frame = av.VideoFrame(16, 16, "yuv420p")
    for plane, code in zip(frame.planes, codes, strict=True):
        plane.update(bytes([code]) * plane.buffer_size)
    image, alpha = yuv.to_rgb(frame, matrix, full)
    assert alpha is None
    # A code is rounded to a whole number, which moves a primary by up to 1.8 / 255.
    assert (image[:, 8, 8] - torch.tensor(rgb)).abs().max() < 1.9 / 255


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", sorted(yuv.MATRICES))
@pytest.mark.parametrize("pixels", ["yuv444p", "yuv444p10le", "yuv444p16le", "yuv420p", "yuv422p10le"])
def test_a_flat_colour_survives_every_matrix_range_and_depth(pixels: str, matrix: int, full: bool) -> None:
    colour = torch.tensor([0.7, 0.35, 0.15])
    frame = yuv.from_rgb(colour[:, None, None].expand(3, 10, 12), None, pixels, matrix, full)
    image, _ = yuv.to_rgb(frame, matrix, full)
    bits = max(part.bits for part in frame.format.components)
    # Half a code in luma and chroma each, times what the matrix makes of it.
    assert (image - colour[:, None, None]).abs().max() < 2.2 / 2**bits


@pytest.mark.parametrize("pixels", ["yuv444p", "yuv444p10le"])
def test_planes_agree_with_the_standard_in_float64(pixels: str) -> None:
    generator = np.random.default_rng(3)
    frame = av.VideoFrame(32, 8, pixels)
    bits = frame.format.components[0].bits
    kind = np.dtype("u1" if bits == 8 else "<u2")
    scale = 2 ** (bits - 8)
    codes = generator.integers(16 * scale, 235 * scale + 1, (3, 8, 32))
    for plane, values in zip(frame.planes, codes, strict=True):
        rows = np.zeros((plane.height, plane.line_size // kind.itemsize), kind)
        rows[:, :32] = values
        plane.update(rows.tobytes())
    # H.273 equations 27 to 29 inverted, with BT.709's weights.
    luma = (codes[0] / scale - 16) / 219
    blue, red = ((plane / scale - 128) / 224 for plane in codes[1:])
    r, b = luma + 1.5748 * red, luma + 1.8556 * blue
    g = luma - 0.187324 * blue - 0.468124 * red
    expected = np.clip(np.stack([r, g, b]), 0, 1)
    image, _ = yuv.to_rgb(frame, 1, False)
    assert np.abs(image.numpy() - expected).max() < 2e-6


def test_halved_chroma_sits_on_even_columns_and_between_rows() -> None:
    ramp = torch.linspace(0.2, 0.8, 32)
    across = torch.stack([ramp.expand(16, 32), 1 - ramp.expand(16, 32), torch.full((16, 32), 0.5)])
    for image in (across, across.mT):
        frame = yuv.from_rgb(image, None, "yuv420p16le", 1, False)
        back, _ = yuv.to_rgb(frame, 1, False)
        # A ramp is its own average and interpolation, except at the edges.
        assert (back - image)[:, 2:-2, 2:-2].abs().max() < 1e-4
    codes = torch.arange(4.0).expand(2, 2, 4)
    assert torch.equal(yuv._widen(codes, 4, 8, False)[0, 0], torch.tensor([0, 0.5, 1, 1.5, 2, 2.5, 3, 3]))
    assert torch.equal(yuv._widen(codes, 4, 8, True)[0, 0], torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]))
