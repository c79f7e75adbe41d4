"""The headless SVD against diffusers' own parts: layers, attention, preconditioning, schedule, VAE, CLIP's pixels."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.support.tensors import randn, relative
from vsr_ops.backbones.svd import (
    SIGMA_MAX,
    SIGMA_MIN,
    clip_pixels,
    find_layers,
    pick_device,
    pick_dtype,
    sigmas,
    spatial_self_attention,
)
from vsr_ops.errors import DeviceError
from vsr_ops.sampling.calls import Call
from vsr_ops.sampling.guidance import COND
from vsr_ops.sampling.propagation import Propagation, TileRun
from vsr_ops.sampling.schedule import Step
from vsr_ops.sampling.tiling import TileSize, plan_tiles

if TYPE_CHECKING:
    from diffusers import UNetSpatioTemporalConditionModel

    from vsr_ops.backbones.svd import SVD


def untouched(tiny: SVD) -> UNetSpatioTemporalConditionModel:
    """diffusers' UNet as it comes, with the weights of `tiny` and the original's norm epsilon."""
    from diffusers import UNetSpatioTemporalConditionModel

    from vsr_ops.checkpoints.svd import match_host_epsilon

    unet = UNetSpatioTemporalConditionModel.from_config(tiny.unet.config)
    unet.load_state_dict(tiny.unet.state_dict())
    match_host_epsilon(unet)
    return unet.eval()


def test_the_fixture_is_a_small_svd_with_nothing_constant(tiny: SVD) -> None:
    assert 1e6 < sum(p.numel() for p in tiny.unet.parameters()) < 3e6
    parameters = [*tiny.unet.named_parameters(), *tiny.vae.named_parameters()]
    constant = [name for name, p in parameters if p.numel() > 1 and float(p.std()) == 0]
    assert constant == []


def test_the_layers_of_full_size_svd() -> None:
    from diffusers import UNetSpatioTemporalConditionModel

    with torch.device("meta"):
        unet = UNetSpatioTemporalConditionModel()
    assert unet.config["block_out_channels"] == (320, 640, 1280, 1280)
    names = [name for name, _ in spatial_self_attention(unet)]
    # 2 in each of three down blocks, 1 in the middle, 3 in each of three up blocks.
    assert len(names) == 6 + 1 + 9
    found = find_layers(unet).items()
    assert len(found) == 16
    places = {
        name.removesuffix(".transformer_blocks.0.attn1"): place
        for name, layer in found
        for place in layer.places & {"ends", "middle"}
    }
    assert places == {
        "down_blocks.0.attentions.0": "ends",
        "down_blocks.0.attentions.1": "ends",
        "mid_block.attentions.0": "middle",
        "up_blocks.3.attentions.1": "ends",
        "up_blocks.3.attentions.2": "ends",
    }
    modules = dict(unet.named_modules())
    for name, module in spatial_self_attention(unet):
        assert modules[name] is module
        assert not getattr(module, "is_cross_attention", True)


def test_the_layers_come_in_the_order_the_unet_runs_them(tiny: SVD) -> None:
    unet, ran = untouched(tiny), []
    names = {module: name for name, module in spatial_self_attention(unet)}
    hooks = [module.register_forward_hook(lambda m, *_: ran.append(names[m])) for module in names]
    with torch.no_grad():
        unet(randn(1, 2, 8, 8, 8), torch.tensor(0.3), randn(1, 1, 16), torch.tensor([[8.0, 127.0, 0.0]]))
    for hook in hooks:
        hook.remove()
    assert ran == list(names.values())


@pytest.mark.parametrize("served", [False, True])
@pytest.mark.parametrize(("sigma", "frames"), [(700.0, 4), (1.3, 4), (0.002, 4), (1.3, 1)])
def test_denoise_is_diffusers_unet_and_scheduler(tiny: SVD, sigma: float, frames: int, served: bool) -> None:
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(
        prediction_type="v_prediction", timestep_type="continuous", use_karras_sigmas=True
    )
    scheduler.set_timesteps(1)
    scheduler.sigmas = torch.tensor([sigma, 0.0])
    scheduler.timesteps = 0.25 * torch.tensor([sigma]).log()
    x, concat, context = randn(frames, 4, 8, 8), randn(frames, 4, 8, 8, seed=1), randn(1, 1, 16, seed=2)
    x *= (sigma**2 + 1) ** 0.5
    with torch.no_grad():
        timestep = scheduler.timesteps[0]
        model_input = torch.cat([scheduler.scale_model_input(x, timestep), concat], 1)
        conditions = torch.tensor([[8.0, 127.0, 0.0]])
        v = untouched(tiny)(model_input[None], timestep, context, conditions).sample[0]
        expected = scheduler.step(v, timestep, x).pred_original_sample
        if served:
            plan = plan_tiles(frames, 8, 8, TileSize(8, 8, 4))
            run, call = TileRun(plan, Propagation()), Call(Step(0, "sap"), COND, 0, (0,), frames, 8, 8)
            with tiny.serving(run, call):
                found = tiny.denoise(x, sigma, concat, context, frames)
        else:
            found = tiny.denoise(x, sigma, concat, context, frames)
    assert tiny.active is None
    assert relative(found, expected) < 5e-6


def test_a_batch_of_videos_is_each_alone(tiny: SVD) -> None:
    x, concat, context = randn(9, 4, 8, 12), randn(9, 4, 8, 12, seed=1), randn(1, 1, 16, seed=2)
    with torch.no_grad():
        together = tiny.denoise(x, 1.0, concat, context, 3)
        alone = [tiny.denoise(x[i : i + 3], 1.0, concat[i : i + 3], context, 3) for i in (0, 3, 6)]
    assert relative(together, torch.cat(alone)) < 1e-5


def test_condition_concat_and_context_all_reach_the_output(tiny: SVD) -> None:
    x, concat, context = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1), randn(1, 1, 16, seed=2)
    with torch.no_grad():
        base = tiny.denoise(x, 1.0, concat, context, 2)
        others = [
            tiny.denoise(x, 1.0, torch.zeros_like(concat), context, 2),
            tiny.denoise(x, 1.0, concat, torch.zeros_like(context), 2),
        ]
    assert all(relative(other, base) > 1e-3 for other in others)


def test_attention_stops_serving_even_after_an_error(tiny: SVD) -> None:
    plan = plan_tiles(4, 8, 8, TileSize(8, 8, 4))
    call = Call(Step(0), COND, 0, (0,), 4, 8, 8)
    with pytest.raises(KeyboardInterrupt), tiny.serving(TileRun(plan, Propagation()), call):
        raise KeyboardInterrupt
    assert tiny.active is None


@pytest.mark.parametrize("steps", [1, 2, 10, 25, 100])
def test_sigmas_are_karras_spacing(steps: int) -> None:
    found = sigmas(steps)
    assert len(found) == steps + 1 and found[-1] == 0.0
    low, high = SIGMA_MIN ** (1 / 7), SIGMA_MAX ** (1 / 7)
    expected = [(high + i / max(steps - 1, 1) * (low - high)) ** 7 for i in range(steps)]
    assert found[:-1] == pytest.approx(expected, rel=1e-4)
    assert found[0] == pytest.approx(700.0) and all(a > b for a, b in pairwise(found))


def test_encode_is_the_mode_of_diffusers_distribution(tiny: SVD) -> None:
    frames = torch.rand(2, 3, 40, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = tiny.vae.encode(frames * 2 - 1).latent_dist.mode()
        found = tiny.encode(frames)
    assert found.shape == (2, 4, 5, 3) and relative(found, expected) < 1e-6


def test_decode_is_diffusers_decode(tiny: SVD) -> None:
    latents = randn(3, 4, 5, 3)
    with torch.no_grad():
        expected = tiny.vae.decode(latents, num_frames=3).sample / 2 + 0.5
        found = tiny.decode(latents)
    assert found.shape == (3, 3, 40, 24) and relative(found, expected) < 1e-6


def test_without_an_image_encoder_the_context_is_zero(tiny: SVD) -> None:
    for image in (None, torch.rand(1, 3, 64, 64)):
        context = tiny.context(image)
        assert context.shape == (1, 1, 16) and not context.any()


@pytest.mark.parametrize("size", [(64, 96), (224, 224), (300, 200), (288, 512)])
def test_clip_sees_the_pixels_diffusers_gives_it(size: tuple[int, int]) -> None:
    from diffusers.pipelines.stable_video_diffusion import pipeline_stable_video_diffusion as reference
    from transformers import CLIPImageProcessorPil

    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    resized: Any = reference._resize_with_antialiasing(image * 2 - 1, (224, 224))  # type: ignore[attr-defined]
    expected = CLIPImageProcessorPil()(
        images=(resized + 1) / 2,
        do_normalize=True,
        do_center_crop=False,
        do_resize=False,
        do_rescale=False,
        return_tensors="pt",
    ).pixel_values
    assert relative(clip_pixels(image), expected) < 1e-6


def test_devices_that_are_not_there_are_refused() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("gpu", "cuda:99", "xpu", ""):
        with pytest.raises(DeviceError, match=f"'{name}'") as caught:
            pick_device(name)
        assert "\n" not in str(caught.value)


def test_precisions() -> None:
    cpu = torch.device("cpu")
    assert pick_dtype("auto", cpu) == torch.float32 and pick_dtype("bfloat16", cpu) == torch.bfloat16
    assert pick_dtype("auto", torch.device("cuda")) == torch.float16
    with pytest.raises(DeviceError, match="'fp8'") as caught:
        pick_dtype("fp8", cpu)
    assert "bfloat16" in str(caught.value)
