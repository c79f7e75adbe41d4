"""Flow and alignment in the host: what the nodes hand on, under every sampler, in any order of wiring."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.support.tensors import relative

from . import wiring
from .conftest import NAME, SIZE

SEED = 5
#: Of the video that `wired` is of, in pixels.
FRAMES, HEIGHT, WIDTH = SIZE[0], SIZE[1] * 8, SIZE[2] * 8


def module(name: str) -> ModuleType:
    """One of the pack's own, as the host has loaded it."""
    return importlib.import_module(f"{NAME}.vsr_ops.{name}")


@pytest.fixture(scope="session")
def video(host: ModuleType) -> Tensor:
    """A pattern that slides by four pixels a frame."""
    rng = torch.Generator().manual_seed(1)
    coarse = torch.rand(1, 3, HEIGHT // 16 + FRAMES, WIDTH // 16, generator=rng)
    large = torch.nn.functional.interpolate(coarse, scale_factor=16, mode="bicubic").clamp(0, 1)[0]
    return torch.stack([large[:, 4 * i : 4 * i + HEIGHT] for i in range(FRAMES)]).movedim(1, -1).contiguous()


def estimated(nodes: dict[str, Any], video: Tensor, cuts: str = "one scene") -> Any:
    return nodes["VSREstimateFlow"].execute(video, "dis", cuts).args[0]


@pytest.fixture(scope="session")
def flow(nodes: dict[str, Any], video: Tensor) -> Any:
    return estimated(nodes, video)


def guided(
    nodes: dict[str, Any],
    model: Any,
    flow: Any,
    strength: float = 0.05,
    start: float = 0.0,
    end: float = 1.0,
    mode: str = "gradient",
    scale: str = "bounded",
) -> Any:
    return nodes["VSRFlowGuidedLatents"].execute(model, flow, strength, start, end, mode, scale).args[0]


def tiled(nodes: dict[str, Any], model: Any) -> Any:
    values = (16, 16, 4, 0.5, "sap+tap", "lagged", 0, 4, 1, "ends", 0.0, 1.0, 1)
    return nodes["VSRTiledDiffusion"].execute(model, *values).args[0]


def sampled(host: ModuleType, model: Any, wired: Any, steps: int = 1) -> Tensor:
    positive, negative, latent = wired
    return host.sample(host.guider(model, positive, negative, 2.0), latent, SEED, steps, "euler", "karras", 1.0)[
        "samples"
    ]


def ksampled(model: Any, *wired: Any) -> Tensor:
    """The host's own KSampler node, as the host runs it: where autograd is shut off."""
    with torch.inference_mode():
        node = importlib.import_module("nodes").KSampler()
        return node.sample(model, SEED, 1, 2.0, "euler", "karras", *wired)[0]["samples"]


def test_the_flow_is_that_of_the_video(flow: Any, video: Tensor) -> None:
    assert (flow.frames, flow.size, flow.cuts) == (FRAMES, (HEIGHT, WIDTH), ())
    inner = flow.forward[..., 16:-16, 16:-16]
    assert float((inner - torch.tensor([0.0, -4.0]).view(1, 2, 1, 1)).abs().mean()) < 0.3


def test_the_preview_is_pictures_of_the_videos_length(nodes: dict[str, Any], flow: Any) -> None:
    colours, visible = nodes["VSRFlowPreview"].execute(flow).args
    assert colours.shape == visible.shape == (FRAMES - 1, HEIGHT, WIDTH, 3)
    assert 0.5 < float(visible.mean()) < 1


def test_alignment_acts_once_on_tiles_put_together_and_off_is_off(
    host: ModuleType, nodes: dict[str, Any], lite: Any, wired: Any, flow: Any
) -> None:
    base = tiled(nodes, lite[0])
    on = guided(nodes, base, flow)
    plain, aligned = sampled(host, base, wired), sampled(host, on, wired)
    error, small = module("sampling.align").motion_error, module("flow.field").latent_flow(flow, *SIZE[1:], 8, 0.5)
    assert error(aligned, small) < 0.9 * error(plain, small)
    assert torch.equal(sampled(host, tiled(nodes, guided(nodes, lite[0], flow)), wired), aligned)
    # Strength 0 takes an earlier alignment off; outside its share of the steps it does nothing.
    assert torch.equal(sampled(host, guided(nodes, on, flow, 0.0), wired), plain)
    assert torch.equal(sampled(host, guided(nodes, base, flow, start=1.0), wired), plain)
    assert torch.equal(sampled(host, base, wired), plain)


def test_perturbed_guidance_before_or_after_is_the_same(
    host: ModuleType, nodes: dict[str, Any], lite: Any, wired: Any, flow: Any
) -> None:
    before = guided(nodes, host.patch_perturbed(lite[0], "pag", 1.0, "middle"), flow)
    after = host.patch_perturbed(guided(nodes, lite[0], flow), "pag", 1.0, "middle")
    assert torch.equal(sampled(host, before, wired), sampled(host, after, wired))


@pytest.mark.parametrize(("strength", "mode"), [(0.05, "gradient"), (0.5, "propagate")])
def test_untiled_svd_under_the_hosts_own_sampler(
    nodes: dict[str, Any], lite: Any, wired: Any, flow: Any, strength: float, mode: str
) -> None:
    plain = ksampled(lite[0], *wired)
    aligned = ksampled(guided(nodes, lite[0], flow, strength, mode=mode), *wired)
    assert bool(torch.isfinite(aligned).all()) and not torch.equal(aligned, plain)
    assert torch.equal(ksampled(guided(nodes, lite[0], flow, 0.0, mode=mode), *wired), plain)


@pytest.mark.parametrize("scale", ["bounded", "ddpm"])
@pytest.mark.parametrize("sampler", ["euler", "dpm_2"])
def test_every_call_is_scaled_as_its_step(
    host: ModuleType, nodes: dict[str, Any], lite: Any, wired: Any, flow: Any, scale: str, sampler: str
) -> None:
    """Also those between two noise levels, which a second-order sampler makes."""
    calls: list[tuple[float, Tensor]] = []
    before: list[Tensor] = []

    def note(executor: Any, x: Tensor, sigma: Tensor, *rest: Any, **more: Any) -> Tensor:
        out = executor(x, sigma, *rest, **more)
        calls.append((float(sigma.max()), out.clone()))
        return out

    def unaligned(args: dict[str, Any]) -> Tensor:
        before.append(args["denoised"].clone())
        return args["denoised"]

    # A wrapper that was there first is outermost.
    model = wiring.wrapped(lite[0], "predict_noise", note)
    model.set_model_sampler_post_cfg_function(unaligned)
    wiring.sampled(host, guided(nodes, model, flow, 0.02, scale=scale), wired, 1.0, 3, sampler)
    sampling = lite[0].get_model_object("model_sampling")
    levels = importlib.import_module("comfy.samplers").calculate_sigmas(sampling, "karras", 3).tolist()
    assert len(calls) == len(before) == {"euler": 3, "dpm_2": 5}[sampler]
    ops, small = module("sampling.align"), module("flow.field").latent_flow(flow, *SIZE[1:], 8, 0.5)
    changed = 0
    for (sigma, found), plain in zip(calls, before, strict=True):
        following = max(level for level in levels if level < sigma * (1 - 1e-4))
        expected = ops.align(plain, small, 0.02, ops.SCALES[scale](sigma, following), rounds=ops.ROUNDS)
        assert torch.equal(found, expected)
        changed += not torch.equal(found, plain)
        assert scale == "bounded" or following > 0 or torch.equal(found, plain)
    assert changed > 0


def test_raft_in_the_hosts_folder_is_the_headless_one(nodes: dict[str, Any], video: Tensor) -> None:
    from torchvision.models.optical_flow import raft_small

    torch.manual_seed(3)
    state = raft_small().state_dict()
    folder = Path(importlib.import_module("folder_paths").models_dir) / "vsr_flow"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "raft_small_C_T_V2-01064c6d.pth"
    torch.save(state, file)
    found = nodes["VSREstimateFlow"].execute(video[:2], "raft_small", "one scene").args[0]
    file.unlink()
    save_file(state, folder / "raft.safetensors")
    frames = video[:2].movedim(-1, 1)
    expected = module("flow.raft").load_raft(folder / "raft.safetensors", torch.device("cpu"))(frames[:1], frames[1:])
    assert float(expected.abs().max()) > 0.1 and relative(found.forward, expected) < 1e-5


def test_stable_diffusion_is_aligned_too(nodes: dict[str, Any], flow: Any) -> None:
    """A small SD 1.5 of random weights, frames as a batch."""
    config = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "channel_mult": [1, 2],
        "num_res_blocks": [1, 1],
        "transformer_depth": [1] * 2,
        "transformer_depth_output": [1] * 4,
        "transformer_depth_middle": 1,
        "context_dim": 16,
        "num_heads": 2,
        "use_spatial_transformer": True,
        "legacy": False,
    }
    made, cpu = importlib.import_module("comfy.supported_models").SD15(config), torch.device("cpu")
    made.set_inference_dtype(torch.float32, None)
    patcher = importlib.import_module("comfy.model_patcher").ModelPatcher
    model = patcher(made.get_model({}, device=cpu), load_device=cpu, offload_device=cpu)
    torch.manual_seed(0)
    for weight in model.model.parameters():
        torch.nn.init.normal_(weight, std=0.05)
    conditioning = [[torch.zeros(1, 1, 16), {}]]
    wired = (conditioning, conditioning, {"samples": torch.zeros(SIZE[0], 4, *SIZE[1:])})
    plain = ksampled(model, *wired)
    assert not torch.equal(ksampled(guided(nodes, model, flow, 0.2), *wired), plain)
    assert torch.equal(ksampled(guided(nodes, model, flow, 0.0), *wired), plain)


def test_what_does_not_fit_is_refused(
    host: ModuleType, nodes: dict[str, Any], lite: Any, wired: Any, flow: Any, video: Tensor
) -> None:
    with pytest.raises(ValueError, match="4 frames, the latent video of 6"):
        sampled(host, guided(nodes, lite[0], estimated(nodes, video[:4])), wired)
    with pytest.raises(ValueError, match="96x96 pixels, the latent video of 192x192"):
        sampled(host, guided(nodes, lite[0], estimated(nodes, video[:, ::2, ::2])), wired)
    with pytest.raises(ValueError, match=r"lambda is -0\.1"):
        guided(nodes, lite[0], flow, -0.1)


def test_a_single_frame_has_nothing_to_follow(
    host: ModuleType, nodes: dict[str, Any], lite: Any, wired: Any, video: Tensor
) -> None:
    one = estimated(nodes, video[:1], "detect")
    assert one.frames == 1 and nodes["VSRFlowPreview"].execute(one).args[0].shape == (1, HEIGHT, WIDTH, 3)
    assert torch.equal(sampled(host, guided(nodes, lite[0], one), wired), sampled(host, lite[0], wired))
