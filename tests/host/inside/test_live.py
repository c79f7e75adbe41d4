"""Tiles that are done show in the host, before their step is."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from .conftest import NAME, part
from .wiring import STEPS, dssag, sampled, tiled

Seen = list[tuple[float, float, Any]]


@pytest.fixture(scope="module")
def wide(wired: Any) -> Any:
    """Two tiles in two windows."""
    return part(wired, 6, 24, 16)


@pytest.fixture
def seen(host: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    """What the host hears of progress: how far of how much, and the picture. Its previews are on."""
    utils, previews = importlib.import_module("comfy.utils"), importlib.import_module("latent_preview")
    monkeypatch.setattr(previews.args, "preview_method", previews.LatentPreviewMethod.Latent2RGB)
    found: Seen = []

    def hook(value: float, total: float, preview: Any, node_id: Any = None) -> None:
        found.append((value, total, preview))

    before = utils.PROGRESS_BAR_HOOK
    utils.set_progress_bar_global_hook(hook)
    yield found
    utils.set_progress_bar_global_hook(before)


@pytest.mark.parametrize(("propagation", "guided"), [("sap+tap", False), ("tap", True)])
def test_tiles_are_shown_as_they_are_done(
    host: ModuleType,
    nodes: dict[str, Any],
    lite: Any,
    wide: Any,
    seen: Seen,
    monkeypatch: pytest.MonkeyPatch,
    propagation: str,
    guided: bool,
) -> None:
    """With no time between two reports every call is one; the latents are the same as without."""
    model = tiled(nodes, lite[0], propagation)
    model = dssag(nodes, model) if guided else model
    live = importlib.import_module(f"{NAME}.nodes.host.live")
    monkeypatch.setattr(live, "INTERVAL", 1e9)
    expected = sampled(host, model, wide, 1.0)
    assert [value for value, _, _ in seen] == [1, 2]
    seen.clear()
    monkeypatch.setattr(live, "INTERVAL", 0.0)
    assert torch.equal(sampled(host, model, wide, 1.0), expected)
    values = [value for value, _, _ in seen]
    assert values == sorted(values) and {total for _, total, _ in seen} == {STEPS}
    # The second step of DSSAG has gamma 0, and so one pass.
    passes = 3 if guided else 2
    assert len(seen) == STEPS + 4 * passes
    assert values[:4] == [(n + 1) / 4 / (2 if guided else 1) for n in range(4)] and values[-1] == STEPS
    pictures = [preview[1] for _, _, preview in seen]
    assert {picture.size for picture in pictures} == {(16, 24)}
    # The first tile alone has shown a part of the frame; all of them, all of it.
    assert pictures[0].getpixel((8, 22)) != pictures[-1].getpixel((8, 22))
    assert pictures[0].getpixel((8, 22)) == (127, 127, 127)


def test_reports_keep_their_distance(host: ModuleType, nodes: dict[str, Any], lite: Any, wide: Any, seen: Seen) -> None:
    """By a clock that a test holds: ten tiles in five seconds are five reports."""
    live_module = importlib.import_module(f"{NAME}.nodes.host.live")
    names = ("calls", "guidance", "schedule", "tiling")
    sampling = {name: importlib.import_module(f"{NAME}.vsr_ops.sampling.{name}") for name in names}
    plan = sampling["tiling"].plan_tiles(1, 8, 80, sampling["tiling"].TileSize(8, 8, 1), 0.0)
    merger, now = sampling["tiling"].Merger(plan), 0.0
    live = live_module.Live(tiled(nodes, lite[0]), 1, 1, lambda: now)
    live.begin(0)
    step, branch = sampling["schedule"].Step(0), sampling["guidance"].COND
    for call in sampling["calls"].calls(plan, step, branch, 1, synchronous=False):
        now += 0.5
        merger.add(call.window, call.tiles[0], torch.zeros(1, 4, 8, 8))
        live.tiles(plan, call, merger)
    assert [round(value, 3) for value, _, _ in seen] == [0.2, 0.4, 0.6, 0.8, 1.0]


def test_who_wants_no_news_gets_none(
    host: ModuleType, nodes: dict[str, Any], lite: Any, wide: Any, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sampling within another node, without a callback."""
    monkeypatch.setattr(importlib.import_module(f"{NAME}.nodes.host.live"), "INTERVAL", 0.0)
    positive, negative, latent = wide
    made = host.guider(tiled(nodes, lite[0]), positive, negative, 1.0)
    samplers = importlib.import_module("comfy.samplers")
    sigmas = samplers.calculate_sigmas(made.model_patcher.get_model_object("model_sampling"), "karras", 1)
    noise = torch.zeros_like(latent["samples"])
    made.sample(noise, latent["samples"], samplers.sampler_object("euler"), sigmas, seed=0, disable_pbar=True)
    assert seen == []
