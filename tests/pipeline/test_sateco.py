"""SATeCo in the main job: off is off, its guide goes with the tiles and windows, and scenes stay apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from tests.backbones.test_sd import model_of
from tests.support.tensors import randn, relative
from vsr_ops.backbones.sd import SD
from vsr_ops.errors import SettingError
from vsr_ops.modules.sateco import SATeCo, SATeCoShape, Strengths, attached, windows_of
from vsr_ops.modules.sateco_file import SATeCos
from vsr_ops.pipeline.parts import PipelineModules, SATeCoSettings, apply_sateco
from vsr_ops.pipeline.sampler import Settings, sample
from vsr_ops.sampling.layouts import lay_out
from vsr_ops.sampling.propagation import Propagation
from vsr_ops.sampling.tiling import TilePlan, TileSize, plan_tiles

if TYPE_CHECKING:
    from vsr_ops.backbones.svd import SVD

PLAIN = Settings(steps=2, guidance="none", propagation=Propagation(()))


def some(model: Any, fresh: bool = False) -> SATeCo:
    """For a small UNet of two levels."""
    widths = list(reversed(model.unet.config["block_out_channels"]))
    names = [f"up_blocks.{index}" for index in range(len(widths))]
    shrinks = [2 ** max(len(widths) - 2 - index, 0) for index in range(len(widths))]
    backbone = "sd-unet" if isinstance(model, SD) else "svd-unet"
    shape = SATeCoShape(
        backbone,
        dict(zip(names, widths, strict=True)),
        dict.fromkeys(names, 16),
        guide=8,
        head=8,
        shrinks=dict(zip(names, shrinks, strict=True)),
    )
    torch.manual_seed(4)
    made = SATeCo(shape).eval().requires_grad_(False)
    for parameter in () if fresh else made.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made


def sampled(
    model: Any, lr: Tensor, plan: Any, half: SATeCo | None, strengths: Strengths | None = None, settings: Any = PLAIN
) -> Tensor:
    given = None if half is None else SATeCoSettings(SATeCos(half), strengths or Strengths())
    with apply_sateco(model, given, lr):
        return sample(model, lr, plan, settings)


def whole(lr: Tensor) -> TilePlan:
    frames, _, height, width = lr.shape
    return plan_tiles(frames, height, width, TileSize(height, width, frames))


def test_a_fresh_one_and_strength_0_change_nothing_to_the_bit(tiny: SVD) -> None:
    model, lr = model_of(tiny), randn(3, 4, 8, 8)
    plain = sampled(model, lr, whole(lr), None)
    assert torch.equal(sampled(model, lr, whole(lr), some(model, fresh=True)), plain)
    assert torch.equal(sampled(model, lr, whole(lr), some(model), Strengths(0, 0)), plain)
    found = {s: sampled(model, lr, whole(lr), some(model), Strengths(*s)) for s in ((1, 0), (0, 1), (1, 1))}
    for one in found.values():
        assert relative(one, plain) > 1e-2
    assert relative(found[1, 0], found[1, 1]) > 1e-3 and relative(found[0, 1], found[1, 1]) > 1e-3
    assert torch.equal(sampled(model, lr, whole(lr), None), plain), "nothing stays"


def test_one_tile_is_the_unet_without_tiles(tiny: SVD) -> None:
    """What a run's calls give is diffusers' own UNet with the guide of the whole video behind its levels."""
    model, lr = model_of(tiny), randn(3, 4, 8, 8)
    half, calls = some(model), list[tuple[Any, Any, Tensor]]()

    def note(module: Any, given: Any, named: Any, out: Any) -> None:
        calls.append((given, named, out[0]))

    handle = model.unet.register_forward_hook(note, with_kwargs=True)
    try:
        with apply_sateco(model, SATeCoSettings(SATeCos(half)), lr):
            sample(model, lr, whole(lr), PLAIN)
    finally:
        handle.remove()
    assert len(calls) == 2
    for given, named, found in calls:
        with attached(half, model.unet, lambda: (lr * model.scaling_factor, 3), Strengths()):
            expected = model.unet(*given, **named)[0]
        assert relative(found, expected) < 1e-6
        assert relative(model.unet(*given, **named)[0], expected) > 1e-2


@pytest.mark.parametrize("layout", ["paper", "balanced", "shifted"])
def test_the_guide_goes_with_its_tile(tiny: SVD, layout: str) -> None:
    """LR latents that change in one corner and window change nothing where no tile of theirs lies."""
    model, lr = model_of(tiny), randn(6, 4, 8, 32)
    plan = lay_out(layout, 6, 8, 32, TileSize(8, 8, 4), 0.5)
    settings = Settings(steps=1, guidance="none", propagation=Propagation(()))
    found = sampled(model, lr, plan, some(model), settings=settings)
    changed = lr.clone()
    changed[:2, ..., :4] = changed[:2, ..., :4].flip(0)
    apart = (sampled(model, changed, plan, some(model), settings=settings) - found).abs().amax((1, 2))
    assert float(apart[:2, :4].min()) > 1e-3
    assert torch.equal(apart[:, 16:], torch.zeros(6, 16)), "other tiles"
    assert torch.equal(apart[5:], torch.zeros(1, 32)), "windows without those frames"


def test_scenes_stay_apart(tiny: SVD) -> None:
    model, lr = model_of(tiny), randn(6, 4, 8, 8)
    plan = plan_tiles(6, 8, 8, TileSize(8, 8, 6), cuts=(3,))
    found = sampled(model, lr, plan, some(model))
    changed = torch.cat([lr[:3], lr[3:].flip(-1)])
    other = sampled(model, changed, plan, some(model))
    assert torch.equal(other[:3], found[:3]) and not torch.equal(other[3:], found[3:])


def test_branches_and_tiles_together_are_one_by_one(tiny: SVD) -> None:
    model, lr, plan = model_of(tiny), randn(4, 4, 8, 16), plan_tiles(4, 8, 16, TileSize(8, 8, 4))
    settings = Settings(steps=2, guidance="dssag", guidance_scale=1.0, propagation=Propagation(()))
    apart = sampled(model, lr, plan, some(model), settings=settings)
    for changed in (
        Settings(steps=2, guidance="dssag", guidance_scale=1.0, propagation=Propagation(()), together=True),
        Settings(steps=2, guidance="dssag", guidance_scale=1.0, propagation=Propagation(()), batch=3),
    ):
        assert relative(sampled(model, lr, plan, some(model), settings=changed), apart) < 1e-5


def test_in_svd_too(tiny: SVD) -> None:
    lr = randn(3, 4, 8, 8)
    plain = sampled(tiny, lr, whole(lr), None)
    assert torch.equal(sampled(tiny, lr, whole(lr), some(tiny, fresh=True)), plain)
    assert relative(sampled(tiny, lr, whole(lr), some(tiny)), plain) > 1e-3


def test_a_long_video_goes_in_windows_of_its_scenes(tiny: SVD) -> None:
    spans = windows_of(40, (17,))
    assert all(span.length <= 14 for span in spans)
    assert {span.start for span in spans} & {0, 17} == {0, 17}
    assert not any(span.start < 17 < span.stop for span in spans)
    half = some(model_of(tiny))
    f, guide = randn(20, 64, 4, 4), randn(20, 8, 4, 4, seed=1)
    found = half.over_time("up_blocks.0", f, guide, 20)
    first = half("up_blocks.0", f[:14], guide[:14], 14)
    starts = [span.start for span in windows_of(20)]
    assert torch.equal(found[: starts[1]], first[: starts[1]]), "before the next window begins"
    cut = half.over_time("up_blocks.0", f, guide, 20, cuts=(8,))
    assert torch.allclose(cut[:8], half("up_blocks.0", f[:8], guide[:8], 8), atol=1e-6)


def test_one_of_another_model_is_refused_before_any_work(tiny: SVD) -> None:
    wrong = some(model_of(tiny))
    with pytest.raises(SettingError, match="made for backbone sd-unet, this model is svd-unet"):
        PipelineModules(sateco=SATeCoSettings(SATeCos(wrong))).check_fits(tiny)
