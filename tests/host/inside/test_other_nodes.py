"""The pack's patches beside core's nodes that compile the UNet, change its attention, or spread it over devices."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.tensors import relative

from .conftest import part
from .wiring import dssag, refused, sampled, tiled, wrapped


@pytest.fixture(scope="session")
def wide(wired: Any) -> Any:
    """Two tiles in two windows."""
    return part(wired, 6, 24, 16)


def core(module: str, name: str, *values: Any) -> Any:
    """What a node of core gives, of either kind."""
    node = getattr(importlib.import_module(f"comfy_extras.{module}"), name)
    if hasattr(node, "define_schema"):
        return node.execute(*values)[0]
    return getattr(node(), node.FUNCTION)(*values)[0]


def tome(model: Any, ratio: float = 0.5) -> Any:
    """Token merging, which acts on layers of as many tokens as the tile has latents; its draws alike in every call."""

    def seeded_call(executor: Any, *args: Any, **rest: Any) -> Tensor:
        torch.manual_seed(0)
        return executor(*args, **rest)

    return wrapped(core("nodes_tomesd", "TomePatchModel", model, ratio), "diffusion_model", seeded_call)


def hypertile(model: Any) -> Any:
    """Windows of 8 latents, of which a tile of 16 has four."""
    return core("nodes_hypertile", "HyperTile", model, 64, 1, 0, False)


def compiled(model: Any) -> Any:
    """What Torch Compile does to a MODEL, without the minutes of its backend."""
    m = model.clone()
    # Newer hosts have no guard on what is in a call's options.
    skip = getattr(importlib.import_module("comfy_extras.nodes_torch_compile"), "skip_torch_compile_dict", None)
    options = None if skip is None else {"guard_filter_fn": skip}
    importlib.import_module("comfy_api.torch_helpers").set_torch_compile_wrapper(
        model=m, backend="eager", options=options
    )
    return m


Change = Callable[[Any], Any]


def test_tome_acts_here(host: ModuleType, lite: Any, wired: Any) -> None:
    """Or the tests below would say nothing."""
    alone = part(wired, 4, 16, 16)
    assert relative(sampled(host, tome(lite[0]), alone), sampled(host, lite[0], alone)) > 1e-2


@pytest.mark.parametrize("propagation", ["sap", "tap"])
@pytest.mark.parametrize("first", [True, False], ids=["ToMe first", "ToMe last"])
def test_propagation_acts_on_merged_tokens(
    host: ModuleType, nodes: dict[str, Any], lite: Any, wide: Any, propagation: str, first: bool
) -> None:
    def both(kind: str) -> Tensor:
        model = tiled(nodes, tome(lite[0]), kind) if first else tome(tiled(nodes, lite[0], kind))
        return sampled(host, model, wide, 1.0, 3)

    assert relative(both(propagation), both("none")) > 1e-3


def test_guidance_acts_on_merged_tokens(host: ModuleType, nodes: dict[str, Any], lite: Any, wired: Any) -> None:
    """DSSAG and SAG; PAG's tokens, which see themselves alone, cannot be fewer."""
    alone = part(wired, 4, 16, 16)
    merged, plain = tome(lite[0]), sampled(host, tome(lite[0]), alone, 1.0)
    assert relative(sampled(host, dssag(nodes, merged), alone, 1.0), plain) > 1e-3
    assert relative(sampled(host, host.patch_perturbed(merged, "sag", 1.0, "middle"), alone, 1.0), plain) > 1e-4
    for layers in ("all", "ends"):
        with refused("TomePatchModel", "queries", "take that node off", "PAG"):
            sampled(host, host.patch_perturbed(merged, "pag", 1.0, layers), alone, 1.0)


def test_tome_that_merges_nothing_changes_nothing(
    host: ModuleType, nodes: dict[str, Any], lite: Any, wide: Any
) -> None:
    model = dssag(nodes, tiled(nodes, lite[0]))
    assert torch.equal(sampled(host, tome(model, 0.0), wide, 1.0), sampled(host, model, wide, 1.0))


@pytest.mark.parametrize(
    "ours",
    [
        lambda nodes, model: tiled(nodes, model, "sap"),
        lambda nodes, model: tiled(nodes, model, "tap"),
        lambda nodes, model: dssag(nodes, tiled(nodes, model, "none")),
    ],
    ids=["SAP", "TAP", "DSSAG"],
)
def test_hypertile_is_refused_where_it_acts(
    host: ModuleType, nodes: dict[str, Any], lite: Any, wide: Any, ours: Callable[..., Any]
) -> None:
    for model in (hypertile(ours(nodes, lite[0])), ours(nodes, hypertile(lite[0]))):
        with refused("HyperTile", "queries", "take that node off"):
            sampled(host, model, wide, 1.0)


def test_hypertile_stays_where_nothing_of_ours_acts(
    host: ModuleType, nodes: dict[str, Any], lite: Any, wired: Any
) -> None:
    """Tiles alone change no attention."""
    alone = part(wired, 4, 16, 16)
    found = sampled(host, hypertile(tiled(nodes, lite[0], "none")), alone, 1.0)
    assert torch.equal(found, sampled(host, hypertile(lite[0]), alone, 1.0))


@pytest.mark.parametrize("first", [True, False], ids=["compiled first", "compiled last"])
def test_torch_compile_changes_nothing_and_says_so(
    host: ModuleType, nodes: dict[str, Any], lite: Any, wide: Any, caplog: pytest.LogCaptureFixture, first: bool
) -> None:
    """Compiled, the first call's attention would serve all others, and nothing would tell."""

    def ours(model: Any) -> Any:
        return dssag(nodes, tiled(nodes, model))

    expected = sampled(host, ours(lite[0]), wide, 1.0, 3)
    assert "Torch Compile" not in caplog.text
    counters = importlib.import_module("torch._dynamo.utils").counters
    counters.clear()
    with caplog.at_level(logging.WARNING):
        found = sampled(host, ours(compiled(lite[0])) if first else compiled(ours(lite[0])), wide, 1.0, 3)
    assert torch.equal(found, expected)
    assert caplog.text.count("Torch Compile is without effect here") == 1
    assert counters["frames"]["total"] == 0


def test_several_gpus_are_refused(host: ModuleType, nodes: dict[str, Any], lite: Any, wide: Any) -> None:
    """As MultiGPU CFG Split leaves a MODEL: with clones for other devices, of which there are none here."""
    for ours in (tiled(nodes, lite[0]), dssag(nodes, lite[0])):
        spread = ours.clone()
        spread.set_additional_models("multigpu", [lite[0].clone()])
        with refused("several GPUs", "MultiGPU CFG Split", "take that node off"):
            sampled(host, spread, wide, 1.0)
        marked = ours.clone()
        marked.model_options["multigpu_clones"] = {torch.device("cpu"): lite[0]}
        with refused("several GPUs", "take that node off"):
            sampled(host, marked, wide, 1.0)


def test_the_host_can_make_the_lite_model_again(nodes: dict[str, Any], lite: Any) -> None:
    """It does so for another device, and without dynamic VRAM for torch.compile: the same weights, of its own."""
    for which in ("svd_lite", "sd_lite"):
        model = nodes["VSRLoadLite"].execute(which).args[0]
        make, values = model.cached_patcher_init
        again = make(*values, disable_dynamic=True)
        assert again.get_attachment("vsr_tile") == model.get_attachment("vsr_tile")
        mine, other = (m.model.diffusion_model.state_dict() for m in (model, again))
        assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)
        assert again.model is not model.model
