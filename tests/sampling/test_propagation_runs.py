"""Whole passes with SAP and TAP: batches, layers, memory that runs out, and the same laws seen through a real UNet."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import TYPE_CHECKING

import pytest
import torch
from einops import rearrange
from torch import Tensor

from tests.support.one_layer import (
    ENDS,
    LAGGED,
    MIDDLE,
    PAIR,
    SAP,
    TAP,
    TILE,
    one_layer,
    passed,
    project,
    through_unet,
)
from tests.support.tensors import latents, relative
from vsr_ops.errors import SamplingError
from vsr_ops.sampling.attention import Tempered, identity
from vsr_ops.sampling.calls import Call, gather_tiles
from vsr_ops.sampling.guidance import COND, Branch
from vsr_ops.sampling.layers import LAYERS, place_layers
from vsr_ops.sampling.passes import run_pass
from vsr_ops.sampling.propagation import Propagation, TileRun
from vsr_ops.sampling.schedule import Kind, Step, step_at
from vsr_ops.sampling.tiling import plan_tiles

if TYPE_CHECKING:
    from vsr_ops.backbones.svd import SVD


@pytest.mark.parametrize("settings", [SAP, TAP, LAGGED], ids=["sap", "tap", "lagged"])
def test_the_batch_changes_nothing(settings: Propagation) -> None:
    plan = plan_tiles(6, 16, 24, TILE, 0.5)
    branch = Branch("perturbed", attention=Tempered(0.8))

    def two_steps(batch: int) -> Tensor:
        run = TileRun(plan, settings)
        for index in (0, 1):
            video = 3 * latents(plan, index)
            out = run_pass(run, step_at(index, settings.kinds), branch, one_layer(run, video), batch)
        return out

    assert all(relative(two_steps(batch), two_steps(1)) < 1e-6 for batch in (2, 5, 15))


def test_a_variant_acts_in_its_own_layers_only() -> None:
    plan = plan_tiles(4, 8, 8, TILE)
    video, run = latents(plan), TileRun(plan, SAP)
    values = rearrange(project(video)[2], "b h (y x) d -> b (h d) y x", y=8)
    for layer, place in product((ENDS, MIDDLE), ("ends", "middle")):
        branch = Branch("perturbed", attention=identity, layers=place)
        out = run_pass(run, Step(0), branch, one_layer(run, video, layer))
        assert torch.equal(out, values) == (place in layer.places)


def test_the_middle_block_is_never_extended() -> None:
    video = latents(PAIR)
    run = TileRun(PAIR, SAP)
    out = run_pass(run, Step(0, "sap"), COND, one_layer(run, video, MIDDLE))
    assert torch.equal(out, passed(PAIR, Propagation(()), Step(0), video))


def test_saliency_marks_what_gets_more_than_its_share() -> None:
    plan = plan_tiles(6, 8, 24, TILE, 0.5)
    video = 2 * latents(plan)
    run = TileRun(plan, Propagation(()))
    run_pass(run, Step(0), Branch("cond", observe=True), one_layer(run, video, MIDDLE))
    assert run.saliency is not None
    mask = run.saliency.result()
    assert mask.shape == (6, 1, 8, 24) and mask.min() >= 0 and mask.max() <= 1
    q, k, _ = project(video[:4, ..., :8])
    weights = (q.double() @ k.double().transpose(-1, -2) / 2).softmax(-1)
    expected = rearrange(weights.mean(1).sum(1) > 1, "t (y x) -> t 1 y x", y=8)
    # Where one tile alone covers.
    assert torch.equal(mask[:2, ..., :4] > 0.5, expected[:2, ..., :4])
    assert 0.05 < expected.float().mean() < 0.95
    run.begin(Step(0), COND)
    assert run.saliency is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stops_with_step_and_tile(bad: float) -> None:
    plan = plan_tiles(8, 8, 16, TILE, 0.0)
    video = latents(plan)
    video[5, 2, 3, 11] = bad
    run = TileRun(plan, Propagation(()))
    with pytest.raises(SamplingError, match=r"step 3, window 2 of 2, tile 2 of 2, branch cond") as caught:
        run_pass(run, Step(2), COND, lambda call: gather_tiles(plan, call, video))
    assert "\n" not in str(caught.value)


def test_through_the_unet_only_sap_lets_a_tile_see_another(tiny: SVD) -> None:
    video = latents(PAIR)
    planted = video.clone()
    planted[:, :, 3:5, 11:13] += 4

    def first_tile(settings: Propagation, video: Tensor, steps: int) -> Tensor:
        run = TileRun(PAIR, settings)
        for index in range(steps):
            out = through_unet(tiny, run, step_at(index, settings.kinds), video)
        return out[..., :8]

    for settings, steps in ((Propagation(()), 1), (TAP, 1), (LAGGED, 1)):
        assert torch.equal(first_tile(settings, video, steps), first_tile(settings, planted, steps))
    for settings, steps in ((SAP, 1), (LAGGED, 2)):
        assert relative(first_tile(settings, planted, steps), first_tile(settings, video, steps)) > 1e-3


def test_through_the_unet_lagged_sap_settles_on_synchronous(tiny: SVD) -> None:
    """With the input held still each lagged step carries the bank one layer deeper: four layers, five steps."""
    video = latents(PAIR)
    synchronous = through_unet(tiny, TileRun(PAIR, SAP), Step(0, "sap"), video)
    run, distance = TileRun(PAIR, LAGGED), []
    for index in range(5):
        distance.append(relative(through_unet(tiny, run, Step(index, "sap"), video), synchronous))
    assert distance[4] < 1e-5 and distance[3] > 1e-4 and distance[0] > 1e-2


def test_through_the_unet_tap_reaches_the_next_window_alone(tiny: SVD) -> None:
    plan = plan_tiles(12, 8, 8, TILE, 0.0, cuts=(8,))
    video = latents(plan)
    planted = video.clone()
    planted[5] += 2 * latents(plan, 1)[5]
    # forward: window 2 is behind the cut; backward: window 1 hands to window 0
    for forward, reached in ((True, {1}), (False, {0, 1})):
        before, after = (through_unet(tiny, TileRun(plan, TAP), Step(0, "tap", forward), v) for v in (video, planted))
        changed = {n for n in range(3) if not torch.equal(before[4 * n : 4 * n + 4], after[4 * n : 4 * n + 4])}
        assert changed == reached


def test_through_the_unet_gamma_zero_and_off_are_exact(tiny: SVD) -> None:
    plan = plan_tiles(4, 8, 12, TILE, 0.5, factor=4)
    video = latents(plan)
    plain = through_unet(tiny, TileRun(plan, Propagation(())), Step(0), video)
    zero = Branch("perturbed", attention=Tempered(0.0))
    one = Branch("perturbed", attention=Tempered(1.0))
    assert torch.equal(through_unet(tiny, TileRun(plan, Propagation(())), Step(0), video, zero), plain)
    assert relative(through_unet(tiny, TileRun(plan, Propagation(())), Step(0), video, one), plain) > 1e-3
    for kind in ("sap", "tap"):
        a, b = (through_unet(tiny, TileRun(plan, SAP), Step(0, kind), video, branch) for branch in (zero, COND))
        assert torch.equal(a, b)


@pytest.mark.parametrize("settings", [SAP, Propagation(("tap",)), LAGGED], ids=["sap", "tap", "lagged"])
def test_through_the_unet_the_batch_changes_little(tiny: SVD, settings: Propagation) -> None:
    plan = plan_tiles(6, 8, 16, TILE, 0.5, factor=4)
    branch = Branch("perturbed", attention=Tempered(0.7))

    def last(batch: int) -> Tensor:
        run = TileRun(plan, settings)
        for index in range(2 if settings is LAGGED else 1):
            out = through_unet(tiny, run, step_at(index, settings.kinds), latents(plan, index), branch, batch)
        return out

    one, three = last(1), last(3)
    assert relative(three, one) < 1e-5 and relative(one, latents(plan)) > 0.1


def test_through_the_unet_the_order_in_a_batch_changes_little(tiny: SVD) -> None:
    video = latents(PAIR)

    def batch(order: tuple[int, int]) -> Tensor:
        run, call = TileRun(PAIR, SAP), Call(Step(0, "sap"), COND, 0, order, 4, 8, 8)
        tiles = gather_tiles(PAIR, call, video)
        run.begin(call.step, COND)
        with tiny.serving(run, call), torch.no_grad():
            return tiny.denoise(tiles, 1.0, tiles, tiny.context(None), 4)

    assert relative(batch((1, 0)).roll(4, 0), batch((0, 1))) < 1e-5


def test_every_choice_of_layers_in_a_unet_of_svds_shape() -> None:
    outer, middle = [f"down{i}" for i in range(6)] + [f"up{i}" for i in range(9)], ["middle"]
    found = place_layers([*outer[:6], *middle, *outer[6:]], middle)
    members = {choice: [name for name, layer in found.items() if choice in layer.places] for choice in LAYERS}
    assert members["ends"] == ["down0", "down1", "up7", "up8"]
    assert members["first two"] + members["last two"] == members["ends"]
    assert members["middle"] == middle
    assert members["all"] == [*outer[:6], *middle, *outer[6:]]


def test_layers_elsewhere_are_not_extended() -> None:
    """Propagation in the middle leaves the layers at the ends alone, and acts in the middle."""
    video, run = latents(PAIR), TileRun(PAIR, Propagation(("sap",), sap_rate=1, layers="middle"))
    alone = run_pass(TileRun(PAIR, Propagation(())), Step(0), COND, one_layer(run, video, ENDS), 2)
    assert torch.equal(run_pass(run, Step(0, "sap"), COND, one_layer(run, video, ENDS), 2), alone)
    assert not torch.equal(run_pass(run, Step(0, "sap"), COND, one_layer(run, video, MIDDLE), 2), alone)


@pytest.mark.parametrize("kind", ["plain", "sap", "tap"])
def test_running_out_of_memory_halves_the_batch_and_changes_nothing(kind: Kind) -> None:
    """Fails in the middle of a call, after a layer has stored and read banks, for more than two tiles at once."""
    plan = plan_tiles(10, 8, 40, TILE)
    settings = Propagation((kind,), True, sap_rate=1) if kind != "plain" else Propagation(())
    sizes: list[int] = []

    def two_steps(batch: int, most: int) -> Tensor:
        run, out = TileRun(plan, settings), torch.empty(0)
        for index in (0, 1):
            inner = one_layer(run, 3 * latents(plan, index))

            def evaluate(call: Call, inner: Callable[[Call], Tensor] = inner) -> Tensor:
                value = inner(call)
                sizes.append(len(call.tiles))
                if len(call.tiles) > most:
                    raise torch.cuda.OutOfMemoryError(f"no room for {len(call.tiles)} tiles")
                return value

            out = run_pass(run, step_at(index, settings.kinds), COND, evaluate, batch)
        assert run.limit == (None if most >= batch else 2)
        return out

    whole = two_steps(8, 8)
    sizes.clear()
    assert relative(two_steps(8, 2), whole) < 1e-6
    assert sizes[:3] == [8, 4, 2] and set(sizes[3:]) == {2, 1}


def test_synchronous_sap_that_does_not_fit_goes_on_lagged(caplog: pytest.LogCaptureFixture) -> None:
    video, run = latents(PAIR), TileRun(PAIR, SAP)
    inner = one_layer(run, video)

    def evaluate(call: Call) -> Tensor:
        if len(call.tiles) > 1:
            raise torch.cuda.OutOfMemoryError("no room")
        return inner(call)

    for index in (0, 1, 2):
        out = run_pass(run, Step(index, "sap"), COND, evaluate)
    assert run.settings.sap_lagged and "lagged" in caplog.text
    # The same video at every step: what lagged behind is what the others hold now.
    assert relative(out, passed(PAIR, SAP, Step(0, "sap"), video)) < 1e-6


def test_one_tile_that_does_not_fit_is_an_error() -> None:
    def evaluate(call: Call) -> Tensor:
        raise torch.cuda.OutOfMemoryError("no room")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        run_pass(TileRun(PAIR, TAP), Step(0, "tap"), COND, evaluate, 2)
