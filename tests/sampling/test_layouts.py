"""Laws of tile layouts: coverage, overlap, moving borders, counts, and what passes over them share."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import pairwise, product
from typing import TYPE_CHECKING

import pytest
import torch

from tests.support.one_layer import TILE, one_layer
from tests.support.tensors import latents, relative
from vsr_ops.errors import SettingError
from vsr_ops.pipeline.sampler import Settings, sample, unet_calls
from vsr_ops.sampling.calls import Call, gather_tiles
from vsr_ops.sampling.guidance import COND
from vsr_ops.sampling.layouts import (
    ENOUGH,
    LAYOUTS,
    LEAST,
    PHASES,
    SETTLING,
    TileLayout,
    even_spans,
    lay_out,
    moved_spans,
)
from vsr_ops.sampling.passes import run_pass
from vsr_ops.sampling.propagation import Propagation, TileRun, frames_within
from vsr_ops.sampling.schedule import Step, step_at
from vsr_ops.sampling.tiling import Span, TileSize, Window, plan_tiles

if TYPE_CHECKING:
    from vsr_ops.backbones.svd import SVD

#: 300 frames of 1080p in the tiles that SVD was published with.
FILM = (300, 136, 240, TileSize(64, 64, 14))


def passes(layout: TileLayout, steps: int) -> int:
    """Tile passes of a run with DSSAG, whose last step needs one pass only."""
    tiles = [layout.at(index).tiles for index in range(steps)]
    return 2 * sum(tiles) - tiles[-1]


@pytest.mark.parametrize(
    ("name", "most"),
    [("paper", 57_624), ("balanced", 32_000), ("shifted", 16_500)],
    ids=["paper", "balanced", "shifted"],
)
def test_a_films_tile_passes(name: str, most: int) -> None:
    count = passes(lay_out(name, *FILM), 25)
    assert count == most if name == "paper" else 49 * 264 < count <= most


def test_1080p_is_six_by_three_in_balance() -> None:
    plan = lay_out("balanced", *FILM).settled
    assert (len(plan.rows), len(plan.cols)) == (3, 6)
    assert all(span.start % 8 == 0 for span in (*plan.rows, *plan.cols))


@pytest.mark.parametrize(("factor", "overlap"), [*product((1, 2, 4, 8), (0.0, ENOUGH, LEAST))])
def test_even_spans_cover_overlap_and_are_even(factor: int, overlap: float) -> None:
    for extent, tile in product(range(factor, 25 * factor, factor), range(factor, 17 * factor, factor)):
        found = even_spans(extent, tile, overlap, factor)
        assert found[0].start == 0 and found[-1].stop == extent
        assert all(span.length == min(tile, extent) and span.start % factor == 0 for span in found)
        gaps = [b.start - a.start for a, b in pairwise(found)]
        # No near-duplicate: the gaps differ by no more than one cell of the UNet's coarsest level.
        assert not gaps or (min(gaps) > 0 and max(gaps) - min(gaps) <= factor)
        assert all(tile - gap >= overlap * tile - factor / 2 or gap == factor for gap in gaps)
        # No fewer would do.
        longest = max(gaps, default=1)
        assert len(gaps) <= 1 or (extent - tile) / (len(gaps) - 1) > longest - factor


@pytest.mark.parametrize(("factor", "share"), [*product((1, 4, 8), PHASES)])
def test_moved_spans_cover_and_begin_elsewhere(factor: int, share: float) -> None:
    for extent, tile in product(range(factor, 25 * factor, factor), range(4 * factor, 13 * factor, factor)):
        spans = even_spans(extent, tile, 0.0, factor)
        moved = moved_spans(spans, share, factor)
        assert moved[0].start == 0 and moved[-1].stop == extent
        assert all(a.start < b.start <= a.stop for a, b in pairwise(moved))
        assert all(span.length == spans[0].length and span.start % factor == 0 for span in moved)
        tight = any(a.stop - b.start < ENOUGH * tile for a, b in pairwise(spans))
        if share and tight:
            # Wherever tiles barely touched, some tile of the other phase holds the border with room on both sides.
            for a, b in pairwise(spans):
                border = (a.stop + b.start) / 2
                room = max(min(border - span.start, span.stop - border) for span in moved)
                assert room >= min(share, 1 - share) * (b.start - a.start) - factor
        else:
            assert moved == spans


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_plan_covers_every_scene_and_crosses_no_cut(name: str) -> None:
    cuts = (1, 12, 30)
    for plan in lay_out(name, 41, 40, 56, TileSize(16, 24, 6), cuts=cuts, factor=4).plans:
        seen = Counter(frame for window in plan.windows for frame in range(window.span.start, window.span.stop))
        assert set(seen) == set(range(41))
        for window in plan.windows:
            assert not any(window.span.start < cut < window.span.stop for cut in cuts)
            assert window.scene == sum(cut <= window.span.start for cut in cuts)


def test_paper_is_the_plan_and_a_small_video_is_one_tile_in_all() -> None:
    plan = plan_tiles(20, 40, 56, TileSize(16, 24, 6), 0.5, (7,), 4)
    assert lay_out("paper", 20, 40, 56, TileSize(16, 24, 6), 0.5, (7,), 4) == TileLayout.still(plan)
    for name in LAYOUTS:
        plans = lay_out(name, 4, 16, 16, TileSize(24, 24, 8), factor=4).plans
        assert {plan.tiles for plan in plans} == {1}


def test_the_last_steps_overlap_and_others_take_turns() -> None:
    layout = lay_out("shifted", *FILM).over(9)
    plans = [layout.at(index) for index in range(9)]
    assert plans[-SETTLING:] == [layout.settled] * SETTLING
    assert plans[: 9 - SETTLING] == [layout.phases[index % len(PHASES)] for index in range(9 - SETTLING)]
    assert all(a.cols != b.cols and a.windows != b.windows for a, b in pairwise(plans[:-SETTLING]))
    # A run that leaves noise for another one does not know its end.
    assert all(layout.over(None).at(index) in layout.phases for index in range(9))


def test_less_overlap_than_a_layouts_own_is_granted() -> None:
    layout = lay_out("balanced", 8, 32, 64, TileSize(16, 16, 8), 0.0, factor=4)
    assert (len(layout.settled.rows), len(layout.settled.cols)) == (2, 4)


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(SettingError, match="layout is 'even': expected one of paper, balanced, shifted"):
        lay_out("even", *FILM)


def test_frames_are_found_in_the_windows_of_another_grid() -> None:
    windows = [Window(Span(0, 6), 0), Window(Span(4, 10), 0), Window(Span(10, 16), 1)]
    # The same window is taken whole; else each frame from where it lies deepest, and never from another scene.
    assert frames_within(windows[1], windows) == [(1, slice(0, 6))]
    assert frames_within(Window(Span(2, 8), 0), windows) == [(0, slice(2, 5)), (1, slice(1, 4))]
    assert frames_within(Window(Span(8, 12), 2), windows) == []


def test_lagged_sap_on_a_moved_grid_sees_the_same_frames() -> None:
    """Still tokens, every one taken: wherever the tiles lay when they were gathered, the bank holds the same set."""
    video = latents(plan_tiles(6, 8, 16, TILE, 0.0))[:1].repeat(12, 1, 1, 1)
    layout = TileLayout(
        tuple(plan_tiles(12, 8, 16, TileSize(8, 8, frames), 0.0) for frames in (4, 6)), plan_tiles(12, 8, 16, TILE, 0.0)
    )
    settings = Propagation(("sap",), True, sap_rate=1)
    still, moving = TileRun(layout.phases[0], settings), TileRun(layout.phases[0], settings, layout=layout)
    found = [
        [run_pass(run, step_at(index, settings.kinds), COND, one_layer(run, video)) for index in range(3)]
        for run in (still, moving)
    ]
    assert all(relative(a, b) < 1e-5 for a, b in zip(*found, strict=True))
    plain = run_pass(TileRun(layout.phases[0], Propagation(())), Step(0), COND, one_layer(still, video))
    assert relative(found[1][1], plain) > 1e-3


@pytest.mark.parametrize(("name", "lagged", "steps"), [("balanced", True, 2), ("shifted", False, 3)])
def test_the_sampler_runs_what_is_counted(tiny: SVD, name: str, lagged: bool, steps: int) -> None:
    layout = lay_out(name, 6, 8, 16, TILE, cuts=(2,), factor=4).over(steps)
    settings = Settings(steps=steps, guidance="none", propagation=Propagation(sap_lagged=lagged), layout=name)
    ran: list[Call] = []
    out = sample(tiny, latents(layout.settled), layout, settings, tick=ran.append)
    assert torch.isfinite(out).all() and len(ran) == unet_calls(layout, settings)
    tiles = Counter((call.step.index, call.branch.name) for call in ran for _ in call.tiles)
    assert all(count == layout.at(index).tiles for (index, _), count in tiles.items())


def test_a_model_of_single_latents_gives_the_same_in_every_layout() -> None:
    """What sees one frame of one column of latents only knows nothing of tiles: the layout makes no difference."""
    video = latents(plan_tiles(9, 16, 32, TILE))
    outs = []
    for name in LAYOUTS:
        run = TileRun(
            plan_tiles(9, 16, 32, TILE), Propagation(()), layout=lay_out(name, 9, 16, 32, TILE, factor=4).over(4)
        )
        x = video
        for index in range(4):
            x = run_pass(run, Step(index), COND, partial(sine, run, x))
        outs.append(x)
    assert all(relative(out, outs[0]) < 1e-6 for out in outs)


def sine(run: TileRun, video: torch.Tensor, call: Call) -> torch.Tensor:
    """A model of single latents."""
    return gather_tiles(run.plan, call, video).sin()
