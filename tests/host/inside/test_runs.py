"""A run and the next: nothing outlives one, two do not meet, and one goes on where memory ran out."""

from __future__ import annotations

import gc
import importlib
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.tensors import relative

from .conftest import NAME, part
from .wiring import TILE, dssag, sampled, tiled, wrapped


def live_runs() -> int:
    """Runs' memory that something still holds."""
    gc.collect()
    names = ("Run", "TileRun")
    return sum(type(o).__name__ in names and type(o).__module__.startswith(NAME) for o in gc.get_objects())


@pytest.fixture(scope="session")
def wide(wired: Any) -> Any:
    """Two tiles in two windows."""
    return part(wired, 6, 24, 16)


def after(calls: int, act: Callable[[], None], seen: list[int]) -> Callable[..., Tensor]:
    """A UNet wrapper that notes every call, and acts in one of them."""

    def wrapper(executor: Any, x: Tensor, *args: Any, **rest: Any) -> Tensor:
        seen.append(x.shape[0])
        if len(seen) == calls:
            act()
        return executor(x, *args, **rest)

    return wrapper


def test_runs_leave_nothing_behind(host: ModuleType, nodes: dict[str, Any], lite: Any, wide: Any) -> None:
    """Finished, interrupted in the middle of a step, and out of memory: the next run of the cached MODEL is the same,
    and an interrupt is heard before the next UNet call."""
    management = importlib.import_module("comfy.model_management")
    seen: list[int] = []

    def interrupt() -> None:
        assert live_runs() > 1
        management.interrupt_current_processing(True)

    def overflow() -> None:
        raise torch.cuda.OutOfMemoryError("a test's")

    cached = dssag(nodes, tiled(nodes, lite[0], "sap"))
    expected = sampled(host, cached, wide)
    assert live_runs() == 0
    for act, error in (
        (interrupt, management.InterruptProcessingException),
        (overflow, torch.cuda.OutOfMemoryError),
    ):
        seen.clear()
        try:
            sampled(host, wrapped(cached, "diffusion_model", after(11, act, seen)), wide)
        except BaseException as raised:
            found: type[BaseException] | None = type(raised)
        else:
            found = None
        assert found is error
        assert len(seen) == 11
        assert live_runs() == 0
        assert not management.processing_interrupted()
        assert torch.equal(sampled(host, cached, wide), expected)


def test_two_branches_of_one_model_do_not_meet(host: ModuleType, nodes: dict[str, Any], lite: Any, wide: Any) -> None:
    """A run inside another's step, on the same cached MODEL."""
    cached = tiled(nodes, lite[0], "sap")
    expected = sampled(host, cached, wide)
    inner: list[Tensor] = []

    def nested(executor: Any, x: Tensor, *args: Any, **rest: Any) -> Tensor:
        if len(seen) == 11 and not inner:
            inner.append(sampled(host, cached, wide))
        seen.append(1)
        return executor(x, *args, **rest)

    seen: list[int] = []
    outer = sampled(host, wrapped(cached, "predict_noise", nested), wide)
    assert torch.equal(outer, expected)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("lagged", "OutOfMemoryError"), ("synchronous", "OutOfMemoryError"), ("synchronous", "AcceleratorError")],
)
def test_out_of_memory_halves_the_batch(
    host: ModuleType,
    nodes: dict[str, Any],
    lite: Any,
    wired: Any,
    caplog: pytest.LogCaptureFixture,
    mode: str,
    kind: str,
) -> None:
    """Said at the allocation, or later by the accelerator, which newer torch has a class for."""
    sizes: list[int] = []
    if not hasattr(torch, kind):
        pytest.skip(f"this torch has no {kind}")

    def small(executor: Any, x: Tensor, *args: Any, **rest: Any) -> Tensor:
        sizes.append(x.shape[0])
        if x.shape[0] > TILE[2]:
            raise getattr(torch, kind)("CUDA error: out of memory, a test's")
        return executor(x, *args, **rest)

    four = part(wired, 4, 24, 24)
    expected = sampled(host, tiled(nodes, lite[0]), four)
    with caplog.at_level(logging.WARNING):
        found = sampled(host, wrapped(tiled(nodes, lite[0], mode=mode, batch=4), "diffusion_model", small), four)
    assert relative(found, expected) < 1e-5
    assert max(sizes) == 4 * TILE[2]
    assert "Out of memory with 4 tiles at once: going on with 2" in caplog.text


@pytest.mark.parametrize("at", [1, 2])
def test_split_sigmas_are_one_run_in_two(nodes: dict[str, Any], lite: Any, wired: Any, at: int) -> None:
    """SAP and TAP take turns, and DSSAG's gamma falls, from where the first part stopped."""
    custom = importlib.import_module("comfy_extras.nodes_custom_sampler")
    model = tiled(nodes, lite[0], mode="synchronous")
    small = part(wired, 4, 16, 24)
    guider = nodes["VSRDSSAGGuider"].execute(model, small[0], 1.0, 0.5, "ends").args[0]
    sigmas = custom.BasicScheduler().get_sigmas(model, "karras", 5, 1.0)[0]
    sampler = custom.KSamplerSelect().get_sampler("euler")[0]

    def run(noise: Any, sigmas: Tensor, latent: Any) -> Any:
        return custom.SamplerCustomAdvanced().sample(noise, guider, sampler, sigmas, latent)[0]

    noise, none = custom.RandomNoise().get_noise(1)[0], custom.DisableNoise().get_noise()[0]
    whole = run(noise, sigmas, small[2])["samples"]
    high, low = custom.SplitSigmas().get_sigmas(sigmas, at)
    both = run(none, low, run(noise, high, small[2]))["samples"]
    assert relative(both, whole) < 1e-4
