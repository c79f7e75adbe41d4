"""Tubelet attention against attention over all places at once, and in tiles of whole windows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vsr_ops.errors import SettingError
from vsr_ops.modules.tubelets import Around, TubeletAttention, attend, turned, turns
from vsr_ops.modules.windows import WINDOW, Place

HEAD, HEADS = 6, 2


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def everywhere(q: Tensor, k: Tensor, v: Tensor, place: Place) -> Tensor:
    """As `attend`, without windows: every place looks at every other, behind a mask that tells windows apart."""
    _, frames, height, width, _ = q.shape
    t, y, x = torch.meshgrid(
        torch.arange(frames), torch.arange(height) + place.top, torch.arange(width) + place.left, indexing="ij"
    )
    window = ((y // WINDOW) * 1000 + x // WINDOW).flatten()
    inside = ((t * WINDOW + y % WINDOW) * WINDOW + x % WINDOW).flatten()
    angles = turns(frames, HEAD)[inside]
    tokens = [rearrange(each, "n t h w (g d) -> n g (t h w) d", d=HEAD) for each in (q, k, v)]
    out = F.scaled_dot_product_attention(
        turned(tokens[0], angles), turned(tokens[1], angles), tokens[2], window[:, None] == window
    )
    return rearrange(out, "n g (t h w) d -> n t h w (g d)", t=frames, h=height)


@pytest.mark.parametrize(
    ("top", "left", "height", "width"), [(0, 0, 16, 8), (0, 0, 11, 13), (8, 3, 9, 21), (5, 6, 2, 1)]
)
def test_windows_are_a_mask_over_all_places(top: int, left: int, height: int, width: int) -> None:
    q, k, v = (rand(2, 3, height, width, HEAD * HEADS, seed=seed) for seed in range(3))
    place = Place(top, left, 40, 40)
    torch.testing.assert_close(attend(q, k, v, place, HEAD), everywhere(q, k, v, place), atol=1e-5, rtol=1e-5)


def test_only_distances_matter() -> None:
    """Queries and keys turned by their places see how far these are apart, and nothing else."""
    angles = turns(4, 16).view(4, WINDOW, WINDOW, 8)
    q, k = rand(16), rand(16, seed=1)

    def score(a: tuple[int, int, int], b: tuple[int, int, int]) -> Tensor:
        return turned(q, angles[a]) @ turned(k, angles[b])

    torch.testing.assert_close(score((0, 1, 2), (2, 4, 3)), score((1, 3, 5), (3, 6, 6)), atol=1e-5, rtol=1e-5)
    for further in ((3, 4, 3), (2, 5, 3), (2, 4, 4)):
        assert abs(float(score((0, 1, 2), (2, 4, 3)) - score((0, 1, 2), further))) > 1e-2


def test_around_is_a_depthwise_convolution_over_time_and_space() -> None:
    around = Around(5)
    for parameter in around.parameters():
        parameter.data = rand(*parameter.shape)
    for frames in (1, 2, 4):
        x = rand(2, frames, 6, 7, 5)
        expected = F.conv3d(
            rearrange(x, "n t h w c -> n c t h w"), around.weight[:, None], around.bias, padding=1, groups=5
        )
        torch.testing.assert_close(around(x), rearrange(expected, "n c t h w -> n t h w c"), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_tile_with_its_margins_is_the_frame() -> None:
    """Whole windows of what the second convolution reaches, and two pixels more for the first."""
    torch.manual_seed(0)
    model = TubeletAttention(16, 4, 8)
    h, guide = rand(1, 3, 29, 35, 16), rand(1, 3, 29, 35, 4, seed=1)
    whole = model(h, guide, Place(0, 0, 29, 35))
    # Pixels 12 to 20 down and 17 to 24 across: one more each for the second convolution, so windows from 8 and 16 on.
    rows, cols = slice(8 - 2, 24 + 2), slice(16 - 2, 32 + 2)
    part = model(h[:, :, rows, cols], guide[:, :, rows, cols], Place(6, 14, 29, 35))
    torch.testing.assert_close(part[:, :, 6:14, 3:10], whole[:, :, 12:20, 17:24], atol=1e-5, rtol=1e-5)
    # Half a window less, and it is not.
    short = model(h[:, :, 10:24, cols], guide[:, :, 10:24, cols], Place(10, 14, 29, 35))
    assert (short[:, :, 2:10, 3:10] - whole[:, :, 12:20, 17:24]).abs().max() > 1e-3


def test_heads_that_cannot_turn_are_refused() -> None:
    for inner, head in ((16, 5), (20, 8), (16, 4)):
        with pytest.raises(SettingError, match=rf"{inner} channels in heads of {head}"):
            TubeletAttention(inner, 4, head)
