"""A run waits for the device once a pass: no call reads a value there, and what crosses over does so in its order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from tests.support.one_layer import through_unet
from tests.support.tensors import latents
from tests.support.waits import Waits
from vsr_ops.sampling.attention import Tempered
from vsr_ops.sampling.calls import Call, calls, gather_tiles
from vsr_ops.sampling.guidance import Branch
from vsr_ops.sampling.propagation import Propagation, TileRun
from vsr_ops.sampling.schedule import Step, step_at
from vsr_ops.sampling.tiling import Merger, TileSize, plan_tiles

if TYPE_CHECKING:
    from vsr_ops.backbones.svd import SVD

#: 1080p, three windows.
PLAN = plan_tiles(28, 136, 240, TileSize(64, 64, 14))
BLURRED = Branch("blurred", conditional=False, attention=Tempered(0.5), observe=True)


@pytest.fixture
def cuda() -> Iterator[FakeTensorMode]:
    """Tensors on CUDA that have shapes and devices and no values: reading one is an error."""
    with FakeTensorMode() as mode:
        yield mode


@pytest.fixture
def full(cuda: FakeTensorMode) -> SVD:
    """Stable Video Diffusion's UNet at its full widths there, with one layer a block where it has two."""
    from diffusers import UNetSpatioTemporalConditionModel

    from vsr_ops.backbones.svd import SVD

    with torch.device("meta"):
        unet: Any = UNetSpatioTemporalConditionModel(layers_per_block=1)
    half = {"device": "cuda", "dtype": torch.float16}
    unet.load_state_dict({key: torch.empty(x.shape, **half) for key, x in unet.state_dict().items()}, assign=True)
    return SVD(unet.eval(), None, None, TileSize(64, 64, 14), torch.device("cuda"), torch.float16)


def steps(model: SVD, run: TileRun, count: int, branch: Branch) -> Waits:
    """The calls of two neighbouring windows in some steps in turn, and the blend of what they give."""
    video = torch.empty(28, 4, 136, 240, device="cuda")
    context = torch.empty(1, 1, 1024, device="cuda", dtype=torch.float16)
    with Waits() as waits, torch.no_grad():
        for index in range(count):
            step = step_at(index, run.settings.kinds)
            run.begin(step, branch)
            merger = Merger(PLAN)
            for call in (each for each in calls(PLAN, step, branch, 2, not run.settings.sap_lagged) if short(each)):
                tiles = gather_tiles(PLAN, call, video)
                with model.serving(run, call):
                    before = len(waits.copies)
                    value = model.denoise(tiles, 2.0, tiles, context, call.frames)
                    assert waits.copies[before:] == [], "nothing crosses over within a call"
                merger.add(call.window, call.tiles[0], value[: call.frames])
                run.finish(call)
    return waits


def short(call: Call) -> bool:
    return call.window < 2 and call.tiles[0] < 2


def test_reading_a_value_there_is_an_error(cuda: FakeTensorMode) -> None:
    """What the other tests lean on."""
    with pytest.raises(DataDependentOutputException):
        bool(torch.isfinite(torch.empty(3, device="cuda")).all())
    with Waits() as waits:
        torch.empty(3, device="cuda").cpu()
    assert waits.waited == ["(3,) cuda to cpu"]


@pytest.mark.parametrize("lagged", [False, True])
def test_no_call_of_full_size_svd_waits(full: SVD, lagged: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr("vsr_ops.sampling.propagation.may_pin", lambda: True)
    run = TileRun(PLAN, Propagation(sap_lagged=lagged))
    # A step of each kind; lagged, the next that reads what they left.
    waits = steps(full, run, 3 if lagged else 2, BLURRED)
    assert waits.reads == 0
    assert waits.waited == []
    down = [each for each in waits.copies if each.endswith("to cpu")]
    # Only lagged banks leave the device: of four layers, keys and values, at the step before a SAP step alone.
    assert len(down) == (2 * 4 * 2 * 2 if lagged else 0)


@pytest.mark.parametrize("observe", [False, True])
@pytest.mark.parametrize(
    ("kinds", "lagged", "index"), [(("sap",), False, 0), (("sap",), True, 0), (("tap",), False, 1), ((), False, 0)]
)
def test_a_pass_reads_one_value(tiny: SVD, kinds: Any, lagged: bool, index: int, observe: bool) -> None:
    plan = plan_tiles(6, 16, 24, TileSize(8, 8, 4), 0.0, factor=8)
    run = TileRun(plan, Propagation(kinds, lagged))
    branch = Branch("observed", attention=Tempered(0.5), observe=observe)
    with Waits() as waits:
        through_unet(tiny, run, step_at(index, kinds), latents(plan), branch)
    assert waits.reads == 1


def test_a_bank_in_host_memory_is_the_one_that_was_given(tiny: SVD) -> None:
    """What lagged SAP reads, joined on the device, is what the step before left, tile by tile."""
    plan = plan_tiles(4, 8, 16, TileSize(8, 8, 4), 0.0, factor=8)
    run, video = TileRun(plan, Propagation(("sap",), True, sap_rate=1)), latents(plan)
    through_unet(tiny, run, Step(0, "sap"), video)
    kept: dict[Any, list[Tensor]] = {
        key: [torch.cat([bank[m][part] for m in sorted(bank)], 2) for part in (0, 1)]
        for key, bank in run._gathering.items()  # pyright: ignore[reportPrivateUsage]
    }
    through_unet(tiny, run, Step(1, "sap"), video)
    joined = run._joined  # pyright: ignore[reportPrivateUsage]
    assert joined and len(joined) == len(kept)
    for (_, _, layer), parts in kept.items():
        assert all(torch.equal(a[0], b) for a, b in zip(joined[layer], parts, strict=True))
