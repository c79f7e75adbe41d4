"""The headless Stable Diffusion against diffusers' own schedulers, classes and conversion; its files; its control."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import TINY_VAE, randomise
from tests.support.tensors import randn, relative
from vsr_ops.backbones.sd import SD, build_sd, load_sd, model_sigmas, sigma_at, timestep_of
from vsr_ops.backbones.svd import find_layers
from vsr_ops.checkpoints.keymap import UNET, VAE, to_original
from vsr_ops.checkpoints.sd import SDWeights, read_sd, write_sd
from vsr_ops.checkpoints.sd_keymap import infer_sd_unet, picture_vae_map, sd_unet_map
from vsr_ops.checkpoints.svd import LITE
from vsr_ops.errors import CheckpointError, SettingError
from vsr_ops.modules.control import Control
from vsr_ops.pipeline.sampler import Settings, sample
from vsr_ops.sampling.calls import Call
from vsr_ops.sampling.guidance import COND
from vsr_ops.sampling.propagation import Propagation, TileRun
from vsr_ops.sampling.schedule import Step
from vsr_ops.sampling.tiling import TileSize, plan_tiles

if TYPE_CHECKING:
    from vsr_ops.backbones.svd import SVD

BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (32, 64),
    "layers_per_block": (2, 1),
    "attention_head_dim": (1, 2),
    "cross_attention_dim": 16,
    "use_linear_projection": True,
}
#: Heads and projections as Stable Diffusion 1.x and 2.x have them.
SD1 = TINY | {"layers_per_block": 2, "attention_head_dim": 8, "use_linear_projection": False, "upcast_attention": False}
SD2 = SD1 | {
    "block_out_channels": (64, 128),
    "attention_head_dim": (1, 2),
    "use_linear_projection": True,
    "upcast_attention": True,
}
PICTURE_VAE = TINY_VAE | {"up_block_types": ["UpDecoderBlock2D"] * 4, "layers_per_block": 2}


def unet_of(config: dict[str, Any] = TINY) -> UNet2DConditionModel:
    unet = UNet2DConditionModel(**config)
    randomise(unet, 3)
    return unet.eval().requires_grad_(False)


def weights_of(config: dict[str, Any] = TINY, prediction: str = "v_prediction") -> SDWeights:
    return SDWeights(dict(config), prediction, unet_of(config).state_dict(), (8, 8, 4))


def model_of(tiny: SVD, prediction: str = "v_prediction", **control: Any) -> SD:
    return SD(unet_of(), tiny.vae, None, TileSize(8, 8, 4), CPU, torch.float32, prediction=prediction, **control)


def acting(seed: int = 8) -> Control:
    made = Control(TINY).eval().requires_grad_(False)
    randomise(made, seed)
    return made


# --- Noise levels -----------------------------------------------------------------------------------------------------


def test_noise_levels_are_diffusers() -> None:
    kept = DDIMScheduler(**BETAS).alphas_cumprod.double()
    torch.testing.assert_close(model_sigmas(), ((1 - kept) / kept).sqrt(), rtol=3e-5, atol=0)  # float32 there


def test_a_timestep_is_the_nearest_of_diffusers() -> None:
    scheduler = EulerDiscreteScheduler(**BETAS)
    levels = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt().log().numpy()
    for sigma in (0.03, 0.111, 0.7, 1.0, 2.34, 14.0, 14.6):
        between = float(scheduler._sigma_to_t(torch.tensor(sigma).numpy(), levels))
        assert abs(timestep_of(sigma) - between) <= 0.501
    assert [timestep_of(float(model_sigmas()[t])) for t in (0, 1, 500, 998, 999)] == [0, 1, 500, 998, 999]
    assert (timestep_of(1e-4), timestep_of(700.0)) == (0, 999)


def test_sigmas_are_evenly_spaced_timesteps(tiny: SVD) -> None:
    model = model_of(tiny)
    scheduler = EulerDiscreteScheduler(**BETAS, timestep_spacing="linspace")
    for steps in (2, 4, 10, 28, 1000):
        scheduler.set_timesteps(steps)
        found = model.sigmas(steps)
        # Between two timesteps the scheduler is straight in sigma, not in its logarithm.
        assert found == pytest.approx([float(sigma) for sigma in scheduler.sigmas], rel=1e-4)
        assert len(found) == steps + 1 and found[-1] == 0 and all(a > b for a, b in pairwise(found))
    assert model.sigmas(1) == pytest.approx([model.sigma_max, 0])
    assert model.sigmas(2)[1] == pytest.approx(model.sigma_min)
    assert sigma_at(500.5) == pytest.approx((sigma_at(500) * sigma_at(501)) ** 0.5)


# --- The denoiser -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("served", [False, True])
@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("timestep", [0, 321, 999])
def test_denoise_is_diffusers_unet_and_scheduler(tiny: SVD, prediction: str, timestep: int, served: bool) -> None:
    scheduler = DDIMScheduler(**BETAS, prediction_type=prediction, clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(1000)
    sigma = float(model_sigmas()[timestep])
    clean, noise, context = randn(4, 4, 8, 8), randn(4, 4, 8, 8, seed=1), randn(1, 1, 16, seed=2)
    noisy = scheduler.add_noise(clean, noise, torch.tensor(timestep))
    found = unet_of()(noisy, timestep, context.expand(4, -1, -1)).sample
    expected = scheduler.step(found, timestep, noisy).pred_original_sample  # type: ignore[union-attr]
    model, x = model_of(tiny, prediction), clean + sigma * noise
    if served:
        plan = plan_tiles(4, 8, 8, TileSize(8, 8, 4))
        run, call = TileRun(plan, Propagation()), Call(Step(0, "sap"), COND, 0, (0,), 4, 8, 8)
        with torch.no_grad(), model.serving(run, call):
            ours = model.denoise(x, sigma, randn(4, 4, 8, 8, seed=3), context, 4)
    else:
        with torch.no_grad():
            ours = model.denoise(x, sigma, randn(4, 4, 8, 8, seed=3), context, 4)
    assert relative(ours, expected) < 2e-5


def test_an_exact_network_finds_the_truth(tiny: SVD) -> None:
    """One that knows the clean latents says v or noise by its definition; denoise gives those latents back."""
    clean, noise = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1)
    for prediction in ("v_prediction", "epsilon"):
        for sigma in (0.05, 1.0, 14.0):
            model = model_of(tiny, prediction)
            v = (noise - sigma * clean) / (sigma**2 + 1) ** 0.5
            answer = v if prediction == "v_prediction" else noise
            model.unet.forward = lambda *_, answer=answer, **__: (answer,)
            found = model.denoise(clean + sigma * noise, sigma, clean, model.context(None), 2)
            assert relative(found, clean) < 1e-5


def test_sap_joins_the_tiles_of_a_batch(tiny: SVD) -> None:
    """A batch of two tiles of four frames each: SAP lets the one see the other, nothing does without."""
    model, plan = model_of(tiny), plan_tiles(4, 8, 12, TileSize(8, 8, 4))
    assert len(plan.spatial) == 2
    x, context = randn(8, 4, 8, 8), model.context(None)

    def first(x: Tensor, step: Step) -> Tensor:
        call = Call(step, COND, 0, (0, 1), 4, 8, 8)
        with torch.no_grad(), model.serving(TileRun(plan, Propagation()), call):
            return model.denoise(x, 1.0, x, context, 4)[:4]

    other = torch.cat([x[:4], randn(4, 4, 8, 8, seed=5)])
    assert relative(first(x, Step(0)), first(other, Step(0))) < 1e-6
    assert relative(first(x, Step(0, "sap")), first(other, Step(0, "sap"))) > 1e-4


def test_the_main_job_samples_with_it(tiny: SVD) -> None:
    """Tiles, windows, SAP and TAP in turn, guidance and control."""
    lr, plan = randn(6, 4, 8, 12), plan_tiles(6, 8, 12, TileSize(8, 8, 4))
    assert len(plan.spatial) == 2 and len(plan.windows) == 2
    settings = Settings(steps=4, guidance="dssag", guidance_scale=1.0)
    runs = [sample(model_of(tiny, control=acting(), control_strength=s), lr, plan, settings) for s in (1.0, 1.0, 0.0)]
    assert runs[0].shape == lr.shape and torch.isfinite(runs[0]).all()
    assert torch.equal(runs[0], runs[1]) and relative(runs[2], runs[0]) > 1e-2
    alone = sample(model_of(tiny, control=acting()), lr, plan, replace(settings, propagation=Propagation(())))
    assert relative(alone, runs[0]) > 1e-4


def test_the_layers_of_full_size_stable_diffusion() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20))
    found = find_layers(unet)
    assert len(found) == 6 + 1 + 9
    ends = [name for name, layer in found.items() if "ends" in layer.places]
    assert [name.split(".transformer")[0] for name in ends] == [
        "down_blocks.0.attentions.0",
        "down_blocks.0.attentions.1",
        "up_blocks.3.attentions.1",
        "up_blocks.3.attentions.2",
    ]


# --- Control ----------------------------------------------------------------------------------------------------------


def test_no_control_a_new_one_and_strength_zero_are_the_same(tiny: SVD) -> None:
    x, lr, context = randn(4, 4, 8, 8), randn(4, 4, 8, 8, seed=1), randn(1, 1, 16, seed=2)
    plain = model_of(tiny).denoise(x, 1.0, lr, context, 4)
    for control in ({"control": Control.of(unet_of())}, {"control": acting(), "control_strength": 0.0}):
        assert torch.equal(model_of(tiny, **control).denoise(x, 1.0, lr, context, 4), plain)
    assert relative(model_of(tiny, control=acting()).denoise(x, 1.0, lr, context, 4), plain) > 1e-2


def test_the_hint_is_scaled_latents_and_reaches_diffusers_decoder(tiny: SVD) -> None:
    x, lr, context, control = randn(4, 4, 8, 8), randn(4, 4, 8, 8, seed=1), randn(1, 1, 16, seed=2), acting()
    sigma, strength, timestep = float(model_sigmas()[400]), 0.5, torch.tensor(400)
    model = model_of(tiny, control=control, control_strength=strength)
    scaled, tokens = x / (sigma**2 + 1) ** 0.5, context.expand(4, -1, -1)
    skips, middle = control(scaled, timestep, tokens, lr * model.scaling_factor)
    v = unet_of()(
        scaled,
        timestep,
        tokens,
        down_block_additional_residuals=tuple(skip * strength for skip in skips),
        mid_block_additional_residual=middle * strength,
    ).sample
    expected = x / (sigma**2 + 1) - v * sigma / (sigma**2 + 1) ** 0.5
    assert relative(model.denoise(x, sigma, lr, context, 4), expected) < 1e-5


def test_a_control_of_another_unet_is_refused(tiny: SVD) -> None:
    other = Control(TINY | {"cross_attention_dim": 24})
    with pytest.raises(SettingError, match="made for a UNet of widths"):
        model_of(tiny, control=other)
    with pytest.raises(SettingError, match="control strength is 11"):
        model_of(tiny, control=acting(), control_strength=11)


# --- Files ------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_bit_for_bit(tmp_path: Path) -> None:
    weights, path = weights_of(), tmp_path / "sd.safetensors"
    write_sd(path, weights, "nothing", torch.float32)
    back = read_sd(path)
    assert (back.unet_config, back.prediction, back.tile) == (weights.unet_config, "v_prediction", (8, 8, 4))
    assert back.unet.keys() == weights.unet.keys() and back.vae is None
    assert all(torch.equal(back.unet[name], value) for name, value in weights.unet.items())
    with safe_open(path, "pt") as file:
        assert file.metadata()["vsr.kind"] == "sd" and file.metadata()["vsr.trained_on"] == "nothing"


def test_a_file_is_what_diffusers_converts(tmp_path: Path) -> None:
    """Its names are the original ones: diffusers' own conversion gives diffusers' names back."""
    weights = weights_of(SD1)
    write_sd(tmp_path / "sd.safetensors", weights, "nothing", torch.float32)
    stored = load_file(tmp_path / "sd.safetensors")
    converted = convert_ldm_unet_checkpoint(dict(stored), {**SD1, "class_embed_type": None})
    assert converted.keys() == weights.unet.keys()
    assert all(torch.equal(converted[name], value) for name, value in weights.unet.items())


def test_the_maps_of_full_size_stable_diffusion() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    names = sd_unet_map(unet.config)
    assert len(names) == 686 and set(names.values()) == set(unet.state_dict())
    shapes = {old: tuple(unet.state_dict()[new].shape) for old, new in names.items()}
    inferred = infer_sd_unet(shapes)
    assert {key: unet.config[key] for key in inferred} == inferred


@pytest.mark.parametrize(("config", "prediction"), [(SD1, "epsilon"), (SD2, "v_prediction")])
def test_a_published_file_is_read(config: dict[str, Any], prediction: str, tmp_path: Path) -> None:
    levels = {"down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)}
    levels |= {"up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3}
    wide = config["block_out_channels"][0]
    heads = 8 if config is SD1 else (1, 1, 2, 2)
    unet = unet_of(
        config | levels | {"block_out_channels": (wide, wide, 2 * wide, 2 * wide), "attention_head_dim": heads}
    )
    vae = AutoencoderKL(**PICTURE_VAE).eval().requires_grad_(False)
    randomise(vae, 4)
    state = vae.state_dict()
    tensors = {old: unet.state_dict()[new] for old, new in sd_unet_map(unet.config).items()}
    originals = {old: to_original(old, new, state) for old, new in picture_vae_map(vae.config).items()}
    converted = convert_ldm_vae_checkpoint(dict(originals), vae.config)
    assert converted.keys() == state.keys() and all(torch.equal(converted[name], state[name]) for name in state)
    extra = {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.zeros(1, 77)}
    stored = {k: v.contiguous() for k, v in (tensors | originals | extra).items()}
    save_file(stored, tmp_path / "sd.safetensors")

    weights = read_sd(tmp_path / "sd.safetensors")
    model = build_sd(weights, CPU, torch.float32)
    assert model.prediction == weights.prediction == prediction and model.factor == 8
    x, context, frames = randn(2, 4, 8, 8), randn(1, 3, 16, seed=2), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        found = model.denoise(x, 1.0, x, context, 2)
        v = unet(x / 2**0.5, torch.tensor(timestep_of(1.0)), context.expand(2, -1, -1)).sample
        expected = x - v if prediction == "epsilon" else x / 2 - v / 2**0.5
        assert relative(found, expected) < 1e-5
        z = vae.encode(frames * 2 - 1).latent_dist.mode()
        assert relative(model.encode(frames), z) < 1e-5
        assert relative(model.decode(z), vae.decode(z).sample / 2 + 0.5) < 1e-5
    stored[UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias"] *= 0.01
    save_file(stored, tmp_path / "base.safetensors")
    assert read_sd(tmp_path / "base.safetensors").prediction == "epsilon"


def test_the_vae_of_own_files_is_the_bundled_svds(tmp_path: Path) -> None:
    write_sd(tmp_path / "sd.safetensors", weights_of(), "nothing")
    model = load_sd(tmp_path / "sd.safetensors", CPU, torch.float32)
    from vsr_ops.backbones.svd import load_svd

    svd = load_svd("lite", CPU, torch.float32)
    frames = torch.rand(2, 3, 16, 24)
    assert torch.equal(model.encode(frames), svd.encode(frames)) and model.scaling_factor == svd.scaling_factor
    assert torch.equal(model.decode(model.encode(frames)), svd.decode(svd.encode(frames)))
    assert not model.context(None).any() and model.context(None).shape == (1, 1, 16)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="weights of kind 'svd', expected kind 'sd'"):
        read_sd(LITE)
    with pytest.raises(CheckpointError, match="no such file"):
        read_sd(tmp_path / "none.safetensors")
    (tmp_path / "a.ckpt").write_bytes(b"\x80\x02")
    with pytest.raises(CheckpointError, match="a pickle"):
        read_sd(tmp_path / "a.ckpt")
    names = {UNET + "input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)}
    save_file(names, tmp_path / "inpainting.safetensors")
    with pytest.raises(CheckpointError, match="it takes 9 channels, expected 4"):
        read_sd(tmp_path / "inpainting.safetensors")
    save_file({VAE + "x": torch.zeros(1)}, tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match=r"not a unet of Stable Diffusion's layout .no tensor"):
        read_sd(tmp_path / "vae.safetensors")


def test_a_wrong_file_is_not_written(tmp_path: Path) -> None:
    weights = weights_of()
    for wrong, said in (
        (SDWeights(weights.unet_config, "x0", weights.unet, weights.tile), "prediction 'x0'"),
        (SDWeights(weights.unet_config, "epsilon", {}, weights.tile), "missing"),
        (SDWeights(weights.unet_config, "epsilon", weights.unet, weights.tile, {}, {}), "a VAE of its own"),
    ):
        with pytest.raises(CheckpointError, match=said):
            write_sd(tmp_path / "sd.safetensors", wrong, "nothing")
    write_sd(tmp_path / "sd.safetensors", weights, "nothing")
    stored = load_file(tmp_path / "sd.safetensors")
    with safe_open(tmp_path / "sd.safetensors", "pt") as file:
        metadata = file.metadata()
    save_file(stored, tmp_path / "new.safetensors", metadata | {"vsr.version": "2"})
    with pytest.raises(CheckpointError, match="update this pack"):
        read_sd(tmp_path / "new.safetensors")
    stored.pop(UNET + "out.2.weight")
    save_file(stored, tmp_path / "less.safetensors", metadata)
    with pytest.raises(CheckpointError, match=r"1 missing .model.diffusion_model.out.2.weight"):
        read_sd(tmp_path / "less.safetensors")
