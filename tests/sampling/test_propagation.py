"""SAP and TAP: whose turn it is, and their laws on a model of one attention layer."""

from __future__ import annotations

import math
from itertools import pairwise, product
from typing import TYPE_CHECKING

import pytest
import torch
from einops import rearrange
from torch import Tensor

from tests.support.one_layer import LAGGED, PAIR, SAP, TAP, TILE, attend, one_layer, passed, project
from tests.support.tensors import latents, relative
from vsr_ops.errors import SettingError
from vsr_ops.sampling.calls import Call, calls, token_grid
from vsr_ops.sampling.guidance import COND, Branch
from vsr_ops.sampling.passes import run_pass
from vsr_ops.sampling.propagation import PROPAGATION, Propagation, TileRun, sap_rate, sharpest_frames, subsample
from vsr_ops.sampling.schedule import Step, step_at, step_index
from vsr_ops.sampling.tiling import plan_tiles

if TYPE_CHECKING:
    pass


def test_settings_and_names_that_cannot_work_are_refused() -> None:
    for settings in ({"sap_rate": 0}, {"tap_frames": 0}, {"tap_rate": -1}):
        with pytest.raises(SettingError, match=str(next(iter(settings.values())))):
            Propagation(**settings)
    with pytest.raises(SettingError, match="'both'") as caught:
        Propagation.named("both")
    assert all(name in str(caught.value) for name in PROPAGATION)


def test_a_step_runs_from_its_sigma_down_to_the_next() -> None:
    sigmas = [700.0, 40.0, 3.0, 0.002, 0.0]
    for index, sigma in enumerate(sigmas):
        assert step_index(sigmas, sigma) == index
        # The rounding of a sigma through float32 or half steps changes nothing.
        assert step_index(sigmas, float(torch.tensor(sigma))) == index
    between = {699.0: 0, 41.0: 0, 39.0: 1, 10.0: 1, 2.9: 2, 0.0021: 2, 0.001: 3}
    assert {sigma: step_index(sigmas, sigma) for sigma in between} == between
    assert step_index(sigmas, 1000.0) == 0


def test_a_second_order_sampler_sees_one_step_for_its_two_calls() -> None:
    sigmas = [700.0, 40.0, 3.0, 0.002, 0.0]
    for index, (a, b) in enumerate(pairwise(sigmas[:-1])):
        # DPM-2 and its kin: the second call at the geometric mean; Heun: the second at the sigma of the next first.
        assert step_index(sigmas, a) == step_index(sigmas, math.sqrt(a * b)) == index
        assert step_index(sigmas, b) == index + 1
    steps = [step_at(step_index(sigmas, s), ("sap", "tap")) for s in (700, 170, 40, 11, 3, 0.08)]
    assert [s.kind for s in steps] == ["sap", "sap", "tap", "tap", "sap", "sap"]


def test_the_kinds_take_turns_and_tap_turns_around() -> None:
    both = [step_at(i, ("sap", "tap")) for i in range(8)]
    assert [s.kind for s in both] == ["sap", "tap"] * 4
    assert [s.forward for s in both if s.kind == "tap"] == [True, False, True, False]
    assert [step_at(i, ("tap",)).forward for i in range(4)] == [True, False, True, False]
    assert [step_at(i, ()).kind for i in range(3)] == ["plain"] * 3
    assert [s.index for s in both] == list(range(8))


@pytest.mark.parametrize("kind", ["plain", "sap", "tap"])
@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("batch", [1, 2, 4, 100])
@pytest.mark.parametrize("synchronous", [True, False])
def test_calls_take_every_tile_once_and_windows_in_direction(
    kind: str, forward: bool, batch: int, synchronous: bool
) -> None:
    plan = plan_tiles(11, 16, 24, TILE, 0.5, cuts=(2,))
    made = list(calls(plan, Step(3, kind, forward), COND, batch, synchronous))  # type: ignore[arg-type]
    places = [(call.window, m) for call in made for m in call.tiles]
    assert sorted(places) == list(product(range(len(plan.windows)), range(len(plan.spatial))))
    limit = len(plan.spatial) if synchronous and kind == "sap" else min(batch, len(plan.spatial))
    assert max(len(call.tiles) for call in made) == limit
    for m in range(len(plan.spatial)):
        windows = [call.window for call in made if m in call.tiles]
        assert windows == sorted(windows, reverse=not forward)
    for call in made:
        size = plan.tile_size(call.window)
        assert (call.frames, call.height, call.width) == (size.frames, size.height, size.width)


def test_token_grids() -> None:
    for height, width in product(range(1, 41), range(1, 41)):
        rows, cols = height, width
        for _ in range(4):
            assert token_grid(rows * cols, height, width) == (rows, cols)
            # A convolution of stride 2 and padding 1 keeps the odd one.
            rows, cols = (rows + 1) // 2, (cols + 1) // 2
    with pytest.raises(SettingError, match="7 tokens"):
        token_grid(7, 8, 8)


def test_subsampling_takes_every_so_many_th_token_in_y_and_x() -> None:
    x = torch.arange(6 * 5).float().view(1, 1, 30, 1).expand(2, 3, 30, 2)
    grid = x[0, 0, :, 0].view(6, 5)
    for rate in (1, 2, 3, 4, 7):
        expected = torch.tensor([grid[i, j] for i in range(0, 6, rate) for j in range(0, 5, rate)])
        found = subsample(x, (6, 5), rate)
        assert torch.equal(found, expected.view(1, 1, -1, 1).expand(2, 3, -1, 2))


def test_the_automatic_rate_is_the_smallest_whose_bank_is_half_a_tile() -> None:
    def bank(tiles: int, grid: tuple[int, int], rate: int) -> float:
        return tiles * math.ceil(grid[0] / rate) * math.ceil(grid[1] / rate) / (grid[0] * grid[1])

    for tiles, grid in product((2, 4, 8, 9, 64, 225), ((64, 64), (32, 32), (8, 16), (4, 4))):
        rate = sap_rate(Propagation(), tiles, grid)
        assert rate >= 4 and (rate == 4 or bank(tiles, grid, rate - 1) > 0.5)
        assert bank(tiles, grid, rate) <= 0.5 or rate >= max(grid)
        assert sap_rate(Propagation(sap_rate=3), tiles, grid) == 3
    assert sap_rate(Propagation(), 8, (64, 64)) == 4


def test_tap_takes_the_frames_with_the_largest_deviation() -> None:
    rng = torch.Generator().manual_seed(0)
    deviations = torch.tensor([1.0, 5.0, 2.0, 9.0, 0.5, 4.0, 3.0])
    keys = torch.randn(7, 2, 30, 4, generator=rng) * deviations.view(-1, 1, 1, 1)
    # A large mean is no deviation.
    keys[4] += 100
    assert sharpest_frames(keys, 1).tolist() == [3]
    assert sharpest_frames(keys, 3).tolist() == [1, 3, 5]
    assert sharpest_frames(keys.half(), 4).tolist() == [1, 3, 5, 6]
    assert sharpest_frames(keys, 20).tolist() == list(range(7))


def test_ties_go_to_the_lower_frame() -> None:
    rng = torch.Generator().manual_seed(0)
    frame, sharp = torch.randn(2, 2, 33, 5, generator=rng)
    sharp = 4 * sharp
    keys = torch.stack([frame, sharp, frame, sharp, frame, sharp, frame])
    assert sharpest_frames(keys, 2).tolist() == [1, 3]
    assert sharpest_frames(keys, 4).tolist() == [0, 1, 3, 5]
    assert sharpest_frames(keys.flip(0), 2).tolist() == [1, 3]


def test_off_is_plain_attention_on_each_tile() -> None:
    plan = plan_tiles(6, 8, 16, TILE, 0.0)
    video = latents(plan)
    expected = torch.cat([attend(*project(video[..., :8])), attend(*project(video[..., 8:]))], -1)
    for settings in (Propagation(()), Propagation((), sap_lagged=True)):
        assert relative(passed(plan, settings, Step(0), video), expected) < 1e-6


def test_sap_attends_to_the_own_tokens_and_those_of_all_tiles() -> None:
    """The paper gathers over all m, so at rate 1 the tile's own tokens stand in the keys twice."""
    video = latents(PAIR)
    sides = [project(side) for side in video.split(8, -1)]
    everything = [torch.cat([sides[0][i], sides[1][i]], 2) for i in (1, 2)]
    expected = [attend(q, torch.cat([k, everything[0]], 2), torch.cat([v, everything[1]], 2)) for q, k, v in sides]
    assert relative(passed(PAIR, SAP, Step(0, "sap"), video), torch.cat(expected, -1)) < 1e-6


def test_sap_subsamples_at_its_rate_frame_by_frame() -> None:
    settings = Propagation(("sap",), sap_rate=2)
    video = latents(PAIR)
    before = passed(PAIR, settings, Step(0, "sap"), video)[..., :8]
    for y, x, seen in ((2, 4, True), (3, 4, False), (2, 5, False)):
        planted = video.clone()
        planted[1, :, y, 8 + x] += 5
        after = passed(PAIR, settings, Step(0, "sap"), planted)[..., :8]
        changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert changed == [False, seen, False, False]


def test_sap_on_one_tile_is_plain_attention() -> None:
    plan = plan_tiles(9, 8, 8, TILE)
    video = latents(plan)
    plain = passed(plan, Propagation(()), Step(1), video)
    for settings in (SAP, LAGGED):
        run = TileRun(plan, settings)
        for index in (0, 1):
            out = run_pass(run, Step(index, "sap"), COND, one_layer(run, video))
            assert torch.equal(out, plain) and run.bank_bytes == 0


def test_lagged_sap_is_synchronous_when_the_input_stands_still() -> None:
    plan = plan_tiles(6, 16, 16, TILE, 0.5)
    video = latents(plan)
    run = TileRun(plan, Propagation(("sap",), True, sap_rate=2))
    first, second = (run_pass(run, Step(i, "sap"), COND, one_layer(run, video)) for i in (0, 1))
    synchronous = passed(plan, Propagation(("sap",), sap_rate=2), Step(0, "sap"), video)
    # Not bit for bit: a SAP step blends the tiles in another order.
    assert relative(first, passed(plan, Propagation(()), Step(0), video)) < 1e-6
    assert relative(second, synchronous) < 1e-6 and relative(first, synchronous) > 1e-2


def test_the_lagged_bank_is_the_last_call_of_the_step_before() -> None:
    a, b, c, d = (latents(PAIR, seed) for seed in range(4))
    run = TileRun(PAIR, LAGGED)
    for video in (a, b):
        run_pass(run, Step(0, "sap"), COND, one_layer(run, video))
    out = [run_pass(run, Step(1, "sap"), COND, one_layer(run, video)) for video in (c, d)]
    bank = [torch.cat(parts, 2) for parts in zip(*(project(side)[1:] for side in b.split(8, -1)), strict=True)]
    for found, video in zip(out, (c, d), strict=True):
        expected = [
            attend(q, torch.cat([k, bank[0]], 2), torch.cat([v, bank[1]], 2))
            for q, k, v in (project(side) for side in video.split(8, -1))
        ]
        assert relative(found, torch.cat(expected, -1)) < 1e-6


def test_a_bank_older_than_one_step_is_not_used() -> None:
    run = TileRun(PAIR, LAGGED)
    run_pass(run, Step(0, "sap"), COND, one_layer(run, latents(PAIR)))
    out = run_pass(run, Step(2, "sap"), COND, one_layer(run, latents(PAIR, 1)))
    assert torch.equal(out, passed(PAIR, Propagation(()), Step(0), latents(PAIR, 1)))


def test_lagged_banks_are_gathered_only_before_a_sap_step_and_counted() -> None:
    settings = Propagation(("sap", "tap"), True, sap_rate=2)
    plan = plan_tiles(6, 8, 16, TILE, 0.0)
    run, held = TileRun(plan, settings), []
    for index in range(4):
        run_pass(run, step_at(index, settings.kinds), COND, one_layer(run, latents(plan, index)))
        held.append(run.bank_bytes)
    frames = sum(window.span.length for window in plan.windows)
    size = 4 * 2 * frames * len(plan.spatial) * (4 * 4) * (2 * 4)
    assert held == [0, size, size, size]


def test_banks_of_branches_do_not_mix() -> None:
    other = Branch("perturbed")
    a, b = latents(PAIR, 0), latents(PAIR, 1)

    def last(videos: dict[Branch, Tensor]) -> Tensor:
        run = TileRun(PAIR, LAGGED)
        for index in (0, 1):
            for branch, video in videos.items():
                out = run_pass(run, Step(index, "sap"), branch, one_layer(run, video))
        return out

    assert torch.equal(last({other: b, COND: a}), last({COND: a}))
    plan = plan_tiles(8, 8, 8, TILE)
    tap = [latents(plan, 0), latents(plan, 1)]
    run = TileRun(plan, TAP)
    run_pass(run, Step(0, "tap"), other, one_layer(run, tap[1]))
    out = run_pass(run, Step(0, "tap"), COND, one_layer(run, tap[0]))
    assert torch.equal(out, passed(plan, TAP, Step(0, "tap"), tap[0]))


@pytest.mark.parametrize(("frames", "rate"), [(2, 1), (2, 2), (4, 1), (9, 1)])
def test_tap_hands_the_sharpest_frames_to_the_next_window(frames: int, rate: int) -> None:
    plan = plan_tiles(12, 8, 8, TILE, 0.0)
    video = latents(plan) * torch.linspace(2, 1, 12)[torch.randperm(12, generator=torch.Generator())].view(-1, 1, 1, 1)
    expected, left = [], None
    for window in video.split(4):
        q, k, v = project(window)
        own = [k, v]
        if left is not None:
            own = [torch.cat([x, bank.expand(4, -1, -1, -1)], 2) for x, bank in zip(own, left, strict=True)]
        expected.append(attend(q, *own))
        order = sorted(range(4), key=lambda i: -float(k[i].double().std()))[:frames]
        picked = [rearrange(x[sorted(order)], "t h (y x) d -> t h y x d", y=8)[:, :, ::rate, ::rate] for x in (k, v)]
        left = [rearrange(x, "t h y x d -> 1 h (t y x) d") for x in picked]
    settings = Propagation(("tap",), tap_frames=frames, tap_rate=rate)
    assert relative(passed(plan, settings, Step(0, "tap"), video), torch.cat(expected)) < 1e-6


def test_backward_is_forward_on_the_reversed_video() -> None:
    """On one layer: the temporal layers of a UNet know where in a window a frame stands, so there it does not hold."""
    plan = plan_tiles(10, 8, 16, TILE, 0.5)
    video = latents(plan)
    forward = passed(plan, TAP, Step(0, "tap", True), video.flip(0)).flip(0)
    backward = passed(plan, TAP, Step(0, "tap", False), video)
    assert relative(backward, forward) < 1e-6
    assert relative(passed(plan, TAP, Step(0, "tap", True), video), forward) > 1e-2


@pytest.mark.parametrize("forward", [True, False])
def test_tap_never_crosses_a_cut(forward: bool) -> None:
    plan = plan_tiles(13, 8, 8, TILE, 0.5, cuts=(6, 7))
    video, step = latents(plan), Step(0, "tap", forward)
    scenes = [video[:6], video[6:7], video[7:]]
    alone = [passed(plan_tiles(len(s), 8, 8, TILE, 0.5), TAP, step, s) for s in scenes]
    assert torch.equal(passed(plan, TAP, step, video), torch.cat(alone))
    uncut = passed(plan_tiles(13, 8, 8, TILE, 0.5), TAP, step, video)
    assert not torch.equal(uncut, torch.cat(alone))


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("forward", [True, False])
def test_nothing_is_left_of_tap_after_a_pass_and_little_within(batch: int, forward: bool) -> None:
    plan = plan_tiles(13, 8, 32, TILE, 0.5, cuts=(6, 7))
    run, most = TileRun(plan, TAP), 0
    evaluate = one_layer(run, latents(plan))

    def watched(call: Call) -> Tensor:
        nonlocal most
        out = evaluate(call)
        most = max(most, sum(len(bank) for bank in (*run._tap.values(), *run._handed.values())))
        return out

    run_pass(run, Step(0, "tap", forward), COND, watched, batch)
    assert run._tap == {} and run.bank_bytes == 0
    # From one window to the next only: never more than one batch of tiles.
    assert most == batch


def test_tap_stays_within_its_spatial_tile() -> None:
    plan = plan_tiles(8, 8, 16, TILE, 0.0)
    video = latents(plan)
    planted = video.clone()
    planted[0, :, 3, 12] += 50
    before, after = (passed(plan, TAP, Step(0, "tap"), v) for v in (video, planted))
    assert torch.equal(before[..., :8], after[..., :8])
    assert all(not torch.equal(before[i, ..., 8:], after[i, ..., 8:]) for i in range(4, 8))
