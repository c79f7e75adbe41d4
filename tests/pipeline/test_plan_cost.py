"""What a plan costs, against what a run really holds."""

from __future__ import annotations

import pytest
import torch

from vsr_ops.pipeline.plan_cost import Bank, describe_plan, lagged_bytes, tap_bytes
from vsr_ops.sampling.calls import Call, calls
from vsr_ops.sampling.guidance import COND
from vsr_ops.sampling.layers import Layer
from vsr_ops.sampling.layouts import TileLayout
from vsr_ops.sampling.propagation import Propagation, TileRun
from vsr_ops.sampling.schedule import Step
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
    text = describe_plan(
        TileLayout.still(PLAN),
        Propagation(sap_lagged=True),
        5,
        2,
        lagged=0,
        tap=2048,
        weights=2**30,
        activations=1,
        flops=1e9,
        speed=1e9,
    )
    expected = 5 * 2 * len(PLAN.spatial) * len(PLAN.windows)
    assert f"{expected} tile passes" in text and "SAP lagged" in text and "1.00 GiB" in text
    assert f"{expected / 0.45 / 60:.1f} minutes" in text


def test_bytes_for_a_person() -> None:
    assert (readable(0), readable(2**20), readable(3 * 2**29)) == ("0.0 MiB", "1.0 MiB", "1.50 GiB")


def test_calls_are_as_many_as_the_plan_has_tiles() -> None:
    made: list[Call] = list(calls(PLAN, Step(0), COND, 1, synchronous=False))
    assert len(made) == PLAN.tiles
