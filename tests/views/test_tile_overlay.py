"""Laws of the drawn tile plan: every tile shows, nothing else changes, the strip tells windows and cuts."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch

from vsr_ops.errors import SettingError
from vsr_ops.sampling.tiling import Span, TilePlan, TileSize, plan_tiles
from vsr_ops.views.tile_overlay import draw_plan, preview, timeline

#: One tile; no, little, half and much overlap; a last tile flush with the border; cuts.
PLANS = {
    "one": plan_tiles(5, 16, 24, TileSize(64, 64, 14)),
    "no overlap": plan_tiles(8, 32, 48, TileSize(16, 16, 8), 0.0),
    "quarter": plan_tiles(8, 40, 40, TileSize(16, 16, 8), 0.25),
    "half": plan_tiles(20, 36, 52, TileSize(16, 24, 6), 0.5, cuts=(9,)),
    "dense": plan_tiles(9, 32, 32, TileSize(16, 16, 4), 0.75),
}
GREY = 0.5


def grey(plan: TilePlan, scale: float = 12.0) -> torch.Tensor:
    return torch.full((3, round(plan.height * scale), round(plan.width * scale)), GREY)


def clear(row: Span, col: Span, scale: float = 12.0) -> tuple[slice, slice, slice]:
    rows, columns = ((round(span.start * scale), round(span.stop * scale)) for span in (row, col))
    return slice(None), slice(*rows), slice(*columns)


def border_colors(tile: torch.Tensor, depth: int = 14) -> set[tuple[int, ...]]:
    """The strong colours that run along nearly all of each of the four sides of (3, h, w), `depth` pixels deep."""
    levels = (tile * 255).round().int()
    sides = (
        levels[:, :depth],
        levels[:, -depth:],
        levels[:, :, :depth].transpose(1, 2),
        levels[:, :, -depth:].transpose(1, 2),
    )
    known = torch.unique(sides[0].flatten(1), dim=1).T
    strong = known[(known.amax(1) - known.amin(1)) > 120]

    def runs_along(color: torch.Tensor, side: torch.Tensor) -> bool:
        return bool((side == color.view(3, 1, 1)).all(0).any(0).float().mean() > 0.8)

    return {tuple(color.tolist()) for color in strong if all(runs_along(color, side) for side in sides)}


def neighbours(plan: TilePlan) -> Iterator[tuple[int, int]]:
    wide = len(plan.cols)
    for r, c in product(range(len(plan.rows)), range(wide)):
        for down, right in ((0, 1), (1, -1), (1, 0), (1, 1)):
            if r + down < len(plan.rows) and 0 <= c + right < wide:
                yield r * wide + c, (r + down) * wide + c + right


@pytest.mark.parametrize("name", list(PLANS))
def test_every_tile_has_a_border_that_its_neighbours_have_not(name: str) -> None:
    plan = PLANS[name]
    result = draw_plan(plan, grey(plan, 16.0), 0)
    colors = [border_colors(result[clear(row, col, 16.0)]) for row, col in plan.spatial]
    assert all(len(found) == 1 for found in colors)
    assert all(colors[a] != colors[b] for a, b in neighbours(plan))


@pytest.mark.parametrize("name", ["one", "no overlap"])
def test_without_overlap_the_inside_of_a_tile_is_untouched(name: str) -> None:
    plan = PLANS[name]
    frame = torch.rand(3, plan.height * 12, plan.width * 12)
    result = draw_plan(plan, frame, 0)
    for row, col in plan.spatial:
        place = clear(row, col)
        assert torch.equal(result[place][:, 40:-40, 4:-4], frame[place][:, 40:-40, 4:-4])


def test_overlaps_are_shaded_faintly_and_twice_where_both_axes_overlap() -> None:
    plan = plan_tiles(4, 24, 24, TileSize(16, 16, 4), 0.5)
    result = draw_plan(plan, grey(plan, 20.0), 0)
    # Middles of the areas that one, two and four tiles cover.
    once, twice, four = (float((result[:, y, x] - GREY).abs().max()) for y, x in ((100, 130), (240, 100), (240, 240)))
    assert once == 0 and 0.02 < twice < 0.1 and 1.5 * twice < four < 0.15


def test_numbers_appear_where_they_fit() -> None:
    def chips(scale: float) -> int:
        plan = plan_tiles(4, 16, 32, TileSize(16, 16, 4), 0.0)
        result = draw_plan(plan, grey(plan, scale), 0)
        # The corner past the border: a chip is neither grey nor, all of it, one colour.
        corners = [result[clear(row, col, scale)][:, 4:24, 4:20] for row, col in plan.spatial]
        return sum(bool((corner < 0.1).any()) for corner in corners)

    assert chips(12.0) == 2 and chips(1.0) == 0


def test_two_tiles_do_not_share_a_number_or_its_place() -> None:
    plan = PLANS["dense"]
    result = draw_plan(plan, grey(plan), 0)
    # Past the deepest border; a stride is 48 pixels.
    corners = [result[clear(row, col)][:, 14:44, 14:44] for row, col in plan.spatial]
    assert all(not torch.equal(a, b) for i, a in enumerate(corners) for b in corners[:i])


def test_windows_are_named() -> None:
    plan = PLANS["half"]
    pictures = [draw_plan(plan, grey(plan), window) for window in range(len(plan.windows))]
    for i, picture in enumerate(pictures):
        for other in pictures[:i]:
            rows, columns = (picture != other).any(0).nonzero().unbind(1)
            assert len(rows) and rows.min() > picture.shape[1] - 40 and columns.max() < 200


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.7, 8.0, 15.26])
def test_any_scale_keeps_the_size_and_reaches_the_edges(scale: float) -> None:
    plan = PLANS["half"]
    frame = grey(plan, scale)
    result = draw_plan(plan, frame, 1)
    assert result.shape == frame.shape
    for edge in (result[:, 0], result[:, -1], result[:, :, 0], result[:, :, -1]):
        assert bool((edge != GREY).any(0).all())


def test_a_plan_padded_at_the_bottom_is_not_squeezed() -> None:
    # 90 latents of a picture 720 high, planned as 96: the second row of tiles begins at 32 latents all the same.
    plan = plan_tiles(4, 96, 160, TileSize(64, 64, 4), 0.5)
    picture = draw_plan(plan, torch.full((3, 720, 1280), GREY), 0)
    whole = draw_plan(plan, torch.full((3, 768, 1280), GREY), 0)
    assert torch.equal(picture[:, :500, :1000], whole[:, :500, :1000])
    assert (picture[:, -8:] != GREY).any(0).any(0).float().mean() > 0.99


def lit(strip: torch.Tensor) -> torch.Tensor:
    """Where a strip (3, h, w) is brightly coloured: the bars."""
    return (strip.amax(0) > 0.9) & (strip.amax(0) - strip.amin(0) > 0.4)


def test_timeline_bars_cover_their_frames_and_keep_apart_at_cuts() -> None:
    plan = plan_tiles(40, 16, 16, TileSize(16, 16, 10), 0.0, cuts=(20,))
    strip = timeline(plan, 808)
    bars = lit(strip)[: strip.shape[1] // 2].any(0)
    assert bars[8:800].float().mean() > 0.97 and not bars[:3].any() and not bars[-3:].any()
    columns = (strip == 1).all(0).float().mean(0)
    assert columns.argmax().item() in range(400, 409) and int((columns > 0.5).sum()) <= 4


def test_timeline_is_higher_where_more_windows_overlap() -> None:
    heights = [timeline(plan_tiles(40, 8, 8, TileSize(8, 8, 8), o), 512).shape[1] for o in (0.0, 0.5, 0.75)]
    assert heights[0] < heights[1] < heights[2] and all(height % 2 == 0 for height in heights)


def test_the_marked_frame_lights_the_windows_it_lies_in() -> None:
    plan = plan_tiles(40, 8, 8, TileSize(8, 8, 10), 0.0)
    for frame in (0, 9, 10, 25, 39):
        columns = lit(timeline(plan, 808, frame)).any(0).nonzero().flatten()
        start = frame // 10 * 200 + 4
        assert abs(int(columns[0]) - start) <= 4 and abs(int(columns[-1]) - (start + 198)) <= 4


@pytest.mark.parametrize("width", [1, 7, 30, 512, 3840])
def test_timeline_of_any_width(width: int) -> None:
    plan = plan_tiles(300, 8, 8, TileSize(8, 8, 14), 0.5, cuts=(100, 101))
    strip = timeline(plan, width)
    assert strip.shape == (3, strip.shape[1], width) and strip.dtype == torch.float32
    assert strip.min() >= 0 and strip.max() <= 1
    assert timeline(plan, width, 299).shape == strip.shape


def test_preview_is_every_frame_with_its_grid_over_its_own_strip() -> None:
    plan = PLANS["half"]
    frames = torch.rand(plan.frames, 3, plan.height * 8, plan.width * 8)
    before = frames.clone()
    result = preview(plan, frames)
    height = frames.shape[2]
    assert torch.equal(frames, before)
    assert result.shape[:2] == (20, 3) and result.shape[3] == frames.shape[3] and result.shape[2] > height
    for i in (0, 8, 19):
        assert torch.equal(result[i, :, height:], timeline(plan, frames.shape[3], i))
        # The grid is draw_plan's, which adds the name of the window at the bottom.
        assert torch.equal(result[i, :, : height - 40], draw_plan(plan, frames[i], 0)[:, :-40])


def test_preview_of_one_picture_marks_no_frame() -> None:
    plan = PLANS["half"]
    frame = grey(plan)
    result = preview(plan, frame)
    assert torch.equal(result, preview(plan, frame[None]))
    assert torch.equal(result[0, :, frame.shape[1] :], timeline(plan, frame.shape[2]))


@pytest.mark.parametrize("name", list(PLANS))
def test_runs_agree_and_dtype_is_kept(name: str) -> None:
    plan = PLANS[name]
    frame = grey(plan, 8.0)
    assert torch.equal(draw_plan(plan, frame, 0), draw_plan(plan, frame, 0))
    assert torch.equal(preview(plan, frame), preview(plan, frame))
    assert draw_plan(plan, frame.half(), 0).dtype == preview(plan, frame.half()).dtype == torch.float16


def test_what_does_not_fit_is_refused() -> None:
    plan = PLANS["half"]
    frame = grey(plan)
    for window in (-1, len(plan.windows)):
        with pytest.raises(SettingError, match=rf"window is {window}: expected 0 to {len(plan.windows) - 1}"):
            draw_plan(plan, frame, window)
    for bad in (frame[:1], frame[None], (frame * 255).byte(), frame[:, :0]):
        with pytest.raises(SettingError, match="expected a floating-point RGB picture"):
            draw_plan(plan, bad, 0)
    with pytest.raises(SettingError, match=r"52x36 .* picture of 624x200.*equal proportions"):
        draw_plan(plan, frame[:, :200], 0)
    for frames in (frame.expand(3, -1, -1, -1), frame[0], frame.expand(0, -1, -1, -1)):
        with pytest.raises(SettingError, match="expected the 20 frames of the plan"):
            preview(plan, frames)
    with pytest.raises(SettingError, match="width is 0"):
        timeline(plan, 0)
    for moment in (-1, 20):
        with pytest.raises(SettingError, match=f"frame is {moment}: expected 0 to 19"):
            timeline(plan, 512, moment)
