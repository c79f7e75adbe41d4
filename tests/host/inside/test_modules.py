"""The modules around the diffusion, as nodes: the same as headless, and at home in the host."""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .conftest import NAME


def module(name: str) -> ModuleType:
    """One of the pack's own, as the host has loaded it."""
    return importlib.import_module(f"{NAME}.{name}")


def video(height: int, width: int, frames: int = 2, seed: int = 0) -> Tensor:
    return torch.rand(frames, height, width, 3, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def dcm(nodes: dict[str, Any]) -> Any:
    return nodes["VSRLoadDCM"].execute("lite").args[0]


@pytest.fixture(scope="module")
def refiner(nodes: dict[str, Any]) -> Any:
    return nodes["VSRLoadRefiner"].execute("lite").args[0]


def test_dcm_is_the_headless_one(nodes: dict[str, Any], dcm: Any) -> None:
    small = video(18, 27)
    large = nodes["VSRUpscaleLR"].execute(small, 4.0, 0, 0, "bicubic", dcm).args[0]
    expected = module("vsr_ops.modules.dcm").load_dcm("lite", torch.device("cpu"))(small.movedim(-1, 1)).movedim(1, -1)
    assert large.shape == (2, 72, 108, 3) and (large - expected).abs().max() < 1e-5
    bicubic = nodes["VSRUpscaleLR"].execute(small, 4.0, 0, 0, "bicubic").args[0]
    assert (large - bicubic).abs().mean() > 1e-3


def test_the_video_upscaler_is_the_headless_one(nodes: dict[str, Any], dcm: Any) -> None:
    frames = video(20, 28, 7)
    frames[4:] = 1 - frames[:3] ** 4  # another scene
    upscaler = nodes["VSRLoadVideoUpscaler"].execute("lite").args[0]
    large = nodes["VSRUpscaleLR"].execute(frames, 4.0, 0, 0, "bicubic", video_upscaler=upscaler).args[0]
    lr = frames.movedim(-1, 1).contiguous()
    enlarging = module("vsr_ops.modules.enlarging").Enlarging(
        module("vsr_ops.modules.dcm").load_dcm("lite", torch.device("cpu")),
        module("vsr_ops.modules.video_upscaler").load_video_upscaler("lite"),
    )
    cuts = module("vsr_ops.video.scenes").find_cuts(iter(lr))
    expected = torch.stack(list(enlarging(lr, (80, 112), cuts))).movedim(1, -1)
    assert large.shape == (7, 80, 112, 3) and (large - expected).abs().max() < 1e-5
    alone = nodes["VSRUpscaleLR"].execute(frames, 4.0, 0, 0, "bicubic", dcm).args[0]
    assert (large - alone).abs().mean() > 1e-3
    off = nodes["VSRUpscaleLR"].execute(frames, 4.0, 0, 0, "bicubic", None, upscaler, 0.0).args[0]
    assert (off - alone).abs().max() < 1e-5
    own = nodes["VSRLoadVideoUpscaler"].execute("lite", dcm).args[0]
    assert torch.equal(large, nodes["VSRUpscaleLR"].execute(frames, 4.0, 0, 0, "bicubic", None, own).args[0])
    with pytest.raises(ValueError, match="both wired"):
        nodes["VSRUpscaleLR"].execute(frames, 4.0, 0, 0, "bicubic", dcm, upscaler)


def test_dcm_is_an_upscale_model_of_the_host(nodes: dict[str, Any], dcm: Any) -> None:
    node = importlib.import_module("comfy_extras.nodes_upscale_model").ImageUpscaleWithModel
    taken = {item.id: item.io_type for item in node.define_schema().inputs}
    assert nodes["VSRLoadDCM"].define_schema().outputs[0].io_type == taken["upscale_model"]
    large = node.execute(dcm, video(18, 27)).args[0]
    assert torch.equal(large, nodes["VSRUpscaleLR"].execute(video(18, 27), 4.0, 0, 0, "bicubic", dcm).args[0])


def test_dcm_with_another_scale_than_its_own(nodes: dict[str, Any], dcm: Any) -> None:
    """Its own comes first, and the method makes that smaller."""
    own, found = (nodes["VSRUpscaleLR"].execute(video(9, 11), by, 0, 0, "bicubic", dcm).args[0] for by in (4.0, 3.0))
    expected = module("vsr_ops.image.resize").resize("bicubic", own.movedim(-1, 1), (27, 33)).clamp(0, 1)
    assert found.shape == (2, 27, 33, 3) and (found - expected.movedim(1, -1)).abs().max() < 1e-6


def test_refine_is_the_headless_one(nodes: dict[str, Any], refiner: Any) -> None:
    decoded, upscaled = video(33, 41), video(33, 41, seed=1)
    channels_first = [x.movedim(-1, 1).contiguous() for x in (decoded, upscaled)]
    cuts = module("vsr_ops.video.scenes").find_cuts(iter(channels_first[1]))
    expected = module("vsr_ops.modules.refiner").refine(refiner, *channels_first, 0.25, cuts).movedim(1, -1)
    found = nodes["VSRRefine"].execute(decoded, upscaled, refiner, 0.25).args[0]
    assert found.shape == decoded.shape and (found - expected).abs().max() < 1e-5
    assert (found - upscaled).abs().mean() > 1e-4
    assert torch.equal(nodes["VSRRefine"].execute(decoded, upscaled, refiner, 1.0).args[0], upscaled)


def test_refine_stops_when_asked(nodes: dict[str, Any], refiner: Any, interrupted: type[BaseException]) -> None:
    with pytest.raises(interrupted):
        nodes["VSRRefine"].execute(video(8, 8), video(8, 8), refiner, 0.0)


def test_the_one_node_composes_them(nodes: dict[str, Any], lite: Any, dcm: Any, refiner: Any) -> None:
    small = video(16, 20)
    values = (4.0, 1, 1.0, 3, "none", 1.0, "euler", "karras", 1.0, 0, 0, 0, 0.5, "none", "auto", "none", None, dcm)
    bare = nodes["VSRTiledSVDSampler"].execute(*lite, small, *values).args[1]
    refined = nodes["VSRTiledSVDSampler"].execute(*lite, small, *values, refiner).args[1]
    upscaled = nodes["VSRUpscaleLR"].execute(small, 4.0, 0, 0, "bicubic", dcm).args[0]
    expected = nodes["VSRRefine"].execute(bare, upscaled, refiner, 0.0).args[0]
    assert (refined - expected).abs().max() < 1e-5 and (refined - bare).abs().mean() > 1e-4


def used(nodes: dict[str, Any], node: str, made: Any) -> Tensor:
    """A picture that goes through what a loader made."""
    if node == "VSRLoadDCM":
        return nodes["VSRUpscaleLR"].execute(video(9, 11), 4.0, 0, 0, "bicubic", made).args[0]
    if node == "VSRLoadVideoUpscaler":
        return nodes["VSRUpscaleLR"].execute(video(9, 11), 4.0, 0, 0, "bicubic", video_upscaler=made).args[0]
    return nodes["VSRRefine"].execute(video(16, 16), video(16, 16, seed=1), made, 0.0).args[0]


@pytest.mark.parametrize(
    ("node", "folder"),
    [
        ("VSRLoadDCM", "upscale_models"),
        ("VSRLoadRefiner", "vsr_refiners"),
        ("VSRLoadVideoUpscaler", "vsr_video_upscalers"),
    ],
)
def test_the_artists_own_files_are_found(nodes: dict[str, Any], node: str, folder: str) -> None:
    def options() -> list[str]:
        return nodes[node].define_schema().inputs[0].options

    assert options() == ["lite"]
    paths = importlib.import_module("folder_paths")
    place = Path(paths.models_dir) / folder / "mine"
    place.mkdir(parents=True)
    weights = Path(module("vsr_ops").__file__ or "").parent / "weights"
    name = {"VSRLoadDCM": "dcm_lite", "VSRLoadRefiner": "refiner_lite"}.get(node, "video_upscaler_lite")
    with safe_open(weights / f"{name}.safetensors", "pt") as lite:
        half = {key: lite.get_tensor(key) * 0.5 for key in lite.keys()}  # noqa: SIM118
        save_file(half, place / "own.safetensors", lite.metadata())
    (place / "pickle.pth").write_bytes(pickle.dumps(print))
    try:
        pickles = ["mine/pickle.pth"] if node == "VSRLoadDCM" else []
        assert [Path(option).as_posix() for option in options()] == ["lite", "mine/own.safetensors", *pickles]
        bundled, own = (used(nodes, node, nodes[node].execute(option).args[0]) for option in options()[:2])
        assert float((own - bundled).abs().mean()) > 1e-2, "the file's weights, not the bundled ones"
        for option in options()[2:]:
            with pytest.raises(ValueError, match="not a pickle of tensors alone"):
                nodes[node].execute(option)
        with pytest.raises(ValueError, match=rf"'\.\./own\.safetensors'.*lite.*models/{folder}"):
            nodes[node].execute("../own.safetensors")
    finally:
        for file in place.iterdir():
            file.unlink()
        place.rmdir()
    assert options() == ["lite"]
