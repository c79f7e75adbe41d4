"""What a plan costs, against what a run really holds."""

from __future__ import annotations

import pytest
import torch

from vsr_ops.names import LAYOUTS
from vsr_ops.pipeline.plan_cost import Bank, describe_plan, duration, lagged_bytes, tap_bytes
from vsr_ops.pipeline.tile_time import TileSeconds, tile_seconds, volume
from vsr_ops.sampling.calls import Call, calls
from vsr_ops.sampling.guidance import COND
from vsr_ops.sampling.layers import Layer
from vsr_ops.sampling.layouts import lay_out
from vsr_ops.sampling.propagation import Propagation, TileRun
from vsr_ops.sampling.schedule import Kind, Step
from vsr_ops.sampling.tiling import TileSize, plan_tiles
from vsr_ops.units import readable

PLAN = plan_tiles(10, 16, 24, TileSize(8, 8, 4))
BANKS = [Bank(8, 8, 2 * 6)]
LAYER = Layer("one", frozenset({"ends"}))


@pytest.mark.parametrize("rate", [None, 1, 3])
def test_lagged_banks_hold_exactly_what_was_said(rate: int | None) -> None:
    settings = Propagation(("sap",), True, rate)
    run, step = TileRun(PLAN, settings), Step(0, "sap")
    run.begin(step, COND)
    for call in calls(PLAN, step, COND, 1, synchronous=False):
        q, k, v = (torch.randn(call.frames, 2, 64, 3) for _ in range(3))
        run.serve(call)
        run.attend(call, LAYER, q, k, v)
        run.finish(call)
    assert run.bank_bytes == lagged_bytes(PLAN, settings, 1, BANKS, 4)
    assert lagged_bytes(PLAN, settings, 2, BANKS, 4) == 2 * run.bank_bytes


def test_nothing_is_held_where_nothing_lags() -> None:
    one = plan_tiles(10, 8, 8, TileSize(8, 8, 4))
    assert lagged_bytes(one, Propagation(("sap",), True), 1, BANKS, 4) == 0
    assert lagged_bytes(PLAN, Propagation(("sap",)), 1, BANKS, 4) == 0
    assert lagged_bytes(PLAN, Propagation(("tap",), True), 1, BANKS, 4) == 0
    assert tap_bytes(PLAN, Propagation(("sap",)), 1, BANKS, 4) == 0
    assert tap_bytes(plan_tiles(4, 8, 8, TileSize(8, 8, 4)), Propagation(("tap",)), 1, BANKS, 4) == 0


def test_taps_banks_never_exceed_what_was_said() -> None:
    settings, step = Propagation(("tap",), tap_frames=2), Step(0, "tap")
    run, most = TileRun(PLAN, settings), 0
    run.begin(step, COND)
    for call in calls(PLAN, step, COND, 2, synchronous=False):
        q, k, v = (torch.randn(len(call.tiles) * call.frames, 2, 64, 3) for _ in range(3))
        run.serve(call)
        run.attend(call, LAYER, q, k, v)
        most = max(most, held(run))
        run.finish(call)
    assert 0 < most <= tap_bytes(PLAN, settings, 2, BANKS, 4)


def held(run: TileRun) -> int:
    """Bytes of TAP's banks that are alive."""
    banks = (*(bank.values() for bank in run._tap.values()), *run._handed.values())
    return sum(kv.keys.nbytes + kv.values.nbytes for bank in banks for kv in bank)


def test_the_text_counts_every_tile_of_every_pass() -> None:
    tile = TileSeconds(TileSize(8, 8, 4), TileSize(8, 8, 4), {"plain": 0.5})
    layouts = {name: lay_out(name, 10, 16, 24, TileSize(8, 8, 4)) for name in LAYOUTS}
    paper = layouts.pop("paper")
    text = describe_plan(
        paper,
        Propagation(sap_lagged=True),
        5,
        2,
        lagged=0,
        tap=2048,
        weights=2**30,
        activations=1,
        tile=tile,
        others=layouts,
    )
    passes = 5 * 2 * PLAN.tiles
    assert f"{passes:,} tile passes" in text and "SAP lagged" in text and "1.00 GiB" in text
    assert f"about {passes / 2 / 60:.0f} minutes of sampling (0.5 s a tile pass)" in text
    fewer = 2 * sum(layouts["shifted"].over(5).at(step).tiles for step in range(5))
    assert f"cheaper      layout shifted: {fewer:,} tile passes" in text
    assert "3x5x4 of 8x8x4" in text


def test_times_for_a_person() -> None:
    said = [duration(seconds) for seconds in (0.26, 12.4, 89, 600, 5399, 7200)]
    assert said == ["0.3 s", "12 s", "89 s", "10 minutes", "90 minutes", "2.0 hours"]


def test_a_tile_is_timed_on_the_largest_that_there_is_time_for() -> None:
    """A UNet that takes a millisecond a latent pixel: what is measured, and what is scaled by operations."""
    ran: list[TileSize] = []

    def run(tile: TileSize) -> dict[Kind, float]:
        ran.append(tile)
        return {"plain": volume(tile) / 1000, "tap": volume(tile) / 500}

    tile = TileSize(32, 32, 8)
    for seconds, largest in ((100.0, tile), (8.0, TileSize(16, 16, 8)), (1.0, TileSize(16, 16, 1))):
        ran.clear()
        found = tile_seconds(run, volume, tile, 8, seconds)
        assert ran[-1] == found.measured == largest and sum(run(largest).values()) <= max(seconds, 0.8)
        assert found.of("plain") == pytest.approx(8.192) and found.of("tap") == pytest.approx(16.384)
        assert found.of("sap") == found.of("plain")


def test_several_tiles_in_a_call_may_take_less_each() -> None:
    """The job's own way of taking tiles has the last word, if it is the faster; a stall there says nothing."""

    def alone(tile: TileSize) -> dict[Kind, float]:
        return {"plain": 3.0}

    for each, expected in ((2.0, 2.0), (9.0, 3.0)):
        tile = TileSize(16, 16, 8)
        found = tile_seconds(alone, volume, tile, 8, 100.0, lambda _, each=each: {"plain": each})
        assert found.measured == tile and found.of("plain") == expected


def test_bytes_for_a_person() -> None:
    assert (readable(0), readable(2**20), readable(3 * 2**29)) == ("0.0 MiB", "1.0 MiB", "1.50 GiB")


def test_calls_are_as_many_as_the_plan_has_tiles() -> None:
    made: list[Call] = list(calls(PLAN, Step(0), COND, 1, synchronous=False))
    assert len(made) == PLAN.tiles
