"""ControlNets in a tiled run of the host's Stable Diffusion: cut along with their tiles; the pack's own per tile."""

from __future__ import annotations

import copy
import importlib
import logging
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.tensors import randn, relative

from .conftest import NAME
from .small_sd import (
    ALONE,
    CONTROL_CONFIG,
    SHAPE,
    Features,
    apply_control,
    by_hand,
    cut_by_hand,
    fill,
    one_step,
    own_control,
    plan_of,
    real_control,
    video,
    wire,
)
from .wiring import custom_sampled, dssag, host_pag, no_memory, sampled, tiled, wrapped

# --- ControlNets ------------------------------------------------------------------------------------------------------


def features(frames: int, height: int = SHAPE[2], width: int = SHAPE[3], seed: int = 4) -> Features:
    """What a ControlNet of the small UNets answers: one for each skip, and the middle's."""
    shapes = [(32, 1), (32, 1), (32, 2), (64, 2)]
    skips = [randn(frames, c, -(-height // k), -(-width // k), seed=seed + i) for i, (c, k) in enumerate(shapes)]
    return {
        "input": [],
        "middle": [randn(frames, 64, -(-height // 2), -(-width // 2), seed=seed + 9)],
        "output": skips,
    }


def fixed(answer: Features) -> Any:
    """A ControlNet that answers the same whatever it is asked, whole frames for each branch of the batch."""
    base = importlib.import_module("comfy.controlnet").ControlBase

    class Fixed(base):  # type: ignore[misc, valid-type]
        def get_control(self, x: Tensor, t: Tensor, cond: Any, branches: int, options: Any) -> Any:
            def each(value: Tensor) -> Tensor:
                return value.clone() if value.shape[0] == 1 else value.repeat(branches, 1, 1, 1)

            return self.control_merge(
                {stage: [each(v) for v in values] for stage, values in answer.items()}, None, None
            )

        def copy(self) -> Any:
            made = Fixed()
            self.copy_to(made)
            return made

    return Fixed()


def controlled(answer: Features, shape: tuple[int, ...] = SHAPE) -> Any:
    return wire(shape, control=fixed(answer))


def test_control_in_one_tile_is_the_hosts(
    host: ModuleType, nodes: dict[str, Any], sd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wired = apply_control(real_control(sd, zero=False), wire(ALONE))
    one = tiled(nodes, sd, "sap+tap")
    expected = sampled(host, sd, wired, 1.0)
    assert relative(expected, sampled(host, sd, wire(ALONE), 1.0)) > 1e-3
    assert torch.equal(sampled(host, one, wired, 1.0), expected)
    no_memory(monkeypatch)
    assert torch.equal(sampled(host, one, wired), sampled(host, sd, wired))


def test_control_without_tiles_goes_through_whole(host: ModuleType, nodes: dict[str, Any], sd21: Any) -> None:
    """To every branch that another guidance of the pack evaluates, however the host's own would."""
    positive, negative, latent = apply_control(real_control(sd21, zero=False), wire())
    made = nodes["VSRPAGGuider"].execute(sd21, positive, 2.0, 100.0, "middle", negative=negative).args[0]
    found = custom_sampled(sd21, made, latent)
    assert relative(found, sampled(host, host_pag(sd21), (positive, negative, latent))) < 1e-5


@pytest.mark.parametrize("mode", ["lagged", "synchronous"])
def test_a_control_of_nothing_changes_nothing(host: ModuleType, nodes: dict[str, Any], sd21: Any, mode: str) -> None:
    model = dssag(nodes, tiled(nodes, sd21, mode=mode))
    expected = sampled(host, model, wire())
    assert torch.equal(sampled(host, model, apply_control(real_control(sd21, zero=True), wire())), expected)
    nothing: Features = {stage: [v * 0 for v in values] for stage, values in features(SHAPE[0]).items()}
    assert torch.equal(sampled(host, model, controlled(nothing)), expected)


@pytest.mark.parametrize("frames", [SHAPE[0], 1])
def test_control_is_cut_with_its_tile(host: ModuleType, nodes: dict[str, Any], sd: Any, frames: int) -> None:
    wired = controlled(features(frames))
    x, sigma, found = one_step(host, tiled(nodes, sd, "none"), wired)
    expected = by_hand(sd, x, sigma, wired[0][0][0], features(frames))
    assert relative(found, expected) < 1e-6
    assert relative(found, by_hand(sd, x, sigma, wired[0][0][0])) > 1e-3


@pytest.mark.parametrize(("mode", "batch"), [("lagged", 1), ("lagged", 2), ("synchronous", 1)])
def test_the_unet_gets_what_is_cut_by_hand(
    host: ModuleType, nodes: dict[str, Any], sd21: Any, mode: str, batch: int
) -> None:
    """Of two branches, in the order of the calls: windows in turn, in each its tiles."""
    seen: list[tuple[int, Features]] = []

    def note(executor: Any, x: Tensor, t: Tensor, context: Any, y: Any, control: Any, *rest: Any, **more: Any) -> Any:
        seen.append((x.shape[0], copy.deepcopy(control)))
        return executor(x, t, context, y, control, *rest, **more)

    answer, plan = features(SHAPE[0]), plan_of(SHAPE)
    sampled(host, wrapped(tiled(nodes, sd21, "sap", mode, batch), "diffusion_model", note), controlled(answer), steps=1)
    tiles = [
        [cut_by_hand(answer, window.span.slice, row.slice, col.slice) for row, col in plan.spatial]
        for window in plan.windows
    ]
    together = len(plan.spatial) if mode == "synchronous" else batch
    expected: list[Features] = []
    for window in tiles:
        for first in range(0, len(window), together):
            group = window[first : first + together]
            expected.append(
                {
                    stage: [torch.cat(parts) for parts in zip(*(t[stage] for t in group), strict=True)]
                    for stage in answer
                }
            )
    assert len(seen) == 2 * len(expected)
    for (count, found), wanted in zip(seen, expected * 2, strict=True):
        assert {stage: len(values) for stage, values in found.items()} == {"input": 0, "middle": 1, "output": 4}
        for stage, values in wanted.items():
            for ours, theirs in zip(found[stage], values, strict=True):
                assert ours.shape[0] == count and torch.equal(ours, theirs)


def test_control_with_guidance_and_branches_apart(
    host: ModuleType, nodes: dict[str, Any], sd21: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wired = apply_control(real_control(sd21, zero=False), wire())
    model = dssag(nodes, tiled(nodes, sd21, batch=2))
    together = sampled(host, model, wired)
    no_memory(monkeypatch)
    assert relative(sampled(host, model, wired), together) < 1e-5
    assert relative(together, sampled(host, model, wire())) > 1e-3


def test_features_between_cells_are_interpolated(
    host: ModuleType, nodes: dict[str, Any], sd21: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A ramp stays one: a tile that starts at latent 5 finds 2.5 in its first cell of 2 latents. It is told of once."""
    inputs = importlib.import_module(f"{NAME}.nodes.session.inputs")
    names = ("calls", "guidance", "schedule")
    calls, guidance, schedule = (importlib.import_module(f"{NAME}.vsr_ops.sampling.{name}") for name in names)
    plan = plan_of((4, 4, 21, 16))
    assert [span.start for span in plan.rows] == [0, 5]
    ramp = torch.arange(11.0).view(1, 1, 11, 1).expand(4, 1, 11, 8)
    call = calls.Call(schedule.Step(0), guidance.COND, 0, (1,), 4, 16, 16)
    found = inputs.cut_features(plan, call, ramp)
    assert found.shape == (4, 1, 8, 8)
    assert torch.equal(found[0, 0, :, 0], torch.arange(8.0) + 2.5)
    uneven = (4, 4, 21, 16)
    with caplog.at_level(logging.WARNING):
        out = sampled(host, tiled(nodes, sd21), controlled(features(4, *uneven[2:]), uneven))
    assert torch.isfinite(out).all()
    assert sum("interpolated" in record.getMessage() for record in caplog.records) == 1


def test_features_of_another_size(host: ModuleType, nodes: dict[str, Any], sd21: Any) -> None:
    model = tiled(nodes, sd21)
    with pytest.raises(ValueError, match="ControlNet gave features of 5x8 for 24x16 latents: expected"):
        sampled(host, model, controlled(features(SHAPE[0], 9, 16)))
    with pytest.raises(ValueError, match="ControlNet gave features of 3 frames for 6: expected one for each"):
        sampled(host, model, controlled(features(3)), 1.0)


# --- The pack's own control -------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def control(nodes: dict[str, Any]) -> Any:
    """The pack's, of the small SD 2.1, with random weights."""
    made = importlib.import_module(f"{NAME}.vsr_ops.modules.control").Control(CONTROL_CONFIG).requires_grad_(False)
    fill(made, 7)
    return made


def test_our_control_in_one_tile_is_that_without_tiles(
    host: ModuleType, nodes: dict[str, Any], lite: Any, sd21: Any, control: Any
) -> None:
    wired = apply_control(own_control(control), wire(ALONE), vae=lite[1])
    expected = sampled(host, sd21, wired, 1.0)
    assert torch.equal(sampled(host, tiled(nodes, sd21), wired, 1.0), expected)
    assert relative(expected, sampled(host, sd21, wire(ALONE), 1.0)) > 1e-3


@pytest.mark.parametrize(("mode", "batch"), [("lagged", 1), ("synchronous", 1)])
def test_our_control_sees_its_tile(
    host: ModuleType, nodes: dict[str, Any], lite: Any, sd21: Any, control: Any, mode: str, batch: int
) -> None:
    """What a call gets is the control on what that call's UNet gets, and on the hint's latents of the same place."""
    frames = video().movedim(-1, 1)
    hint = torch.stack(list(host.encoded(lite[1], frames, *SHAPE[2:]))) * 0.18215
    plan = plan_of(SHAPE)
    together = len(plan.spatial) if mode == "synchronous" else batch
    places = [
        (window.span.slice, plan.spatial[first : first + together])
        for window in plan.windows
        for first in range(0, len(plan.spatial), together)
    ]
    seen: list[int] = []

    def check(executor: Any, x: Tensor, t: Tensor, context: Tensor, y: Any, found: Any, *rest: Any, **more: Any) -> Any:
        of, tiles = places[len(seen) % len(places)]
        own = torch.cat([hint[of, :, row.slice, col.slice] for row, col in tiles])
        skips, middle = control(x, t, context, own)
        assert found["input"] == []
        for ours, theirs in zip((*found["output"], *found["middle"]), (*skips, middle), strict=True):
            assert relative(ours, 0.5 * theirs) < 1e-5
        seen.append(x.shape[0])
        return executor(x, t, context, y, found, *rest, **more)

    model = wrapped(tiled(nodes, sd21, "sap", mode, batch), "diffusion_model", check)
    sampled(host, model, apply_control(own_control(control), wire(), 0.5, lite[1]), steps=1)
    assert len(seen) == 2 * len(places)


def test_controls_in_a_chain_of_either_order(
    host: ModuleType, nodes: dict[str, Any], lite: Any, sd21: Any, control: Any
) -> None:
    model, theirs, small = tiled(nodes, sd21), real_control(sd21, zero=False), (2, *SHAPE[1:])

    def ours(wired: Any) -> Any:
        return apply_control(own_control(control), wired, vae=lite[1])

    found = sampled(host, model, ours(apply_control(theirs, wire(small))), 1.0, 1)
    assert relative(sampled(host, model, apply_control(theirs, ours(wire(small))), 1.0, 1), found) < 1e-5
    for alone in (ours(wire(small)), apply_control(theirs, wire(small))):
        assert relative(sampled(host, model, alone, 1.0, 1), found) > 1e-3
