"""A call is the same work whichever tile it is of: compiled once it serves them all, and a CUDA graph can replay it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.one_layer import through_unet
from tests.support.tensors import latents, relative
from vsr_ops.sampling.attention import Tempered
from vsr_ops.sampling.calls import Call, gather_tiles
from vsr_ops.sampling.guidance import Branch
from vsr_ops.sampling.passes import run_pass
from vsr_ops.sampling.propagation import Propagation, TileRun
from vsr_ops.sampling.schedule import Step, step_at
from vsr_ops.sampling.tiling import TileSize, plan_tiles

if TYPE_CHECKING:
    from vsr_ops.backbones.svd import SVD

#: Two spatial tiles, three windows.
PLAN = plan_tiles(8, 8, 16, TileSize(8, 8, 4), 0.5, factor=8)
BLURRED = Branch("blurred", attention=Tempered(0.5))
#: A read value, or a shape that depends on one, makes the host wait and cannot be captured.
DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
KINDS = [("plain", False), ("sap", False), ("sap", True), ("tap", False)]


def settings(kind: str, lagged: bool) -> Propagation:
    return Propagation(() if kind == "plain" else (kind,), lagged, sap_rate=2)  # type: ignore[arg-type]


class Work(TorchDispatchMode):
    """What is done, in order: each operator with its tensors' shapes and types, and those that wait for values."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, ...]] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        self.done.append((func, *((tuple(x.shape), x.dtype, x.stride()) for x in tensors)))
        if DEPENDENT & set(func.tags):
            self.waits.append(str(func))
        return out


@pytest.mark.parametrize(("kind", "lagged"), KINDS)
def test_every_call_of_a_pass_is_the_same_work(tiny: SVD, kind: str, lagged: bool) -> None:
    """But for the first window's at a TAP step, which has no neighbour, and the last one's, which hands nothing on."""
    run, video, works = TileRun(PLAN, settings(kind, lagged)), latents(PLAN), dict[int, list[Work]]()

    def evaluate(call: Call) -> Tensor:
        tiles = gather_tiles(run.plan, call, video)
        with tiny.serving(run, call), torch.no_grad(), Work() as work:
            out = tiny.denoise(tiles, 2.0, tiles, tiny.context(None), call.frames)
        works.setdefault(call.window, []).append(work)
        return out

    for index in range(2 if lagged else 1):
        works.clear()
        run_pass(run, step_at(index, run.settings.kinds), BLURRED, evaluate)
    assert all(not work.waits and len(work.done) > 500 for window in works.values() for work in window)
    for window in works.values():
        assert all(work.done == window[0].done for work in window)
    between = [works[n][0].done for n in works]
    different = sum(done != between[1] for done in between)
    assert different == (2 if kind == "tap" else 0)


def test_what_waits_would_be_seen() -> None:
    with Work() as work:
        torch.ones(3).nonzero()
        float(torch.ones(1))
    assert work.waits == ["aten.nonzero.default", "aten._local_scalar_dense.default"]


@contextmanager
def compiled(model: SVD, graphs: list[torch.fx.GraphModule]) -> Iterator[None]:
    """A model whose UNet is compiled whole: what cannot be is an error. `graphs` gets one for each compilation."""
    import torch._dynamo

    def backend(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    inner = model.unet
    model.unet = torch.compile(inner, backend=backend, fullgraph=True, dynamic=False)
    try:
        yield
    finally:
        model.unet = inner
        torch._dynamo.reset()


def test_compiled_it_serves_every_call_and_changes_nothing(tiny: SVD) -> None:
    """A graph for the calls of a TAP step with a neighbour on both sides, one for each end; none for another tile."""
    graphs: list[torch.fx.GraphModule] = []
    video, step = latents(PLAN), Step(0, "tap")
    expected = through_unet(tiny, TileRun(PLAN, settings("tap", False)), step, video, BLURRED)
    with compiled(tiny, graphs):
        found = through_unet(tiny, TileRun(PLAN, settings("tap", False)), step, video, BLURRED)
    assert len(graphs) == 3 < PLAN.tiles
    assert relative(found, expected) < 1e-6
