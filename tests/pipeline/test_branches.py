"""A step's branches in one UNet call: the result of a call each. Where memory runs out they go one by one again."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.tensors import latents, randn, relative
from vsr_ops.backbones.sd import SD, load_sd
from vsr_ops.backbones.svd import Backbone, load_svd
from vsr_ops.modules.control import load_control
from vsr_ops.names import BRANCH_MODES
from vsr_ops.pipeline.cost import estimate, resolve_branches
from vsr_ops.pipeline.sampler import Settings, sample, strengths, unet_calls
from vsr_ops.sampling.calls import Call
from vsr_ops.sampling.guidance import GUIDANCE
from vsr_ops.sampling.interval import GuidanceInterval
from vsr_ops.sampling.layouts import TileLayout
from vsr_ops.sampling.propagation import Propagation
from vsr_ops.sampling.tiling import TileSize, plan_tiles

if TYPE_CHECKING:
    from vsr_ops.backbones.svd import SVD

#: Two tiles by two windows, with overlap.
FOUR = plan_tiles(6, 8, 12, TileSize(8, 8, 4), factor=4)
#: Two tiles by two windows that the bundled models' UNets can take.
LITE = plan_tiles(3, 16, 24, TileSize(16, 16, 2), factor=8)
CPU = torch.device("cpu")
#: Of each row of the table, with and without CFG.
STRENGTHS: list[tuple[str, float | None, float | None]] = [
    ("none", None, None),
    ("cfg", 2.0, None),
    ("dssag", None, 1.0),
    ("dssag", 2.0, None),
    ("pag", 1.0, 1.0),
    ("pag", 2.0, 1.0),
    ("sag", 1.0, 1.0),
    ("sag", 2.0, 1.0),
]
CARRIED = {
    "synchronous": Propagation(sap_rate=1),
    "lagged": Propagation(sap_lagged=True, sap_rate=1),
    "off": Propagation(()),
}


def with_control() -> SD:
    """The bundled Stable Diffusion with its control."""
    return load_sd("lite", CPU, torch.float32, load_control("lite"))


def settings(
    name: str, cfg: float | None, scale: float | None, carried: str = "synchronous", steps: int = 2, **more: Any
) -> Settings:
    return Settings(steps, name, cfg, scale, propagation=CARRIED[carried], **more)


class Calls:
    """Videos in each call of a model's UNet; more than `most` do not fit."""

    def __init__(self, model: Backbone, most: int = 99) -> None:
        self.videos: list[int] = []
        self._model, self._most = model, most

    def __enter__(self) -> Calls:
        unet: nn.Module = self._model.unet
        self._handles = [unet.register_forward_pre_hook(self._begun), unet.register_forward_hook(self._done)]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _begun(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.videos.append(len(inputs[0]))

    def _done(self, module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        """Memory runs out at the end, when layers have read and left banks."""
        if len(inputs[0]) > self._most:
            raise torch.cuda.OutOfMemoryError(f"no room for {len(inputs[0])} videos")


def test_every_strategy_is_here() -> None:
    assert {name for name, *_ in STRENGTHS} == set(GUIDANCE)


@pytest.mark.parametrize(("name", "cfg", "scale"), STRENGTHS)
def test_together_is_apart(tiny: SVD, name: str, cfg: float | None, scale: float | None) -> None:
    """A step with SAP and one with TAP; each tile is evaluated once in each branch, in as many calls as is said."""
    apart = settings(name, cfg, scale)
    lr, noise = latents(FOUR), latents(FOUR, 1)
    expected = sample(tiny, lr, FOUR, apart, noise=noise)
    together, ran = replace(apart, together=True, batch=2), list[Call]()
    with Calls(tiny) as calls:
        found = sample(tiny, lr, FOUR, together, noise=noise, tick=ran.append)
    assert relative(found, expected) < 1e-5
    assert len(calls.videos) == unet_calls(FOUR, together) <= unet_calls(FOUR, apart)
    tiles = Counter((call.step.index, call.branch.name, call.window, m) for call in ran for m in call.tiles)
    passes = sum(GUIDANCE[name].passes(power) for power in strengths(apart))
    assert set(tiles.values()) == {1} and len(tiles) == passes * FOUR.tiles == sum(calls.videos)
    joined = max(len(GUIDANCE[name].branches(power)) for power in strengths(apart))
    assert max(calls.videos) == joined * 2


@pytest.mark.parametrize(
    "apart",
    [
        settings("pag", 2.0, 1.0, "lagged", 3),
        settings("dssag", None, 1.0, "lagged", 3, interval=GuidanceInterval(every=2)),
        settings("sag", 2.0, 1.0, "off"),
    ],
    ids=["lagged", "lagged-kept", "off"],
)
def test_whatever_is_carried_tile_by_tile(tiny: SVD, apart: Settings) -> None:
    lr, noise = latents(FOUR), latents(FOUR, 1)
    one, two = (sample(tiny, lr, FOUR, replace(apart, together=each), noise=noise) for each in (False, True))
    assert relative(two, one) < 1e-5


def test_each_scene_and_branch_has_its_own_context(tiny: SVD) -> None:
    plan = plan_tiles(7, 8, 8, TileSize(8, 8, 4), cuts=(4,), factor=4)
    lr, noise, context, apart = latents(plan), latents(plan, 1), randn(2, 1, 16), settings("cfg", 2.0, None)
    one, two = (sample(tiny, lr, plan, replace(apart, together=each), context, noise) for each in (False, True))
    assert relative(two, one) < 1e-5
    assert relative(sample(tiny, lr, plan, replace(apart, together=True), context[:1], noise), two) > 1e-3


def test_contexts_of_another_length_go_apart(tiny: SVD) -> None:
    """A text of other words than the negative's may have more tokens."""
    lr, noise, apart = latents(FOUR), latents(FOUR, 1), settings("cfg", 2.0, None, "off")
    one, two = (sample(tiny, lr, FOUR, replace(apart, together=each), randn(1, 3, 16), noise) for each in (False, True))
    assert torch.equal(one, two)


@pytest.mark.parametrize("most", [1, 2])
def test_out_of_memory_branches_go_one_by_one_and_then_in_halves(
    tiny: SVD, most: int, caplog: pytest.LogCaptureFixture
) -> None:
    lr, noise, apart = latents(FOUR), latents(FOUR, 1), settings("dssag", None, 1.0, "lagged", 3, batch=2)
    expected = sample(tiny, lr, FOUR, apart, noise=noise)
    with Calls(tiny, most) as calls:
        found = sample(tiny, lr, FOUR, replace(apart, together=True), noise=noise)
    assert relative(found, expected) < 1e-5
    assert calls.videos[0] == 4 and max(calls.videos[1:]) == 2
    assert calls.videos.count(2) == (2 if most == 1 else len(calls.videos) - 1)
    assert caplog.text.count("with 2 branches in a call: going on with one at a time") == 1


def test_synchronous_sap_that_fits_only_apart_stays_so(tiny: SVD) -> None:
    """All tiles of a window in each branch, but not in both at once."""
    lr, noise, apart = latents(FOUR), latents(FOUR, 1), settings("dssag", None, 1.0)
    expected = sample(tiny, lr, FOUR, apart, noise=noise)
    with Calls(tiny, 2) as calls:
        assert relative(sample(tiny, lr, FOUR, replace(apart, together=True), noise=noise), expected) < 1e-5
    assert calls.videos[0] == 4 and calls.videos[1:3] == [2, 2]


def test_other_errors_are_not_tried_again(tiny: SVD) -> None:
    def broken(*_: object) -> None:
        raise ValueError("broken")

    handle = tiny.unet.register_forward_pre_hook(broken)
    try:
        with pytest.raises(ValueError, match="broken"):
            sample(tiny, latents(FOUR), FOUR, settings("dssag", None, 1.0, together=True))
    finally:
        handle.remove()


def test_the_bundled_models_too() -> None:
    """SD has the LR latents in every branch, and its control in the same call."""
    for model, cfg in ((load_svd("lite", CPU, torch.float32), None), (with_control(), 2.0)):
        apart = settings("dssag", cfg, 1.0 if cfg is None else None, steps=1, start_sigma=3.0)
        expected, together = sample(model, latents(LITE), LITE, apart), replace(apart, together=True)
        with Calls(model) as calls:
            assert relative(sample(model, latents(LITE), LITE, together), expected) < 1e-5
        assert len(calls.videos) == unet_calls(LITE, together) == len(LITE.windows)


def test_what_is_planned(tiny: SVD) -> None:
    """Auto is apart on a CPU; calls, and bytes on the device, are those of branches together."""
    layout, asked = TileLayout.still(FOUR), settings("pag", 2.0, 1.0, "lagged", batch=2)
    made = {mode: resolve_branches(tiny, layout, asked, mode) for mode in BRANCH_MODES}
    assert [mode for mode in BRANCH_MODES if made[mode].together] == ["together"]
    one, three = (estimate(tiny, layout, made[mode]) for mode in ("auto", "together"))
    assert three.unet_calls * 3 == one.unet_calls and three.tile_passes == one.tile_passes
    assert three.activation_bytes == 3 * one.activation_bytes and three.tap_bytes == 3 * one.tap_bytes
    assert three.lagged_bytes == one.lagged_bytes > 0
