"""A guidance's interval in graphs: whole it is nothing new, outside it the host evaluates one branch."""

from __future__ import annotations

import logging
from collections import Counter
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.tensors import relative

from .conftest import part
from .test_defaults import small, upscaled_video
from .test_hooks import rescale_cfg
from .wiring import custom_sampled, ksampled, refused, sampled, wrapped

STEPS = 4
#: Of the noise levels 700, 71, 2.3 and 0.002: the second and the third.
MIDDLE = (0.1, 100.0)
#: Guiders: node, its own settings, whether with CFG, passes a step. PAG does next to nothing to these weights.
GUIDERS = {
    "DSSAG": ("VSRDSSAGGuider", (1.0, 0.5, "ends"), False, 2),
    "DSSAG + CFG": ("VSRDSSAGGuider", (1.0, 0.5, "ends"), True, 2),
    "PAG + CFG": ("VSRPAGGuider", (2.0, 100.0, "middle"), True, 3),
    "SAG + CFG": ("VSRSAGGuider", (2.0, 0.5), True, 3),
}


@pytest.fixture(scope="session")
def alone(wired: Any) -> Any:
    """One tile."""
    return part(wired, 2, 16, 16)


def guided(nodes: dict[str, Any], model: Any, wired: Any, name: str, *interval: float) -> Any:
    node, own, cfg, _ = GUIDERS[name]
    given: dict[str, Any] = dict(zip(("sigma_min", "sigma_max", "every"), interval, strict=False))
    if cfg:
        given["negative"] = wired[1]
    return nodes[node].execute(model, wired[0], *own, **given).args[0]


def run(host: ModuleType, guider: Any, wired: Any, sampler: str = "euler") -> Tensor:
    return host.sample(guider, wired[2], 5, STEPS, sampler, "karras", 1.0)["samples"]


def counted(model: Any, asked: list[float]) -> Any:
    """A MODEL that notes the noise level of every branch that is asked for."""

    def count(executor: Any, x: Tensor, t: Tensor, *args: Any, **rest: Any) -> Tensor:
        asked.extend([round(float(t.max()), 3)] * (x.shape[0] // 2))
        return executor(x, t, *args, **rest)

    return wrapped(model, "apply_model", count)


@pytest.mark.parametrize("name", GUIDERS)
def test_whole_it_is_what_it_was_and_outside_one_pass(
    host: ModuleType, nodes: dict[str, Any], lite: Any, alone: Any, name: str
) -> None:
    asked: list[float] = []
    model, full = counted(lite[0], asked), GUIDERS[name][3]
    expected = run(host, guided(nodes, model, alone, name), alone)
    levels = sorted(set(asked), reverse=True)
    every = [asked.count(level) for level in levels]
    # DSSAG without CFG adds nothing at its last level, where gamma is 0.
    assert every == [full, full, full, 1 if name == "DSSAG" else full]
    assert torch.equal(run(host, guided(nodes, model, alone, name, 0.001, 9999.0, 1), alone), expected)
    for interval, passes in (((*MIDDLE, 3), [1, full, full, 1]), ((0.1, 800.0, 4), [full, 1, 1, 1])):
        asked.clear()
        found = run(host, guided(nodes, model, alone, name, *interval), alone)
        assert [asked.count(level) for level in levels] == passes, interval
        assert relative(found, expected) > 1e-5


def test_the_patch_for_ksampler_is_the_guider(host: ModuleType, nodes: dict[str, Any], lite: Any, alone: Any) -> None:
    interval = (0.001, 800.0, 2)
    patched = nodes["VSRDSSAG"].execute(lite[0], 1.0, 0.5, "ends", *interval).args[0]
    for name, cfg in (("DSSAG", 1.0), ("DSSAG + CFG", 2.0)):
        guider = guided(nodes, lite[0], alone, name, *interval)
        assert torch.equal(custom_sampled(lite[0], guider, alone[2]), ksampled(patched, alone, cfg))


@pytest.mark.parametrize("name", ["DSSAG", "PAG + CFG"])
def test_where_no_level_lies_in_it_nothing_is_guided_and_the_log_says_so(
    host: ModuleType, nodes: dict[str, Any], lite: Any, alone: Any, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    plain = sampled(host, lite[0], alone, 1.0, STEPS)
    with caplog.at_level(logging.WARNING):
        # Another pack's CFG finds nothing to rescale.
        found = run(host, guided(nodes, rescale_cfg(lite[0]), alone, name, 0.01, 0.02), alone)
    assert relative(found, plain) < 1e-5
    assert "acts at none of this run's noise levels, 700 to 0.002: its interval is 0.01 to 0.02" in caplog.text


@pytest.mark.parametrize(("sampler", "passes"), [("heun", [2, 4, 2, 2]), ("dpm_2", [2, 2, 1, 1])])
def test_samplers_that_ask_twice_a_step_keep_too(
    host: ModuleType, nodes: dict[str, Any], lite: Any, alone: Any, sampler: str, passes: list[int]
) -> None:
    """Heun asks at the next step's level again, which belongs to that step, the third, where what is kept is added;
    DPM2 asks between two levels, which belongs to the step above."""
    asked: list[float] = []
    guider = guided(nodes, counted(lite[0], asked), alone, "DSSAG", 0.0, 9999.0, 2)
    assert bool(torch.isfinite(run(host, guider, alone, sampler)).all())
    levels = [700.0, 70.541, 2.269, 0.002]
    assert [asked.count(level) for level in levels] == passes
    between = Counter(level for level in asked if level not in levels)
    assert list(between.values()) == ([] if sampler == "heun" else [2, 2, 1])


def test_ends_that_cannot_be_are_refused(nodes: dict[str, Any], lite: Any) -> None:
    with refused("interval is 5 to 1", "lower one below"):
        nodes["VSRDSSAG"].execute(lite[0], 1.0, 0.5, "ends", 5.0, 1.0, 1)


@pytest.mark.parametrize(
    ("guidance", "cfg", "full"),
    [("dssag", 1.0, 2), ("dssag", 2.0, 2), ("cfg", 2.0, 2), ("pag", 2.0, 3), ("sag", 1.0, 2)],
)
def test_the_one_node_has_it_too(nodes: dict[str, Any], lite: Any, guidance: str, cfg: float, full: int) -> None:
    """For every guidance, CFG alone among them: its passes at the second of four levels, kept at the third, and none at
    the ends, where without an interval it would be due."""
    asked: list[float] = []
    given = {"steps": STEPS, "guidance": guidance, "cfg": cfg, "guidance_scale": 0.5, "upscaler": "bicubic"}
    interval = {"sigma_min": MIDDLE[0], "sigma_max": MIDDLE[1], "every": 2}
    upscaled_video(nodes, (counted(lite[0], asked), lite[1]), small(), **given, **interval)
    assert [asked.count(level) for level in sorted(set(asked), reverse=True)] == [1, full, 1, 1]


def test_the_one_node_refuses_an_interval_of_nothing(nodes: dict[str, Any], lite: Any) -> None:
    """Lite's own guidance is none."""
    with refused("interval of guidance is given", "guidance is none"):
        upscaled_video(nodes, lite, small(), every=2)
