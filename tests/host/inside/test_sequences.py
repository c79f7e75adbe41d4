"""In the host, too, no attention of a run asks for more sequences at once than CUDA takes, whatever the backend."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.sequences import Sequences
from tests.support.tensors import randn

from .conftest import NAME

LIMIT = 65535


def module(name: str) -> Any:
    return importlib.import_module(f"{NAME}.{name}")


@pytest.fixture(scope="module")
def full(host: ModuleType) -> Any:
    """Stable Video Diffusion as a MODEL at its full size, without data."""
    load = module("nodes.host.load")
    with torch.device("meta"):
        config = dict(importlib.import_module("diffusers").UNetSpatioTemporalConditionModel().config)
    kind, make = load.svd({"unet": config})
    return load.placed(kind, lambda _: make("meta"), lambda *_: None, True)


def test_full_size_svd_stays_below_the_limit_with_all_tiles_at_once(full: Any) -> None:
    tiling, calls = module("vsr_ops.sampling.tiling"), module("vsr_ops.sampling.calls")
    schedule, guidance = module("vsr_ops.sampling.schedule"), module("vsr_ops.sampling.guidance")
    propagation, attention = module("vsr_ops.sampling.propagation"), module("nodes.session.attention")
    plan = tiling.plan_tiles(14, 136, 240, tiling.TileSize(64, 64, 14))
    run, step = propagation.TileRun(plan, propagation.Propagation()), schedule.Step(0, "sap")
    run.begin(step, guidance.COND)
    call = next(calls.calls(plan, step, guidance.COND, len(plan.spatial), True))
    override = attention.attention_override(
        run, call, module("nodes.host.model").spatial_layers(full), None, lambda function: True
    )
    frames = len(call.tiles) * call.frames
    unet = full.model.diffusion_model
    dtype = next(unet.parameters()).dtype
    with torch.device("meta"), Sequences() as spy:
        x, context = torch.empty(frames, 8, 64, 64, dtype=dtype), torch.empty(frames, 1, 1024, dtype=dtype)
        options = {"optimized_attention_override": override}
        unet(
            x,
            x[:, 0, 0, 0],
            context,
            torch.empty(frames, 768, dtype=dtype),
            transformer_options=options,
            num_video_frames=14,
            image_only_indicator=torch.zeros(len(call.tiles), 14, dtype=dtype),
        )
    assert max(spy.seen) <= LIMIT
    assert sum(spy.seen) > 2 * 5 * len(plan.spatial) * 64 * 64 > LIMIT


def test_in_parts_it_is_the_hosts_attention(host: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a mask given by place or by name, of the batch's length or one for all."""
    attention, core = module("nodes.session.attention"), module("vsr_ops.sampling.attention")
    theirs = importlib.import_module("comfy.ldm.modules.attention").attention_pytorch
    q, k, v = (randn(7, 6, 16, seed=seed) for seed in range(3))
    each, one = randn(7, 6, 6, seed=3), randn(6, 6, seed=4)
    cases: list[tuple[tuple[Any, ...], dict[str, Tensor]]] = [
        ((), {}),
        ((each,), {}),
        ((one,), {}),
        ((), {"mask": each}),
        ((), {"mask": one}),
    ]
    expected = [theirs(q, k, v, 2, *rest, **named) for rest, named in cases]
    monkeypatch.setattr(core, "SEQUENCES", 5)
    for (rest, named), whole in zip(cases, expected, strict=True):
        with Sequences() as spy:
            part = attention.in_limits(theirs, (q, k, v, 2, *rest), named)
        assert torch.equal(part, whole)
        assert spy.seen == [4, 4, 4, 2]
