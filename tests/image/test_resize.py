"""Resizing against a loop-by-loop reading of MATLAB's imresize, Pillow, exact fractions, and laws."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from vsr_ops.errors import SettingError
from vsr_ops.image.resize import RESIZE, quantize8, resize, resize_bicubic, resize_lanczos


def cubic(x: float) -> float:
    x = abs(x)
    if x <= 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x <= 2 else 0.0


def matlab_lines(lines: np.ndarray, n_out: int) -> np.ndarray:
    """imresize along axis 0 in float64: MATLAB's `contributions`, one output pixel at a time, from 1."""
    n_in = lines.shape[0]
    scale = n_out / n_in
    width = 4 / scale if scale < 1 else 4.0
    mirror = [*range(n_in), *reversed(range(n_in))]
    out = np.zeros((n_out, *lines.shape[1:]))
    for i in range(1, n_out + 1):
        u = i / scale + 0.5 * (1 - 1 / scale)
        left = math.floor(u - width / 2)
        indices = [left + k for k in range(math.ceil(width) + 2)]
        weights = [scale * cubic(scale * (u - j)) if scale < 1 else cubic(u - j) for j in indices]
        for j, weight in zip(indices, weights, strict=True):
            out[i - 1] += weight / sum(weights) * lines[mirror[(j - 1) % (2 * n_in)]]
    return out


def matlab(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return matlab_lines(matlab_lines(image, size[0]).T, size[1]).T


def step_image(height: int, width: int) -> np.ndarray:
    image = np.random.default_rng(0).random((height, width))
    image[height // 3 :, width // 2 :] += 1.0
    return image / 2


@pytest.mark.parametrize(
    ("source", "size"),
    [
        ((64, 96), (16, 24)),  # down x4
        ((16, 24), (64, 96)),  # up x4
        ((33, 71), (132, 284)),
        ((37, 53), (9, 13)),
        ((41, 29), (30, 67)),  # one axis shrinks, one grows, no common factor
        ((3, 2), (40, 35)),  # mirrors many times over
        ((50, 60), (1, 2)),
        ((1, 1), (5, 7)),
        ((90, 100), (90, 131)),  # one axis kept; several blocks
    ],
)
def test_equals_matlab(source: tuple[int, int], size: tuple[int, int]) -> None:
    image = step_image(*source)
    result = resize_bicubic(torch.tensor(image, dtype=torch.float32)[None, None], size)
    assert result.shape == (1, 1, *size) and result.dtype == torch.float32
    assert np.abs(result[0, 0].double().numpy() - matlab(image, size)).max() < 1e-6


def test_values_worked_out_by_hand() -> None:
    # imresize([0 0 1 1], [1 8]) by hand: the cubic a quarter pixel off is (-9 111 29 -3)/128.
    row = torch.tensor([0.0, 0.0, 1.0, 1.0]).view(1, 1, 1, 4)
    expected = torch.tensor([0, -3, -9, 29 - 3, 111 - 9, 128 + 9, 128 + 3, 128]) / 128
    assert torch.allclose(resize_bicubic(row, (1, 8)).flatten(), expected, atol=1e-7)


@pytest.mark.parametrize("size", [(30, 23), (200, 180), (77, 190)])
def test_interior_equals_pillow(size: tuple[int, int]) -> None:
    # Pillow cuts its kernel off at the border instead of mirroring; inside it is the same filter.
    image = step_image(120, 92).astype(np.float32)
    ours = resize_bicubic(torch.tensor(image)[None, None], size)[0, 0].numpy()
    theirs = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))
    rows, columns = (2 + math.ceil(2 * max(1.0, n / m)) for n, m in zip(size, image.shape, strict=True))
    inside = (slice(rows, -rows), slice(columns, -columns))
    assert np.abs(ours[inside] - theirs[inside]).max() < 2e-6
    assert np.abs(ours - theirs).max() > 1e-3


@pytest.mark.parametrize("size", [(8, 9), (37, 41), (148, 164), (100, 10)])
def test_constant_survives(size: tuple[int, int]) -> None:
    x = torch.full((1, 2, 37, 41), 0.37)
    assert (resize_bicubic(x, size) - 0.37).abs().max() < 1e-6


@pytest.mark.parametrize("n_out", [10, 63, 160])
def test_ramp_survives_inside(n_out: int) -> None:
    n_in = 40
    ramp = (torch.arange(n_in, dtype=torch.float64) / n_in).float().expand(1, 1, 3, n_in)
    position = (torch.arange(n_out, dtype=torch.float64) + 0.5) / n_out - 0.5 / n_in
    result = resize_bicubic(ramp, (3, n_out))[0, 0, 0].double()
    edge = math.ceil(2 * max(1.0, n_out / n_in)) + 1
    assert (result - position)[edge:-edge].abs().max() < 1e-6


def test_same_size_is_the_input_itself() -> None:
    x = torch.rand(2, 3, 11, 17)
    assert resize_bicubic(x, (11, 17)) is x


def test_flips_commute_and_frames_do_not_mix() -> None:
    x = torch.rand(3, 2, 31, 46)
    result = resize_bicubic(x, (75, 20))
    flipped = resize_bicubic(x.flip(-1, -2), (75, 20)).flip(-1, -2)
    assert torch.allclose(result, flipped, atol=1e-6)
    assert torch.equal(resize_bicubic(x[1:2], (75, 20)), result[1:2])


def test_overshoot_is_kept_and_quantize8_clamps() -> None:
    x = torch.zeros(1, 1, 8, 8)
    x[..., 4:] = 1
    result = resize_bicubic(x, (8, 32))
    assert result.min() < -0.01 and result.max() > 1.01
    eight = quantize8(result)
    assert eight.min() == 0 and eight.max() == 1


def test_quantize8_rounds_to_the_nearest_level_and_is_idempotent() -> None:
    levels = torch.arange(256) / 255
    assert torch.equal(quantize8(levels), levels)
    assert torch.equal(quantize8(levels[1:-1] + 0.49 / 255), levels[1:-1])
    assert torch.equal(quantize8(levels[1:-1] - 0.49 / 255), levels[1:-1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept_and_maths_is_no_worse_than_float32(dtype: torch.dtype) -> None:
    x = torch.rand(1, 3, 20, 20).to(dtype)
    result = resize_bicubic(x, (33, 9))
    exact = resize_bicubic(x.double(), (33, 9))
    assert result.dtype == dtype
    assert (result.double() - exact).abs().max() <= torch.finfo(dtype).eps


def test_autocast_costs_no_precision() -> None:
    x = torch.rand(1, 3, 32, 32)
    plain = resize_bicubic(x, (64, 64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(resize_bicubic(x, (64, 64)), plain)


def test_gradient_reaches_the_input() -> None:
    x = torch.rand(1, 1, 6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: resize_bicubic(t, (4, 9)), x)


@pytest.mark.parametrize("size", [(0, 4), (4, -1)])
def test_impossible_size_is_named(size: tuple[int, int]) -> None:
    with pytest.raises(SettingError, match=f"{size[0]}x{size[1]}"):
        resize_bicubic(torch.rand(1, 3, 8, 8), size)


@pytest.mark.parametrize("x", [torch.rand(3, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.rand(1, 3, 0, 8)])
def test_unfit_tensor_is_named(x: torch.Tensor) -> None:
    with pytest.raises(SettingError, match="cannot resize a torch"):
        resize_bicubic(x, (4, 4))


@pytest.mark.parametrize(("n_in", "n_out"), [(12, 48), (13, 26), (48, 12), (26, 13)])
def test_bicubic_is_exact_to_the_last_bit_where_float32_can_be(n_in: int, n_out: int) -> None:
    # At these ratios weights are fractions of 1024 and these pixels of 8: no sum is rounded, in whatever order.
    pixels = [Fraction((37 * i * i + 5 * i) % 9, 8) for i in range(n_in)]
    mirror = [*pixels, *reversed(pixels)]
    ratio = Fraction(n_in, n_out)
    widen = max(ratio, Fraction(1))
    expected: list[float] = []
    for i in range(n_out):
        centre = (i + Fraction(1, 2)) * ratio - Fraction(1, 2)
        reach = range(math.floor(centre - 2 * widen), math.ceil(centre + 2 * widen) + 1)
        weights = [Fraction(cubic(float((centre - j) / widen))) for j in reach]
        value = sum(w * mirror[j % (2 * n_in)] for j, w in zip(reach, weights, strict=True)) / sum(weights)
        expected.append(float(value))
    row = torch.tensor([float(pixel) for pixel in pixels]).expand(1, 1, 2, n_in)
    assert resize_bicubic(row, (2, n_out))[0, 0, 1].tolist() == expected
    column = row.transpose(-1, -2).contiguous()
    assert resize_bicubic(column, (n_out, 2))[0, 0, :, 1].tolist() == expected


@pytest.mark.parametrize("size", [(30, 23), (200, 180), (77, 190), (120, 300)])
def test_lanczos_equals_pillow_inside(size: tuple[int, int]) -> None:
    image = step_image(120, 92).astype(np.float32)
    ours = resize_lanczos(torch.tensor(image)[None, None], size)[0, 0].numpy()
    theirs = np.asarray(Image.fromarray(image, mode="F").resize(size[::-1], Image.Resampling.LANCZOS))
    rows, columns = (2 + math.ceil(3 * max(1.0, n / m)) for n, m in zip(size, image.shape, strict=True))
    inside = (slice(rows, -rows), slice(columns, -columns))
    assert ours[inside].size > 100 and np.abs(ours[inside] - theirs[inside]).max() < 1e-4
    assert np.abs(ours - theirs).max() > 1e-3
    bicubic = resize_bicubic(torch.tensor(image)[None, None], size)[0, 0].numpy()
    assert np.abs(ours - bicubic).max() > 1e-2


@pytest.mark.parametrize("size", [(8, 9), (37, 80), (148, 164), (1, 1)])
def test_lanczos_keeps_constants_dtype_and_the_same_size(size: tuple[int, int]) -> None:
    x = torch.full((2, 3, 37, 41), 0.37)
    assert (resize_lanczos(x, size) - 0.37).abs().max() < 1e-6
    assert resize_lanczos(x.half(), size).dtype == torch.float16
    assert resize_lanczos(x, (37, 41)) is x


@pytest.mark.parametrize("name", list(RESIZE))
@pytest.mark.parametrize("times", [2, 3, 4])
def test_a_shift_of_the_input_is_a_shift_of_the_output(name: str, times: int) -> None:
    x = torch.rand(1, 3, 40, 50)
    result = resize(name, x, (40 * times, 50 * times))
    shifted = resize(name, x.roll((2, 3), (-2, -1)), (40 * times, 50 * times))
    edge = 5 * times + 3 * times
    back = shifted.roll((-2 * times, -3 * times), (-2, -1))
    assert (result - back)[..., edge:-edge, edge:-edge].abs().max() < 1e-6
    smaller = resize(name, result, (40, 50))
    again = resize(name, shifted, (40, 50)).roll((-2, -3), (-2, -1))
    assert (smaller - again)[..., 9:-9, 9:-9].abs().max() < 1e-6


@pytest.mark.parametrize("name", list(RESIZE))
def test_borders_are_mirrored(name: str) -> None:
    # The picture and its mirror image side by side, cut in half again, give what the picture alone gives.
    x = torch.rand(1, 1, 20, 24)
    double = torch.cat([x, x.flip(-1)], -1)
    for width in (6, 10, 60):
        alone = resize(name, x, (20, width))
        assert (resize(name, double, (20, 2 * width))[..., :width] - alone).abs().max() < 1e-6


def test_resize_looks_names_up() -> None:
    x = torch.rand(1, 3, 8, 8)
    assert torch.equal(resize("bicubic", x, (16, 12)), resize_bicubic(x, (16, 12)))
    assert torch.equal(resize("lanczos", x, (16, 12)), resize_lanczos(x, (16, 12)))
    with pytest.raises(SettingError, match=r"'nearest'.*bicubic, lanczos"):
        resize("nearest", x, (16, 12))
    with pytest.raises(SettingError, match="0x4"):
        resize("lanczos", x, (0, 4))
