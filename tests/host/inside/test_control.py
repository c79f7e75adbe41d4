"""The pack's control under the host's own Apply ControlNet and samplers, against diffusers' UNet without a host."""

from __future__ import annotations

import importlib
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.tensors import relative

from .conftest import NAME

FRAMES, HEIGHT, WIDTH, SEED, STEPS = 5, 16, 24, 3, 3
CONFIG: dict[str, Any] = {
    "block_out_channels": (32, 64, 96),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": (1, 2, 3),
    "transformer_layers_per_block": 1,
    "use_linear_projection": True,
}


@pytest.fixture(scope="module")
def ops(host: ModuleType) -> ModuleType:
    return importlib.import_module(f"{NAME}.vsr_ops.modules.control")


@pytest.fixture(scope="module")
def unet(host: ModuleType) -> Any:
    """diffusers' UNet, tiny, with random weights."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    torch.manual_seed(SEED)
    return UNet2DConditionModel(**CONFIG).eval()


def hosted(unet: Any, **changed: Any) -> Any:
    """The host's own MODEL with a UNet's weights, where its configuration is left as it is."""
    models, patcher = (importlib.import_module(f"comfy.{name}") for name in ("supported_models", "model_patcher"))
    keymap = importlib.import_module(f"{NAME}.vsr_ops.checkpoints.sd_keymap").sd_unet_map(CONFIG)
    config = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "channel_mult": [1, 2, 3],
        "num_res_blocks": [1, 1, 1],
        "transformer_depth": [1, 1, 0],
        "transformer_depth_output": [1, 1, 1, 1, 0, 0],
        "transformer_depth_middle": 1,
        "context_dim": 24,
        "adm_in_channels": None,
        "legacy": False,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": True,
        "use_temporal_attention": False,
        **changed,
    }
    made = models.SD20(config)
    made.unet_config["num_head_channels"] = 32
    made.set_inference_dtype(torch.float32, None)
    base = made.get_model({}, device=torch.device("cpu"))
    if not changed:
        state = unet.state_dict()
        names = {old.removeprefix("model.diffusion_model."): new for old, new in keymap.items()}
        base.diffusion_model.load_state_dict({old: state[new] for old, new in names.items()})
    return patcher.ModelPatcher(base, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))


@pytest.fixture(scope="module")
def model(unet: Any) -> Any:
    return hosted(unet)


@pytest.fixture(scope="module")
def control(ops: ModuleType, unet: Any) -> Any:
    """A control that acts: no convolution is zero."""
    torch.manual_seed(SEED + 1)
    made = ops.Control.of(unet).eval().requires_grad_(False)
    for convolution in (made.conv_in, *made.controlnet_down_blocks, made.controlnet_mid_block):
        torch.nn.init.normal_(convolution.weight, std=0.1)
    return made


def wrapped(host: ModuleType, control: Any) -> Any:
    """CONTROL_NET of a control."""
    module = importlib.import_module(f"{NAME}.nodes.host.control")
    patcher = importlib.import_module("comfy.model_patcher")
    return module.HostControl(patcher.ModelPatcher(control, torch.device("cpu"), torch.device("cpu")))


@pytest.fixture(scope="module")
def net(host: ModuleType, control: Any) -> Any:
    return wrapped(host, control)


@pytest.fixture(scope="module")
def video() -> Tensor:
    coarse = torch.rand(FRAMES, 3, HEIGHT // 2, WIDTH // 2, generator=torch.Generator().manual_seed(1))
    large = torch.nn.functional.interpolate(coarse, scale_factor=16, mode="bicubic").clamp(0, 1)
    return large.movedim(1, -1).contiguous()


def tokens(seed: int) -> Any:
    return [[torch.randn(1, 3, 24, generator=torch.Generator().manual_seed(seed)), {}]]


def applied(net: Any, image: Tensor, vae: Any, strength: float = 0.7, start: float = 0.0, end: float = 1.0) -> Any:
    """Positive and negative through the host's own Apply ControlNet."""
    node = importlib.import_module("nodes").ControlNetApplyAdvanced()
    return node.apply_controlnet(tokens(1), tokens(2), net, image, strength, start, end, vae)


def sampled(model: Any, pair: Any, cfg: float = 2.0, frames: int = FRAMES, height: int = HEIGHT) -> Tensor:
    """Through the host's own KSampler."""
    node = importlib.import_module("nodes").KSampler()
    latent = {"samples": torch.zeros(frames, 4, height, WIDTH)}
    return node.sample(model, SEED, STEPS, cfg, "euler", "normal", *pair, latent)[0]["samples"]


def headless(model: Any, unet: Any, control: Any, hint: Tensor, strength: float, cfg: float) -> Tensor:
    """The same without the host: diffusers' UNet and Euler's steps, on the host's noise and schedule."""
    samplers, sample = (importlib.import_module(f"comfy.{name}") for name in ("samplers", "sample"))
    sampling = model.get_model_object("model_sampling")
    sigmas = samplers.calculate_sigmas(sampling, "normal", STEPS)
    noise = sample.prepare_noise(torch.zeros(FRAMES, 4, HEIGHT, WIDTH), SEED)
    x = sampling.noise_scaling(sigmas[0], noise, torch.zeros_like(noise), True)
    for sigma, following in pairwise(sigmas):
        estimates: list[Tensor] = []
        for seed in (1, 2):
            context = tokens(seed)[0][0].expand(FRAMES, -1, -1)
            time, z = sampling.timestep(sigma).float(), x / (sigma**2 + 1).sqrt()
            skips, middle = control(z, time, context, hint)
            noise = unet(
                z,
                time,
                context,
                down_block_additional_residuals=[strength * skip for skip in skips],
                mid_block_additional_residual=strength * middle,
            ).sample
            estimates.append(x - sigma * noise)
        denoised = estimates[1] + cfg * (estimates[0] - estimates[1])
        x = x + (x - denoised) / sigma * (following - sigma)
    return x / 0.18215


def test_the_host_and_diffusers_agree(
    model: Any, unet: Any, control: Any, net: Any, lite: Any, video: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = lite[1]
    hint = torch.cat([vae.encode(frame[None]) for frame in video]) * 0.18215
    expected = headless(model, unet, control, hint, 0.7, 2.0)
    found = sampled(model, applied(net, video, vae))
    assert relative(found, expected) < 1e-5
    assert relative(found, sampled(model, (tokens(1), tokens(2)))) > 0.1
    # Frames in chunks, and the branches one after the other: the same.
    module = importlib.import_module(f"{NAME}.nodes.host.control")
    monkeypatch.setattr(module, "TOGETHER", 2 * HEIGHT * WIDTH)
    assert relative(sampled(model, applied(net, video, vae)), expected) < 1e-5
    management = importlib.import_module("comfy.model_management")
    monkeypatch.setattr(management, "get_free_memory", lambda dev=None, torch_free_too=False: 0)
    assert relative(sampled(model, applied(net, video, vae)), expected) < 1e-5


def test_off_is_the_identity(
    host: ModuleType, ops: ModuleType, model: Any, unet: Any, net: Any, lite: Any, video: Tensor
) -> None:
    plain = sampled(model, (tokens(1), tokens(2)))
    fresh = wrapped(host, ops.Control.of(unet).requires_grad_(False))
    assert torch.equal(sampled(model, applied(fresh, video, lite[1])), plain)
    assert torch.equal(sampled(model, applied(net, video, lite[1], 0.0)), plain)
    # Past the host's own node, which takes strength 0 out itself.
    positive, negative = applied(net, video, lite[1])
    positive[0][1]["control"].strength = 0.0
    assert torch.equal(sampled(model, (positive, negative)), plain)


def test_the_range_of_steps_holds(model: Any, net: Any, lite: Any, video: Tensor) -> None:
    plain, all_steps = sampled(model, (tokens(1), tokens(2))), sampled(model, applied(net, video, lite[1]))
    first = sampled(model, applied(net, video, lite[1], end=0.3))
    assert relative(first, plain) > 1e-3 and relative(first, all_steps) > 1e-3
    assert torch.equal(sampled(model, applied(net, video, lite[1], start=1.0)), plain)


def test_one_picture_serves_all_frames(model: Any, net: Any, lite: Any, video: Tensor) -> None:
    still = video[:1]
    repeated = sampled(model, applied(net, still.expand(FRAMES, -1, -1, -1), lite[1]))
    assert relative(sampled(model, applied(net, still, lite[1])), repeated) < 1e-6


def test_controls_add_up_in_a_chain(model: Any, net: Any, lite: Any, video: Tensor) -> None:
    """Two of strength 0.35 are one of 0.7, and each keeps what it was given."""
    node = importlib.import_module("nodes").ControlNetApplyAdvanced()
    once = applied(net, video, lite[1], 0.35)
    twice = node.apply_controlnet(*once, net, video, 0.35, 0.0, 1.0, lite[1])
    assert relative(sampled(model, twice), sampled(model, applied(net, video, lite[1]))) < 1e-4
    assert net.cond_hint_original is None


def test_a_tile_gets_what_its_place_would(model: Any, control: Any, net: Any, lite: Any, video: Tensor) -> None:
    """What waits in a tiled run's options is the control on the tile alone; nothing of the whole frame is returned."""
    module, run = (importlib.import_module(f"{NAME}.nodes.{name}") for name in ("host.control", "session.run"))
    own = applied(net, video, lite[1])[0][0][1]["control"]
    own.pre_run(model.model, model.get_model_object("model_sampling").percent_to_sigma)
    x = torch.randn(2 * FRAMES, 4, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(4))
    t, context = torch.full((2 * FRAMES,), 2.0), tokens(1)[0][0].expand(2 * FRAMES, -1, -1)

    class Tiled:
        tiles = object()

    options: dict[str, Any] = {run.KEY: {"run": Tiled()}}
    assert own.get_control(x, t, {"c_crossattn": context}, 2, options) is None
    (waiting,) = options[module.CONTROLS]
    rows, cols, frames = slice(4, 12), slice(8, 24), slice(1, 3)
    tiles = [(slice(0, 8), slice(0, 16)), (rows, cols)]
    part = torch.cat([x[frames][..., r, c] for r, c in tiles])
    found = waiting(part, t[:4], context[:4], tiles, frames)
    sigma = torch.tensor(2.0)
    z, time = part / (sigma**2 + 1).sqrt(), model.get_model_object("model_sampling").timestep(sigma)
    hint = torch.cat([lite[1].encode(frame[None]) for frame in video[frames]]) * 0.18215
    skips, middle = control(z, time, context[:4], torch.cat([hint[..., r, c] for r, c in tiles]))
    for value, expected in zip([*found["output"], *found["middle"]], [*skips, middle], strict=True):
        assert relative(value, 0.7 * expected) < 1e-5
    twice = module.merged([waiting, waiting], None, part, t[:4], context[:4], tiles, frames)
    assert twice is not None and relative(twice["middle"][0], 2 * 0.7 * middle) < 1e-5
    before = {"input": [torch.ones(1)], "output": [None], "middle": [torch.ones(1)]}
    all_of = module.merged([waiting], before, part, t[:4], context[:4], tiles, frames)
    assert all_of is not None and len(all_of["input"]) == 1 and len(all_of["output"]) == len(skips)
    assert relative(all_of["middle"][0], 0.7 * middle + 1) < 1e-5
    assert len(before["output"]) == 1
    own.cleanup()


def tiled(nodes: dict[str, Any], model: Any, height: int, width: int, frames: int) -> Any:
    values = (height, width, frames, 0.5, "none", "lagged", 0, 4, 1, "ends", 0.0, 1.0, 1)
    return nodes["VSRTiledDiffusion"].execute(model, *values).args[0]


def test_in_a_tiled_run_it_acts_tile_by_tile(
    host: ModuleType,
    nodes: dict[str, Any],
    ops: ModuleType,
    model: Any,
    unet: Any,
    net: Any,
    lite: Any,
    video: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, pair = sampled(model, applied(net, video, lite[1])), applied(net, video, lite[1])
    assert relative(sampled(tiled(nodes, model, HEIGHT, WIDTH, FRAMES), pair), whole) < 1e-5
    parts, plain = tiled(nodes, model, 16, 16, 4), (tokens(1), tokens(2))
    fresh = wrapped(host, ops.Control.of(unet).requires_grad_(False))
    assert torch.equal(sampled(parts, applied(fresh, video, lite[1])), sampled(parts, plain))
    # Never more of it at once than one tile of one branch.
    module, seen = importlib.import_module(f"{NAME}.vsr_ops.modules.control").Control, set[tuple[int, ...]]()
    forward = module.forward

    def note(self: Any, z: Tensor, *rest: Any) -> Any:
        seen.add(tuple(z.shape))
        return forward(self, z, *rest)

    monkeypatch.setattr(module, "forward", note)
    found = sampled(parts, pair)
    assert seen == {(4, 4, 16, 16)}
    assert relative(found, sampled(parts, plain)) > 0.1
    # Twice in a chain, with a ControlNet that gives nothing between them.
    base = importlib.import_module("comfy.controlnet").ControlBase

    class Nothing(base):  # type: ignore[misc, valid-type]
        def get_control(self, *given: Any) -> Any:
            before = self.previous_controlnet.get_control(*given)
            return self.control_merge({"input": [], "middle": [], "output": []}, before, None)

    half = [applied(net, video, lite[1], 0.35)[i][0][1]["control"] for i in (0, 1)]
    between = Nothing().set_previous_controlnet(half[0])
    half[1].set_previous_controlnet(between)
    twice = tuple([[tokens, {**values, "control": half[1]}]] for ((tokens, values),) in pair)
    assert relative(sampled(parts, twice), found) < 1e-4


def test_bad_input(model: Any, unet: Any, net: Any, lite: Any, video: Tensor) -> None:
    vae = lite[1]
    error = importlib.import_module(f"{NAME}.vsr_ops.errors").SettingError
    with pytest.raises(error, match="has no VAE"):
        applied(net, video, None)
    with pytest.raises(error, match="three channels"):
        applied(net, video[..., :1], vae)
    with pytest.raises(error, match="has 4 frames, the LATENT 5"):
        sampled(model, applied(net, video[:4], vae))
    with pytest.raises(error, match=r"is 192x88 \(width x height\), what is sampled 192x128"):
        sampled(model, applied(net, video[:, :-40], vae))
    with pytest.raises(
        error, match=r"widths \[32, 64, 96\], blocks \[1, 1, 1\] and context 24, the MODEL .* context 40"
    ):
        sampled(hosted(unet, context_dim=40), applied(net, video, vae))
    with pytest.raises(error, match="takes 4 channels, the MODEL is a SVD_img2vid"):
        sampled(lite[0], applied(net, video, vae))


def test_the_loader(ops: ModuleType, model: Any, control: Any, net: Any, lite: Any, video: Tensor) -> None:
    """From the host's folder for ControlNets, through the node."""
    from pathlib import Path

    node = importlib.import_module(f"{NAME}.nodes.load").LoadControl
    folder = Path(importlib.import_module("folder_paths").get_folder_paths("controlnet")[0])
    folder.mkdir(parents=True, exist_ok=True)
    ops.write_control(folder / "mine.safetensors", control, "nothing")
    assert "mine.safetensors" in node.define_schema().inputs[0].options
    (loaded,) = node.execute("mine.safetensors").args
    weights = [module for module in loaded.model.modules() if next(module.parameters(False), None) is not None]
    assert all(hasattr(module, "comfy_cast_weights") for module in weights)
    found = sampled(model, applied(loaded, video, lite[1]))
    assert relative(found, sampled(model, applied(net, video, lite[1]))) < 1e-2
    # Where memory is short the host leaves weights where they are, to be cast as they are used.
    loaded.patcher.unpatch_model()
    loaded.patcher.load(torch.device("cpu"), lowvram_model_memory=1)
    assert loaded.model.model_lowvram and all(module.comfy_cast_weights for module in weights)
    inputs = [torch.ones(1, 4, 8, 8), torch.ones(1), tokens(1)[0][0], torch.ones(1, 4, 8, 8)]
    middle = loaded.model(*inputs)[1]
    assert relative(middle, control(*inputs)[1]) < 1e-2
    with pytest.raises(ValueError, match=r"which is 'theirs\.pth'"):
        node.execute("theirs.pth")
