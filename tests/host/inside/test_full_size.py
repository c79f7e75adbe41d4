"""`python -m benchmarks.full_size --part host`: a small SVD of the host's own, through the same code."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from .conftest import NAME


@pytest.fixture(scope="module")
def through_host(host: ModuleType) -> ModuleType:
    return pytest.importorskip("benchmarks.full_size.through_host")


def test_a_step_goes_through_the_host(through_host: ModuleType, nodes: dict[str, Any]) -> None:
    from benchmarks.full_size.build import CONFIGS
    from benchmarks.full_size.measure import Limits, small_plan
    from benchmarks.full_size.report import Line

    tiny = CONFIGS["tiny"]
    pack = through_host.loaded(sys.modules[NAME], "this one")
    assert set(pack.nodes) == set(nodes)
    model, plan = through_host.random_svd(pack, tiny.svd), small_plan(tiny.tile)
    headless = [Line("SVD, float32: plain tiles", seconds="2.0")]
    for calls in (1, None):
        lines = through_host.host_lines(pack, model, plan, ("plain", "dssag8"), Limits(calls=calls), "SVD", headless)
        assert [line.passes for line in lines] == ["1", "2"] and not any(line.failed for line in lines)
        assert [bool(line.ratio) for line in lines] == [True, False]
        assert "ComfyUI this one" in lines[0].what


@pytest.mark.parametrize("name", ["cfg", "dssag9", "pag", "sag", "sap-sync", "sap-lagged", "tap"])
def test_every_row_can(through_host: ModuleType, nodes: dict[str, Any], name: str) -> None:
    from benchmarks.full_size.build import CONFIGS
    from benchmarks.full_size.measure import Limits, small_plan
    from benchmarks.full_size.rows import ROWS

    tiny = CONFIGS["tiny"]
    pack = through_host.loaded(sys.modules[NAME], "this one")
    model, plan = through_host.random_svd(pack, tiny.svd), small_plan(tiny.tile)
    taken = through_host.host_step(pack, model, plan, ROWS[name], Limits(), None)
    assert taken.seconds > 0


def test_nan_is_a_failure(through_host: ModuleType, nodes: dict[str, Any]) -> None:
    from benchmarks.full_size.build import CONFIGS
    from benchmarks.full_size.measure import Limits, small_plan
    from benchmarks.full_size.rows import ROWS

    tiny = CONFIGS["tiny"]
    pack = through_host.loaded(sys.modules[NAME], "this one")
    model, plan = through_host.random_svd(pack, tiny.svd), small_plan(tiny.tile)
    with torch.no_grad():
        model.model.diffusion_model.out[2].bias.fill_(float("nan"))
    with pytest.raises(Exception, match="NaN"):
        through_host.host_step(pack, model, plan, ROWS["plain"], Limits(), None)
