"""The main job on a real small SVD: against diffusers' pipeline, exact identities, tiles, what is refused."""

from __future__ import annotations

import math
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.support.tensors import latents, randn, relative
from vsr_ops.backbones.svd import sigmas
from vsr_ops.errors import SamplingError, SettingError
from vsr_ops.pipeline.sampler import Settings, noise_schedule, sample, strengths, unet_calls
from vsr_ops.sampling.calls import Call
from vsr_ops.sampling.guidance import GUIDANCE
from vsr_ops.sampling.propagation import Propagation
from vsr_ops.sampling.schedule import step_at
from vsr_ops.sampling.tiling import TileSize, plan_tiles

if TYPE_CHECKING:
    from vsr_ops.backbones.svd import SVD

TILE = TileSize(8, 8, 4)
OFF = Propagation(())
ONE = plan_tiles(3, 8, 8, TILE, factor=4)
#: Two tiles by two windows, with overlap.
FOUR = plan_tiles(6, 8, 12, TILE, factor=4)


@pytest.fixture(scope="session")
def with_clip(tiny: SVD) -> SVD:
    """The same UNet and VAE with a tiny CLIP image encoder of random weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(3)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=224,
        patch_size=56,
        projection_dim=16,
    )
    encoder = CLIPVisionModelWithProjection(config).eval()
    # A fresh model's embedding is near zero, which would not show in the output.
    encoder.visual_projection.weight.data *= 100
    # A UNet of its own: its attention layers serve one model.
    return replace(tiny, unet=deepcopy(tiny.unet), image_encoder=encoder)


def test_diffusers_pipeline_gives_the_same_latents(with_clip: SVD) -> None:
    """A static clip, noise augmentation and guidance off: stock SVD's own case, on the same weights and noise."""
    from diffusers import EulerDiscreteScheduler, StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel
    from transformers import CLIPImageProcessorPil

    steps, frames, height, width = 5, 3, 64, 96
    unet = UNetSpatioTemporalConditionModel.from_config(with_clip.unet.config)
    unet.load_state_dict(with_clip.unet.state_dict())
    scheduler = EulerDiscreteScheduler(
        prediction_type="v_prediction",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
        timestep_type="continuous",
        timestep_spacing="leading",
        steps_offset=1,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
    )
    reference = StableVideoDiffusionPipeline(
        with_clip.vae, with_clip.image_encoder, unet.eval(), scheduler, CLIPImageProcessorPil()
    )
    reference.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    noise = randn(frames, 4, height // 8, width // 8)
    expected = reference(
        picture,
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=steps,
        min_guidance_scale=1.0,
        max_guidance_scale=1.0,
        fps=9,
        motion_bucket_id=127,
        noise_aug_strength=0.0,
        latents=noise[None],
        output_type="latent",
    ).frames[0]

    image = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        context = with_clip.context(image)
        lr = with_clip.encode(image).expand(frames, -1, -1, -1)
    plan = plan_tiles(frames, 8, 12, TileSize(8, 12, 4), factor=4)
    settings = Settings(steps=steps, guidance="none", propagation=OFF)
    found = sample(with_clip, lr, plan, settings, context, noise)
    assert relative(found, expected) < 1e-5
    # The comparison would see the picture's embedding and the picture's latents go missing.
    for other_lr, other_context in ((lr, None), (0 * lr, context)):
        assert relative(sample(with_clip, other_lr, plan, settings, other_context, noise), expected) > 1e-3


def untiled(model: SVD, lr: Tensor, noise: Tensor, steps: int) -> Tensor:
    """Euler's method on the whole video, without tiles, runs or banks."""
    schedule = sigmas(steps)
    x = noise * (schedule[0] ** 2 + 1) ** 0.5
    with torch.no_grad():
        for sigma, following in pairwise(schedule):
            x0 = model.denoise(x, sigma, lr, model.context(None), len(lr))
            x = x0 + (x - x0) * (following / sigma)
    return x


@pytest.mark.parametrize("propagation", [OFF, Propagation(), Propagation(("sap",), True, 1), Propagation(("tap",))])
def test_a_run_of_one_tile_is_the_untiled_model_bit_for_bit(tiny: SVD, propagation: Propagation) -> None:
    lr, noise = latents(ONE), latents(ONE, 1)
    settings = Settings(steps=3, guidance="none", propagation=propagation)
    for plan in (ONE, plan_tiles(3, 8, 8, TileSize(64, 64, 14))):
        assert torch.equal(sample(tiny, lr, plan, settings, noise=noise), untiled(tiny, lr, noise, 3))


@pytest.mark.parametrize("name", GUIDANCE)
def test_guidance_at_zero_strength_is_no_guidance_bit_for_bit(tiny: SVD, name: str) -> None:
    lr = latents(FOUR)
    plain = sample(tiny, lr, FOUR, Settings(steps=2, guidance="none"))
    assert torch.equal(sample(tiny, lr, FOUR, Settings(steps=2, guidance=name, cfg=1.0, guidance_scale=0.0)), plain)


@pytest.mark.parametrize(
    ("name", "cfg", "scale"),
    [("cfg", 2.0, None), ("dssag", None, 1.0), ("dssag", 2.0, None), ("pag", 1.0, 1.0), ("sag", 2.0, 1.0)],
)
def test_guidance_at_some_strength_changes_the_result(
    tiny: SVD, name: str, cfg: float | None, scale: float | None
) -> None:
    lr = latents(ONE)
    plain = sample(tiny, lr, ONE, Settings(steps=2, guidance="none"))
    guided = sample(tiny, lr, ONE, Settings(steps=2, guidance=name, cfg=cfg, guidance_scale=scale))
    assert torch.isfinite(guided).all() and relative(guided, plain) > 1e-3


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("name", GUIDANCE)
def test_one_tile_has_nothing_to_see_elsewhere_and_is_guided(tiny: SVD, name: str, frames: int) -> None:
    plan = plan_tiles(frames, 8, 8, TileSize(64, 64, 14))
    cfg = None if name in ("none", "dssag") else 2.0
    scale = None if name in ("none", "cfg") else 1.0
    settings = Settings(steps=2, guidance=name, cfg=cfg, guidance_scale=scale, propagation=Propagation())
    lr = latents(plan)
    found = sample(tiny, lr, plan, settings)
    assert torch.equal(found, sample(tiny, lr, plan, replace(settings, propagation=OFF)))
    if name != "none":
        assert relative(found, sample(tiny, lr, plan, Settings(steps=2, guidance="none"))) > 1e-3


MIXED = [
    Settings(steps=2, guidance="none", propagation=Propagation(), batch=2),
    Settings(steps=3, guidance="dssag", propagation=Propagation()),
    Settings(steps=2, guidance="dssag", cfg=2.0, propagation=Propagation(("tap",)), batch=3),
    Settings(steps=2, guidance="cfg", propagation=Propagation(("sap",))),
    Settings(steps=2, guidance="pag", cfg=2.0, propagation=Propagation(sap_lagged=True)),
    Settings(steps=2, guidance="sag", cfg=2.0, propagation=OFF, denoise=0.5),
]


@pytest.mark.parametrize("settings", MIXED, ids=[f"{s.guidance}-{'+'.join(s.propagation.kinds)}" for s in MIXED])
def test_the_plan_is_what_runs(tiny: SVD, settings: Settings) -> None:
    plan = plan_tiles(5, 8, 16, TILE, factor=4, cuts=(1,))
    ran: list[Call] = []
    sample(tiny, latents(plan), plan, settings, tick=ran.append)
    assert len(ran) == unet_calls(plan, settings)
    passes = sum(GUIDANCE[settings.guidance].passes(power) for power in strengths(settings))
    tiles = Counter((call.step.index, call.branch.name, call.window, m) for call in ran for m in call.tiles)
    assert set(tiles.values()) == {1} and len(tiles) == passes * plan.tiles
    assert {call.step for call in ran} == {step_at(i, settings.propagation.kinds) for i in range(settings.steps)}


@pytest.mark.parametrize("propagation", [Propagation(), Propagation(sap_lagged=True)], ids=["synchronous", "lagged"])
def test_the_batch_changes_little(tiny: SVD, propagation: Propagation) -> None:
    plan = plan_tiles(6, 12, 12, TILE, factor=4)
    settings = Settings(steps=3, guidance="dssag", propagation=propagation)
    one, three = (sample(tiny, latents(plan), plan, replace(settings, batch=batch)) for batch in (1, 3))
    assert relative(three, one) < 1e-5


def test_the_seed_decides(tiny: SVD) -> None:
    lr, settings = latents(ONE), Settings(steps=1, guidance="none")
    a, b, c = (sample(tiny, lr, ONE, replace(settings, seed=seed)) for seed in (5, 5, 6))
    assert torch.equal(a, b) and relative(c, a) > 0.01


@pytest.mark.parametrize(("sampler", "steps"), [("euler", 1), ("euler", 3), ("ddpm", 3)])
def test_any_cut_of_a_video_gets_the_same_noise(tiny: SVD, sampler: str, steps: int) -> None:
    """Without propagation and overlap what a frame becomes depends on its window alone, at each step as at first."""
    plan = plan_tiles(8, 8, 8, TILE, 0.0, factor=4)
    settings = Settings(steps=steps, guidance="none", propagation=OFF, sampler=sampler)
    lr = latents(plan)
    whole = sample(tiny, lr, plan, settings, first_frame=3)
    half = plan_tiles(4, 8, 8, TILE, 0.0, factor=4)
    for part in (slice(0, 4), slice(4, 8)):
        assert relative(sample(tiny, lr[part], half, settings, first_frame=3 + part.start), whole[part]) < 1e-5
    assert relative(sample(tiny, lr, plan, settings), whole) > 0.01


def test_each_scene_has_its_own_context(with_clip: SVD) -> None:
    plan, settings = plan_tiles(7, 8, 8, TILE, cuts=(4,), factor=4), Settings(steps=2, guidance="none")
    lr, noise, context = latents(plan), latents(plan, 1), randn(2, 1, 16)
    together = sample(with_clip, lr, plan, settings, context, noise)
    for scene, part in enumerate((slice(0, 4), slice(4, 7))):
        alone = plan_tiles(len(lr[part]), 8, 8, TILE, factor=4)
        own = sample(with_clip, lr[part], alone, settings, context[scene : scene + 1], noise[part])
        assert torch.equal(together[part], own)
    assert relative(sample(with_clip, lr, plan, settings, context[:1], noise), together) > 1e-3
    with pytest.raises(SettingError, match=r"3 contexts.*each of 2 scene"):
        sample(with_clip, lr, plan, settings, randn(3, 1, 16), noise)


def test_a_scene_is_sampled_as_if_alone(tiny: SVD) -> None:
    plan = plan_tiles(7, 8, 8, TILE, cuts=(4,), factor=4)
    lr, noise = latents(plan), latents(plan, 1)
    settings = Settings(steps=3, guidance="dssag", propagation=Propagation())
    together = sample(tiny, lr, plan, settings, noise=noise)
    for part in (slice(0, 4), slice(4, 7)):
        alone = sample(tiny, lr[part], plan_tiles(len(lr[part]), 8, 8, TILE, factor=4), settings, noise=noise[part])
        assert torch.equal(together[part], alone)


def test_partial_denoise_stays_near_the_lr_latent(tiny: SVD) -> None:
    lr, settings = latents(ONE), Settings(steps=2, guidance="none")
    first = lr * tiny.scaling_factor
    near, far = (relative(sample(tiny, lr, ONE, replace(settings, denoise=d)), first) for d in (0.2, 1.0))
    assert near < far
    # Whatever the size of the LR latent, with no noise to speak of it comes back.
    steps = replace(settings, denoise=0.01, steps=1)
    assert noise_schedule(steps)[0] == pytest.approx(0.002) and relative(sample(tiny, lr, ONE, steps), first) < 0.02


def test_schedules_keep_their_steps_and_partial_ones_start_lower() -> None:
    starts: list[float] = []
    for denoise in (1.0, 0.7, 0.4, 0.1):
        schedule = noise_schedule(Settings(steps=5, denoise=denoise))
        assert len(schedule) == 6 and schedule[-1] == 0.0 and schedule[-2] == pytest.approx(0.002)
        starts.append(schedule[0])
    assert starts[0] == pytest.approx(700.0) and starts == sorted(starts, reverse=True) and len(set(starts)) == 4


def test_gamma_runs_over_the_schedule_and_starts_lower_at_partial_denoise() -> None:
    full = [s.gamma for s in strengths(Settings(steps=6))]
    assert full[0] == 1.0 and full[-1] == 0.0 and all(a > b for a, b in pairwise(full))
    starts = [strengths(Settings(steps=6, denoise=d))[0].gamma for d in (1.0, 0.8, 0.5, 0.2)]
    assert starts == sorted(starts, reverse=True) and len(set(starts)) == 4
    assert [s.gamma for s in strengths(Settings(steps=1))] == [1.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_from_the_model_stops_with_step_and_tile(tiny: SVD, bad: float) -> None:
    plan = plan_tiles(8, 8, 16, TILE, 0.0, factor=4)
    lr = latents(plan)
    lr[5, 0, 2, 13] = bad
    ran: list[Call] = []
    with pytest.raises(SamplingError, match=r"step 1, window 2 of 2, tile 2 of 2, branch cond"):
        sample(tiny, lr, plan, Settings(steps=3, propagation=OFF), tick=ran.append)
    assert len(ran) == 4 and tiny.active is None


def test_a_stop_within_a_tick_comes_through_at_once(tiny: SVD) -> None:
    def stop(call: Call) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(tiny, latents(ONE), ONE, Settings(steps=1), tick=stop)
    assert tiny.active is None


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"steps": -1}, "-1"),
        ({"steps": 1001}, "1001"),
        ({"denoise": 0.0}, "0.0"),
        ({"denoise": 1e-9}, "1e-09"),
        ({"denoise": 1.1}, "1.1"),
        ({"batch": 0}, "0"),
        ({"color": "sepia"}, "'sepia'"),
        ({"guidance": "dsag"}, "'dsag'"),
        ({"cfg": -1.0}, "-1.0"),
        ({"rho": -1.0}, "-1.0"),
        ({"rho": 0.0}, "0.0"),
        ({"rho": math.nan}, "nan"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, object], named: str) -> None:
    with pytest.raises(SettingError, match=named) as caught:
        Settings(**settings)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_the_limits_themselves_work() -> None:
    widest = Settings(rho=1e-3, denoise=1.0)
    for settings in (Settings(steps=1000, denoise=0.5), Settings(steps=4, denoise=0.01), widest):
        assert len(noise_schedule(settings)) == settings.steps + 1
        assert all(0 <= power.gamma <= 1 for power in strengths(settings))
