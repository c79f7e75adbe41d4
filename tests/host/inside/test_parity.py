"""The host's graph against the headless pipeline: same weights, noise, sigmas and settings, same latents."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.tensors import relative

from .conftest import NAME, part
from .wiring import host_noise

STEPS, SEED, FRAMES, HEIGHT, WIDTH = 4, 3, 6, 24, 16
#: Of four steps the first finds what guidance adds, the second adds it again, the third finds it, the last has none.
INTERVAL = (0.01, 1000.0, 3)
#: Small enough that the video has 2 spatial tiles in 2 windows.
TILE = (16, 16, 4)


@pytest.fixture(scope="session")
def pipeline(host: ModuleType) -> ModuleType:
    return importlib.import_module(f"{NAME}.vsr_ops.pipeline.sampler")


@pytest.fixture(scope="session")
def video() -> Tensor:
    """A moving pattern, `(frames, height, width, 3)`."""
    generator = torch.Generator().manual_seed(1)
    still = torch.rand(1, 3, HEIGHT // 2 + FRAMES, WIDTH // 2, generator=generator)
    large = torch.nn.functional.interpolate(still, scale_factor=16, mode="bicubic").clamp(0, 1)[0]
    frames = torch.stack([large[:, 4 * i : 4 * i + HEIGHT * 8, : WIDTH * 8] for i in range(FRAMES)])
    return frames.movedim(1, -1).contiguous()


@pytest.fixture(scope="session")
def headless(host: ModuleType) -> Any:
    svd = importlib.import_module(f"{NAME}.vsr_ops.backbones.svd")
    return svd.load_svd("lite", torch.device("cpu"), torch.float32)


@pytest.fixture(scope="session")
def conditioning(nodes: dict[str, Any], lite: Any, video: Tensor) -> tuple[Any, Any, Any]:
    model, vae = lite
    return nodes["VSRSVDConditioning"].execute(model, vae, video, 127, 8, 0.0, "noise", "one scene").args


CASES: dict[str, dict[str, Any]] = {
    "untiled": {"tile": (HEIGHT, WIDTH, FRAMES), "propagation": "none", "guidance": "none"},
    "tiles": {"propagation": "none", "guidance": "none"},
    "SAP synchronous": {"propagation": "sap", "guidance": "none", "mode": "synchronous"},
    "SAP lagged": {"propagation": "sap", "guidance": "none"},
    "TAP": {"propagation": "tap", "guidance": "none"},
    "cfg": {"propagation": "none", "guidance": "cfg", "cfg": 2.0},
    "DSSAG, eq. 8": {"propagation": "none", "guidance": "dssag", "scale": 1.0},
    "DSSAG, eq. 9": {"propagation": "none", "guidance": "dssag", "cfg": 2.0},
    "PAG + CFG": {"propagation": "none", "guidance": "pag", "cfg": 2.0, "scale": 1.0},
    "SAG + CFG": {"propagation": "none", "guidance": "sag", "cfg": 2.0, "scale": 0.5},
    "SAG": {"propagation": "none", "guidance": "sag", "scale": 0.5},
    "everything, eq. 8": {"propagation": "sap+tap", "guidance": "dssag", "scale": 1.0},
    "everything, eq. 9": {"propagation": "sap+tap", "guidance": "dssag", "cfg": 2.0, "mode": "synchronous"},
    "DSSAG, eq. 8, interval": {"propagation": "sap+tap", "guidance": "dssag", "scale": 1.0, "interval": True},
    "DSSAG, eq. 9, interval": {"propagation": "none", "guidance": "dssag", "cfg": 2.0, "interval": True},
    "PAG + CFG, interval": {"propagation": "none", "guidance": "pag", "cfg": 2.0, "scale": 50.0, "interval": True},
    "SAG + CFG, interval": {"propagation": "tap", "guidance": "sag", "cfg": 2.0, "scale": 0.5, "interval": True},
    "one frame, everything": {"frames": 1, "propagation": "sap+tap", "guidance": "dssag", "scale": 1.0},
}


def guided_within(nodes: dict[str, Any], model: Any, positive: Any, negative: Any, case: dict[str, Any]) -> Any:
    """The node's guider of a case whose guidance has INTERVAL."""
    cfg, name = case.get("cfg", 1.0), case["guidance"]
    given = dict(zip(("sigma_min", "sigma_max", "every"), INTERVAL, strict=True))
    if cfg != 1:
        given["negative"] = negative
    node, scale = nodes[f"VSR{name.upper()}Guider"], case.get("scale", cfg - 1)
    settings = {"dssag": (scale, 0.5, "ends"), "pag": (cfg, scale, "middle"), "sag": (cfg, scale)}[name]
    return node.execute(model, positive, *settings, **given).args[0]


def in_the_host(
    host: ModuleType, nodes: dict[str, Any], model: Any, conditioning: Any, case: dict[str, Any], denoise: float = 1.0
) -> Tensor:
    positive, negative, latent = conditioning
    mode = case.get("mode", "lagged")
    tiled = nodes["VSRTiledDiffusion"].execute(
        model, *case.get("tile", TILE), 0.5, case["propagation"], mode, 0, 4, 1, "ends", 0.0, 1.0, 1
    )
    if case.get("interval"):
        made = guided_within(nodes, tiled.args[0], positive, negative, case)
        return host.sample(made, latent, SEED, STEPS, "euler", "karras", denoise)["samples"]
    sampler = importlib.import_module(f"{NAME}.nodes.sampler")
    guide, everywhere = sampler.GUIDERS[case["guidance"]], sampler.GuidanceInterval()
    made = guide(tiled.args[0], positive, negative, case.get("cfg", 1.0), case.get("scale", 1.0), everywhere)
    return host.sample(made, latent, SEED, STEPS, "euler", "karras", denoise)["samples"]


@pytest.mark.parametrize("name", CASES)
def test_the_host_and_the_headless_pipeline_agree(
    host: ModuleType,
    nodes: dict[str, Any],
    lite: Any,
    conditioning: Any,
    headless: Any,
    pipeline: ModuleType,
    video: Tensor,
    name: str,
) -> None:
    case = CASES[name]
    propagation = importlib.import_module(f"{NAME}.vsr_ops.sampling.propagation")
    encode = importlib.import_module(f"{NAME}.vsr_ops.vae.encode")
    tiling = importlib.import_module(f"{NAME}.vsr_ops.sampling.tiling")
    interval = importlib.import_module(f"{NAME}.vsr_ops.sampling.interval")
    settings = pipeline.Settings(
        steps=STEPS,
        guidance=case["guidance"],
        cfg=case.get("cfg"),
        guidance_scale=case.get("scale"),
        propagation=propagation.Propagation.named(
            case["propagation"], sap_lagged=case.get("mode", "lagged") == "lagged"
        ),
        seed=SEED,
        interval=interval.GuidanceInterval(*INTERVAL) if case.get("interval") else interval.EVERY_STEP,
    )
    frames = case.get("frames", FRAMES)
    lr = torch.stack(list(encode.stream_encode(headless.vae, video[:frames].movedim(-1, 1), HEIGHT, WIDTH)))
    plan = tiling.plan_tiles(frames, HEIGHT, WIDTH, tiling.TileSize(*case.get("tile", TILE)), 0.5)
    expected = pipeline.sample(headless, lr, plan, settings, noise=host_noise(lr, SEED)) / headless.scaling_factor
    found = in_the_host(host, nodes, lite[0], part(conditioning, frames, HEIGHT, WIDTH), case)
    difference = relative(found, expected)
    print(f"{name}: {difference:.1e}")
    assert difference < 1e-3
