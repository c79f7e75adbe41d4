"""What is known of a Stable Diffusion: its plan, its null prompt, and the bundled one as the host has it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.tensors import randn, relative

from .conftest import NAME
from .small_sd import ALONE, CPU, SHAPE, WIDTH, apply_control, fill, own_control, plan_of, unet_config, video, wire
from .wiring import TILE, overridden, sampled, tiled, wrapped

# --- What is known of a model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["SD 1.5", "SD 2.1", "SDXL"])
def test_the_plan_in_words(host: ModuleType, nodes: dict[str, Any], models: dict[str, Any], kind: str) -> None:
    """Its banks are the keys and values that the layers really have."""
    model = tiled(nodes, models[kind])
    cost, tiling = (
        importlib.import_module(f"{NAME}.{name}") for name in ("nodes.host.cost", "vsr_ops.sampling.tiling")
    )
    seen: list[tuple[int, int]] = []

    def watch(func: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if k.shape[1] == q.shape[1]:
            seen.append((k.shape[1], k.shape[2] + v.shape[2]))
        return func(q, k, v, *args, **kwargs)

    sampled(host, overridden(tiled(nodes, models[kind], "none"), watch), wire(ALONE), 1.0, 1)
    found = cost.banks(model, "all", tiling.TileSize(*TILE))
    assert [(bank.rows * bank.cols, bank.width) for bank in found] == seen
    latent = wire()[2]
    picture, text = nodes["VSRTilePreview"].execute(model, 10, 2, latent=latent).args
    assert (picture.shape[0], picture.shape[2], picture.shape[3]) == (SHAPE[0], SHAPE[3] * 8, 3)
    assert f"{2 * 10 * plan_of(SHAPE).tiles:,} tile passes" in text and "s a tile pass" in text


def test_stock_tile(nodes: dict[str, Any], sd21: Any) -> None:
    model = importlib.import_module(f"{NAME}.nodes.host.model")
    assert str(model.own_tile(sd21)) == "64x64x14"


@pytest.mark.parametrize(("kind", "pooled"), [("SD 1.5", False), ("SD 2.1", False), ("SDXL", True)])
def test_null_prompt(host: ModuleType, models: dict[str, Any], kind: str, pooled: bool) -> None:
    """It samples; and zeros being zeros, as the same with 77 tokens."""
    prompt = importlib.import_module(f"{NAME}.nodes.latent").NullPrompt
    ((tokens, values),) = prompt.execute(models[kind]).args[0]
    assert torch.equal(tokens, torch.zeros(1, 1, WIDTH))
    assert set(values) == ({"pooled_output"} if pooled else set())
    null = [[tokens, values]]
    more = [[torch.zeros(1, 77, WIDTH), values]]
    latent = wire(ALONE)[2]
    found, same = (sampled(host, models[kind], (prompt, prompt, latent)) for prompt in (null, more))
    assert torch.isfinite(found).all()
    assert relative(same, found) < 1e-6


def test_null_prompt_carries_scene_cuts(host: ModuleType, nodes: dict[str, Any], sd21: Any) -> None:
    """To the plan of the run, in which no window crosses one."""
    prompt = importlib.import_module(f"{NAME}.nodes.latent").NullPrompt
    video = torch.cat(
        [randn(1, 32, 32, 3, seed=seed).sigmoid().expand(count, -1, -1, -1) for seed, count in ((1, 4), (2, 3))]
    )
    null = prompt.execute(sd21, image=video).args[0]
    assert (null[0][1]["vsr_cuts"], null[0][1]["vsr_frames"]) == ((4,), 7)
    frames: list[int] = []

    def note(executor: Any, x: Tensor, *args: Any, **rest: Any) -> Tensor:
        frames.append(x.shape[0])
        return executor(x, *args, **rest)

    values = (16, 16, 64, 0.5, "none", "lagged", 0, 4, 1, "ends", 0.0, 1.0, 1)
    model = nodes["VSRTiledDiffusion"].execute(wrapped(sd21, "diffusion_model", note), *values).args[0]
    sampled(host, model, (null, null, {"samples": randn(7, 4, 16, 16, seed=1)}), 1.0, 1)
    assert frames == [4, 3]


@pytest.mark.parametrize(("family", "width", "tokens"), [("SD15", 768, 77), ("SD20", 1024, 77), ("SD20", 32, 1)])
def test_null_prompt_of_published_widths(
    host: ModuleType, caplog: pytest.LogCaptureFixture, family: str, width: int, tokens: int
) -> None:
    """It works, and says in one line that those models know a text of their own."""
    models, bases = (importlib.import_module(f"comfy.{name}") for name in ("supported_models", "model_base"))
    config = getattr(models, family)(unet_config(context_dim=width, disable_unet_model_creation=True))
    base = bases.BaseModel(config, device=CPU)
    patcher = importlib.import_module("comfy.model_patcher").ModelPatcher
    found = host.null_prompt(patcher(base, load_device=CPU, offload_device=CPU))[0][0]
    assert torch.equal(found, torch.zeros(1, tokens, width))
    said = [record.getMessage() for record in caplog.records if record.name.startswith(NAME)]
    assert len(said) == (tokens == 77) and all(f"a MODEL of width {width}, which" in line for line in said)


def test_null_prompt_for_the_lite_svd(host: ModuleType, lite: Any) -> None:
    assert host.null_prompt(lite[0])[0][0].shape == (1, 1, 32)


def test_a_prompt_of_another_width(host: ModuleType, nodes: dict[str, Any], sd21: Any) -> None:
    wide = ([[torch.zeros(1, 77, 768), {}]], *wire(ALONE)[1:])
    with pytest.raises(ValueError, match="positive conditioning is 768 wide, this MODEL takes 16: expected"):
        sampled(host, tiled(nodes, sd21), wide, 1.0)


def test_a_latent_that_is_no_batch_of_frames(host: ModuleType, nodes: dict[str, Any], sd21: Any) -> None:
    positive, negative, _ = wire(ALONE)
    with pytest.raises(ValueError, match=r"LATENT has shape \(1, 4, 4, 16, 16\): expected frames as a batch"):
        sampled(host, tiled(nodes, sd21), (positive, negative, {"samples": torch.zeros(1, 4, 4, 16, 16)}), 1.0)


# --- The bundled Stable Diffusion -------------------------------------------------------------------------------------


LITE_CONFIG: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [32, 64, 96],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 32,
    "use_linear_projection": True,
}


def lite_file(path: Path, heads: Any, prediction: str) -> Any:
    """Random weights in a file of ours, and diffusers' UNet of them."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    files = importlib.import_module(f"{NAME}.vsr_ops.checkpoints.sd")
    config = {**LITE_CONFIG, "attention_head_dim": heads}
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**config)
    fill(unet)
    files.write_sd(path, files.SDWeights(config, prediction, unet.state_dict(), (24, 24, 8)), "a test's", torch.float32)
    return unet


@pytest.mark.parametrize("heads", [4, [2, 4, 6]], ids=["one number of heads", "one width of heads"])
@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
def test_a_file_of_ours_is_the_same_model(
    host: ModuleType, lite: Any, tmp_path: Path, heads: Any, prediction: str
) -> None:
    """As diffusers' UNet of the same weights, with the noise levels of the headless path."""
    sd, checkpoint = (importlib.import_module(f"{NAME}.vsr_ops.{name}") for name in ("backbones.sd", "checkpoints.svd"))
    path = tmp_path / "sd_lite.safetensors"
    unet = lite_file(path, heads, prediction)
    model, vae = host.load_lite(path, checkpoint.LITE)
    x, t, context = randn(2, 4, 24, 24, seed=1), torch.tensor([500.0, 500.0]), randn(2, 3, 32, seed=1)
    found = model.model.diffusion_model.float()(x, t, context)
    assert relative(found, unet(x, t, context).sample) < 1e-5
    sampling = model.get_model_object("model_sampling")
    assert relative(sampling.sigmas, sd.model_sigmas()) < 1e-5
    assert model.model.model_type.name == {"v_prediction": "V_PREDICTION", "epsilon": "EPS"}[prediction]
    assert str(model.get_attachment("vsr_tile")) == "24x24x8"
    assert model.model.latent_format.scale_factor == 0.18215
    for ours, theirs in zip(vae.first_stage_model.parameters(), lite[1].first_stage_model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def zero_snr(model: Any) -> Any:
    """As the host's own node has it."""
    node = importlib.import_module("comfy_extras.nodes_model_advanced").ModelSamplingDiscrete
    return node().patch(model, "v_prediction", True)[0]


def test_zero_terminal_snr_is_the_hosts(sd21: Any) -> None:
    """Levels, timesteps and schedule."""
    sd, samplers = importlib.import_module(f"{NAME}.vsr_ops.backbones.sd"), importlib.import_module("comfy.samplers")
    theirs, ours = zero_snr(sd21).get_model_object("model_sampling"), sd.model_sigmas(True)
    assert ((theirs.sigmas.double() - ours).abs() / ours).max() < 1e-5
    levels = torch.cat([ours[::37], torch.tensor([0.05, 3.3, 77.0, 900.0, 5000.0])])
    assert theirs.timestep(levels.float()).tolist() == [sd.timestep_of(float(level), True) for level in levels]
    found = samplers.calculate_sigmas(theirs, "normal", 12)
    times = torch.linspace(999, 0, 12, dtype=torch.float64).tolist()
    expected = torch.tensor([*(sd.sigma_at(time, True) for time in times), 0.0])
    assert (found - expected).abs().div(expected.clamp(1e-9)).max() < 1e-4


@pytest.mark.parametrize("controlled_too", [False, True], ids=["plain", "control"])
@pytest.mark.parametrize(
    ("propagation", "mode", "zero"),
    [("sap+tap", "lagged", False), ("sap", "synchronous", False), ("sap+tap", "lagged", True)],
)
def test_the_host_and_the_headless_path_agree(
    host: ModuleType,
    nodes: dict[str, Any],
    lite: Any,
    tmp_path: Path,
    propagation: str,
    mode: str,
    zero: bool,
    controlled_too: bool,
) -> None:
    """On what the host asks at every step: the same file, tiles, banks and control without a host."""
    rooms = ("backbones.sd", "checkpoints.svd", "modules.control")
    sd, checkpoint, controls = (importlib.import_module(f"{NAME}.vsr_ops.{name}") for name in rooms)
    names = ("calls", "guidance", "passes", "propagation", "schedule")
    calls, guidance, passes, carried, schedule = (
        importlib.import_module(f"{NAME}.vsr_ops.sampling.{name}") for name in names
    )
    path = tmp_path / "sd_lite.safetensors"
    fill(control := controls.Control.of(lite_file(path, 4, "v_prediction")).requires_grad_(False), 7)
    model, vae = host.load_lite(path, checkpoint.LITE)
    model = zero_snr(model) if zero else model
    shape = (6, 4, 24, 16)
    null = host.null_prompt(model)
    wired = (null, null, {"samples": randn(*shape, seed=1)})
    lr = torch.zeros(shape)
    if controlled_too:
        wired = apply_control(own_control(control), wired, 0.5, vae)
        lr = torch.stack(list(host.encoded(vae, video(shape).movedim(-1, 1), *shape[2:])))
    asked: list[tuple[Tensor, float, Tensor]] = []

    def note(executor: Any, x: Tensor, sigma: Tensor, *rest: Any, **more: Any) -> Tensor:
        out = executor(x, sigma, *rest, **more)
        asked.append((x.clone(), float(sigma.max()), out.clone()))
        return out

    values = (16, 16, 4, 0.5, propagation, mode, 0, 4, 1, "ends", 0.0, 1.0, 1)
    tiles = nodes["VSRTiledDiffusion"].execute(wrapped(model, "predict_noise", note), *values).args[0]
    sampled(host, tiles, wired, 1.0, 3)
    headless = sd.load_sd(path, CPU, torch.float32, control if controlled_too else None, 0.5)
    headless.zero_snr = zero
    settings = carried.Propagation.named(propagation, sap_lagged=mode == "lagged")
    plan = importlib.import_module(f"{NAME}.vsr_ops.sampling.tiling").plan_tiles(
        6, 24, 16, headless.tile.__class__(16, 16, 4), 0.5
    )
    run, bare = carried.TileRun(plan, settings), carried.TileRun(plan, carried.Propagation(()))
    for index, (x, sigma, found) in enumerate(asked):

        def evaluate(call: Any, of: Any = run, x: Tensor = x, sigma: float = sigma) -> Tensor:
            part, concat = (calls.gather_tiles(plan, call, z) for z in (x, lr))
            with headless.serving(of, call):
                return headless.denoise(part, sigma, concat, headless.context(None), call.frames)

        step = schedule.step_at(index, settings.kinds)
        difference = relative(found, passes.run_pass(run, step, guidance.COND, evaluate))
        print(f"{propagation}, {mode}, step {index}: {difference:.1e}")
        assert difference < 1e-4
        if index == 1:
            plain = passes.run_pass(bare, schedule.Step(1), guidance.COND, lambda call: evaluate(call, bare))
            assert relative(plain, found) > 1e-4
    assert len(asked) == 3 and (asked[0][1] > 4000) == zero


def test_a_missing_file(host: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sd_lite: .*sd_lite.safetensors is missing: expected"):
        host.load_lite(tmp_path / "sd_lite.safetensors", tmp_path / "svd_lite.safetensors")


def test_load_lite_offers_it(nodes: dict[str, Any]) -> None:
    (which,) = nodes["VSRLoadLite"].define_schema().inputs
    assert which.options == ["svd_lite", "sd_lite"]
    assert which.default == "svd_lite"
