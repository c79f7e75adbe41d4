"""Laws of the tile plan: coverage, identity of split and merge, blending, what is refused."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch

from tests.support.tensors import latents, relative
from vsr_ops.errors import SettingError
from vsr_ops.sampling.tiling import (
    Merger,
    TilePlan,
    TileSize,
    blend_weight,
    cores,
    cut_tile,
    merge,
    plan_tiles,
    spans,
    split,
)

OVERLAPS = (0.0, 0.25, 0.5, 0.75)
#: One tile; a larger tile than the video; one axis split; all split, odd remainders; cuts, one scene a frame long.
PLANS = {
    "one": plan_tiles(4, 8, 8, TileSize(8, 8, 4)),
    "larger than the video": plan_tiles(1, 8, 16, TileSize(64, 64, 14)),
    "time": plan_tiles(9, 8, 8, TileSize(8, 8, 4)),
    "no overlap": plan_tiles(8, 16, 16, TileSize(8, 8, 4), 0.0),
    "all": plan_tiles(11, 24, 40, TileSize(16, 8, 4), 0.5),
    "dense": plan_tiles(7, 20, 12, TileSize(8, 8, 3), 0.75, factor=4),
    "cuts": plan_tiles(10, 16, 8, TileSize(8, 8, 4), 0.5, cuts=(1, 3)),
}


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_spans_cover_the_axis_and_overlap_as_asked(overlap: float) -> None:
    for extent, tile in product(range(1, 41), range(1, 24)):
        found = spans(extent, tile, overlap)
        assert found[0].start == 0 and found[-1].stop == extent
        assert all(span.length == min(tile, extent) for span in found)
        # No hole, no repeat, and at least the asked overlap (to the rounding of the stride).
        for a, b in pairwise(found):
            assert a.start < b.start <= a.stop
            assert a.stop - b.start >= min(int(tile * overlap), tile - 1)
        # No more spans than it takes: only the last may overlap by more than was asked.
        assert all(b.start - a.start >= tile * (1 - overlap) - 0.5 for a, b in pairwise(found[:-1]))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_every_element_is_covered(plan: TilePlan) -> None:
    hits = torch.zeros(plan.frames, 1, plan.height, plan.width)
    for window in split(plan, hits):
        for tile in window:
            tile += 1
    assert hits.min() >= 1
    assert int(hits.sum()) == sum(
        plan.tile_size(n).height * plan.tile_size(n).width * plan.tile_size(n).frames * len(plan.spatial)
        for n in range(len(plan.windows))
    )


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_merge_undoes_split(plan: TilePlan) -> None:
    video = latents(plan)
    tiles = split(plan, video)
    assert len(tiles) * len(tiles[0]) == plan.tiles
    assert relative(merge(plan, tiles), video) < 2e-7
    if plan.tiles == 1:
        assert torch.equal(merge(plan, tiles), video)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_constant_survives(plan: TilePlan) -> None:
    video = torch.full((plan.frames, 4, plan.height, plan.width), 0.7)
    assert (merge(plan, split(plan, video)) - 0.7).abs().max() < 2e-7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_merging_keeps_the_dtype(dtype: torch.dtype) -> None:
    plan = PLANS["all"]
    video = latents(plan).to(dtype)
    merged = merge(plan, split(plan, video))
    assert merged.dtype == dtype and torch.equal(merged, video)


def test_merging_is_the_weighted_mean_of_the_tiles() -> None:
    plan = PLANS["cuts"]
    tiles = [
        [latents(plan, 10 * n + m)[: w.span.length, :, :8, :8] for m in range(3)] for n, w in enumerate(plan.windows)
    ]
    assert len(plan.spatial) == 3
    total, weight = torch.zeros(2, 10, 4, 16, 8, dtype=torch.float64)
    for n, window in enumerate(plan.windows):
        for m, (row, col) in enumerate(plan.spatial):
            w = blend_weight(plan, n, m).double()
            total[window.span.slice, :, row.slice, col.slice] += w * tiles[n][m].double()
            weight[window.span.slice, :, row.slice, col.slice] += w
    assert relative(merge(plan, tiles), total / weight) < 2e-7


def test_weights_are_separable_symmetric_and_fall_from_the_centre() -> None:
    plan = PLANS["all"]
    w = blend_weight(plan, 0, 0)[:, 0].double()
    assert w.shape == (4, 16, 8) and w.min() > 0
    assert torch.equal(w, w.flip(0)) and torch.equal(w, w.flip(1)) and torch.equal(w, w.flip(2))
    centre = torch.einsum("t,y,x->tyx", w[:, 7, 3], w[1, :, 3], w[1, 7, :]) / w[1, 7, 3] ** 2
    assert torch.allclose(w, centre, rtol=1e-6)
    for line in (w[:, 7, 3], w[1, :, 3], w[1, 7, :]):
        half = line[: len(line) // 2]
        assert (half.diff() > 0).all()
        # Gaussian: the logarithm is a parabola, its second difference constant.
        assert line.log().diff(n=2).std() < 1e-5 and line.log().diff(n=2).max() < 0


def test_an_axis_with_one_tile_takes_no_weighting() -> None:
    w = blend_weight(PLANS["time"], 0, 0)
    assert torch.equal(w, w[:, :, :1, :1].expand_as(w)) and w.std() > 0
    # A scene that fits in one window likewise, though other scenes are there.
    plan = plan_tiles(10, 8, 8, TileSize(8, 8, 4), 0.5, cuts=(3,))
    assert [window.span.length for window in plan.windows] == [3, 4, 4, 4]
    assert torch.equal(blend_weight(plan, 0, 0), torch.ones(3, 1, 8, 8))
    assert torch.equal(merge(plan, split(plan, latents(plan)))[:3], latents(plan)[:3])


@pytest.mark.parametrize("cuts", [(), (1,), (5,), (9,), (3, 6), (1, 2, 3)])
def test_no_window_crosses_a_cut(cuts: tuple[int, ...]) -> None:
    plan = plan_tiles(10, 8, 8, TileSize(8, 8, 4), cuts=cuts)
    covered = torch.zeros(10)
    for window in plan.windows:
        covered[window.span.slice] += 1
        assert not any(window.span.start < cut < window.span.stop for cut in cuts)
        assert window.scene == sum(cut <= window.span.start for cut in cuts)
    assert covered.min() >= 1


def test_what_merges_in_one_scene_stays_out_of_the_next() -> None:
    plan = PLANS["cuts"]
    video = latents(plan)
    changed = video.clone()
    changed[3:] += 1
    before, after = (merge(plan, split(plan, v)) for v in (video, changed))
    assert torch.equal(before[:3], after[:3]) and not torch.equal(before[3:], after[3:])


def test_magnified_cuts_the_same_tiles_of_the_picture() -> None:
    plan = PLANS["dense"]
    video = latents(plan)
    large = video.repeat_interleave(8, -2).repeat_interleave(8, -1)
    magnified = plan.magnified(8)
    for n, m in product(range(len(plan.windows)), range(len(plan.spatial))):
        tile = cut_tile(plan, n, m, video).repeat_interleave(8, -2).repeat_interleave(8, -1)
        assert torch.equal(cut_tile(magnified, n, m, large), tile)
    assert relative(merge(magnified, split(magnified, large)), large) < 2e-7


def test_equal_settings_give_equal_hashable_plans() -> None:
    a, b = (plan_tiles(9, 24, 24, TileSize(16, 16, 4), 0.5, (4,)) for _ in range(2))
    assert a == b and hash(a) == hash(b) and a != plan_tiles(9, 24, 24, TileSize(16, 16, 4), 0.75, (4,))


def test_a_tile_counts_as_added_in_any_order() -> None:
    plan = PLANS["all"]
    video = latents(plan)
    places = list(product(range(len(plan.windows)), range(len(plan.spatial))))
    results: list[torch.Tensor] = []
    for order in (places, places[::-1]):
        merger = Merger(plan)
        for n, m in order:
            merger.add(n, m, cut_tile(plan, n, m, video))
        results.append(merger.result())
    assert relative(results[0], results[1]) < 2e-7


@pytest.mark.parametrize("margin", [0, 1, 3, 50])
def test_cores_cover_an_axis_once_and_see_their_margin(margin: int) -> None:
    for extent, size in product(range(1, 30), range(1, 12)):
        axis = list(range(extent))
        parts = cores(extent, size, margin)
        assert [place for part in parts for place in axis[part.core]] == axis
        for part in parts:
            seen = axis[part.outer]
            assert seen[part.inner] == axis[part.core] and 1 <= len(axis[part.core]) <= size
            # The margin, or to the border where that is nearer; slices that leave the axis would wrap.
            assert seen[0] == max(part.core.start - margin, 0) and seen[-1] == min(part.core.stop + margin, extent) - 1
            assert part.outer.start >= 0 and part.outer.stop <= extent


def test_cores_make_a_filter_of_their_reach_exact() -> None:
    line = latents(plan_tiles(1, 8, 8, TileSize(8, 8, 1)))[0, 0, 0].repeat(5)
    whole = torch.nn.functional.avg_pool1d(line[None], 5, 1, 2)[0]

    def by_parts(margin: int) -> torch.Tensor:
        parts = cores(len(line), 7, margin)
        return torch.cat([torch.nn.functional.avg_pool1d(line[None, p.outer], 5, 1, 2)[0, p.inner] for p in parts])

    assert torch.allclose(by_parts(2), whole, atol=1e-6) and not torch.allclose(by_parts(1), whole, atol=1e-3)


@pytest.mark.parametrize(
    ("tile", "overlap", "cuts", "named"),
    [
        (TileSize(0, 8, 4), 0.5, (), "0x8x4"),
        (TileSize(8, -8, 4), 0.5, (), "8x-8x4"),
        (TileSize(8, 8, 0), 0.5, (), "8x8x0"),
        (TileSize(12, 8, 4), 0.5, (), "12x8x4"),
        (TileSize(8, 9, 4), 0.5, (), "8x9x4"),
        (TileSize(8, 8, 4), -0.01, (), "-0.01"),
        (TileSize(8, 8, 4), 0.76, (), "0.76"),
        (TileSize(8, 8, 4), float("nan"), (), "nan"),
        (TileSize(8, 8, 4), 0.5, (4, 3), r"\[4, 3\]"),
        (TileSize(8, 8, 4), 0.5, (3, 3), r"\[3, 3\]"),
        (TileSize(8, 8, 4), 0.5, (0,), r"\[0\]"),
        (TileSize(8, 8, 4), 0.5, (8,), r"\[8\]"),
        (TileSize(8, 8, 4), 0.5, (-1,), r"\[-1\]"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    tile: TileSize, overlap: float, cuts: tuple[int, ...], named: str
) -> None:
    with pytest.raises(SettingError, match=named) as caught:
        plan_tiles(8, 16, 16, tile, overlap, cuts)
    assert "\n" not in str(caught.value)


def test_the_limits_themselves_work() -> None:
    for overlap in (0, 0.75):
        assert plan_tiles(8, 16, 16, TileSize(8, 8, 1), overlap, (1, 7)).tiles > 0


def test_tile_sizes_are_read_and_written() -> None:
    assert TileSize.parse("64x48X14") == TileSize(64, 48, 14)
    assert TileSize.parse(str(TileSize(8, 16, 3))) == TileSize(8, 16, 3)
    for text in ("", "64", "64x64", "64x64x14x2", "axbxc", "-8x8x4", "8.0x8x4", "²x8x4"):
        with pytest.raises(SettingError, match="HEIGHTxWIDTHxFRAMES"):
            TileSize.parse(text)


def test_what_is_merged_so_far() -> None:
    """A frame with its first tile, and with all: where nothing lies is known, and the rest is as it will be there."""
    plan = plan_tiles(3, 8, 12, TileSize(8, 8, 2), 0.5)
    video = torch.randn(3, 2, 8, 12, generator=torch.Generator().manual_seed(0))
    merger = Merger(plan)
    for n, tiles in enumerate(split(plan, video)):
        for m, tile in enumerate(tiles):
            merger.add(n, m, tile)
            if (n, m) == (0, 0):
                frame, missing = merger.so_far(0)
                assert missing[0, 0, 0].tolist() == [False] * 8 + [True] * 4
                assert torch.allclose(frame[..., :8], video[:1, ..., :8]) and not frame[..., 8:].any()
                assert merger.so_far(2)[1].all()
    frame, missing = merger.so_far(2)
    assert not missing.any() and torch.allclose(frame, merger.result()[2:])
