"""Weights as hosts keep them: in another precision than is computed in, elsewhere until they are used, and replaced
between two calls, as dynamic VRAM does on a GPU. On a CPU the host does none of it by itself, so it is brought about
here by the same means; `tests/host/test_gpu.py` is for a GPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.tensors import relative

from .conftest import NAME, part
from .wiring import dssag, sampled, tiled, wrapped


@pytest.fixture(scope="session")
def wide(wired: Any) -> Any:
    """Two tiles in two windows."""
    return part(wired, 6, 24, 16)


def loaded(nodes: dict[str, Any], patch: pytest.MonkeyPatch, stored: torch.dtype) -> Any:
    """The lite MODEL whose weights are kept in `stored` and computed with in float32, as the host does where a device
    cannot compute in them."""
    manage = importlib.import_module("comfy.model_management")
    with patch.context() as inner:
        inner.setattr(manage, "unet_dtype", lambda *_, **__: stored)
        inner.setattr(manage, "unet_manual_cast", lambda *_, **__: torch.float32)
        return nodes["VSRLoadLite"].execute("svd_lite").args[0]


def rounded(model: Any, dtype: torch.dtype) -> Any:
    """The same MODEL in float32 with weights of that precision."""
    for weight in model.model.diffusion_model.parameters():
        weight.data = weight.data.to(dtype).float()
    return model


def replacing(model: Any) -> Any:
    """A MODEL whose weights are other tensors of the same values at every call of the UNet."""
    calls: list[int] = []

    def swap(executor: Any, *args: Any, **rest: Any) -> Tensor:
        calls.append(1)
        for module in executor.class_obj.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(weight.detach().clone(), requires_grad=False))
                # What kept the old one would compute with this.
                weight.data.fill_(float("nan"))
        return executor(*args, **rest)

    return wrapped(model, "diffusion_model", swap)


def capm_on(nodes: dict[str, Any], model: Any) -> Any:
    return nodes["VSRCAPM"].execute(model, "lite", 1.0, crf=30.0).args[0]


OURS: dict[str, Callable[..., Any]] = {
    "tiles, SAP, TAP and DSSAG": lambda host, nodes, model: dssag(nodes, tiled(nodes, model)),
    "PAG": lambda host, nodes, model: host.patch_perturbed(tiled(nodes, model, "none"), "pag", 1.0, "middle"),
    "SAG": lambda host, nodes, model: host.patch_perturbed(tiled(nodes, model, "none"), "sag", 1.0, "middle"),
    "CAPM": lambda host, nodes, model: capm_on(nodes, tiled(nodes, model, "sap")),
}


@pytest.mark.parametrize("name", OURS)
def test_weights_in_another_precision(
    host: ModuleType, nodes: dict[str, Any], wide: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    stored = loaded(nodes, monkeypatch, torch.float16)
    assert next(stored.model.diffusion_model.parameters()).dtype == torch.float16
    expected = rounded(nodes["VSRLoadLite"].execute("svd_lite").args[0], torch.float16)
    found, same = (sampled(host, OURS[name](host, nodes, model), wide, 1.0) for model in (stored, expected))
    assert relative(found, same) < 1e-5


@pytest.mark.parametrize("name", OURS)
def test_weights_that_are_replaced_between_calls(host: ModuleType, nodes: dict[str, Any], wide: Any, name: str) -> None:
    """With a MODEL of its own, since what is replaced is no more."""
    expected = sampled(host, OURS[name](host, nodes, nodes["VSRLoadLite"].execute("svd_lite").args[0]), wide, 1.0)
    fresh = nodes["VSRLoadLite"].execute("svd_lite").args[0]
    assert torch.equal(sampled(host, replacing(OURS[name](host, nodes, fresh)), wide, 1.0), expected)


def casting(vae: Any, stored: torch.dtype) -> Any:
    """A VAE that keeps its weights in `stored`, and casts each layer's when it is used."""
    for module in vae.first_stage_model.modules():
        if hasattr(module, "comfy_cast_weights"):
            module.to(stored)
            module.comfy_cast_weights = True
    return vae


def test_a_decoder_whose_weights_lie_in_another_precision(nodes: dict[str, Any], small_latent: Any) -> None:
    """Its tiles are computed in the VAE's own, not in that of the weights."""
    vae, plain = (nodes["VSRLoadLite"].execute("svd_lite").args[1] for _ in range(2))
    for weight in plain.first_stage_model.parameters():
        weight.data = weight.data.half().float()
    stam = nodes["VSRLoadSTAM"].execute("lite").args[0]
    for more in ({}, {"tile": 6}, {"stam": stam}):
        found, expected = (
            nodes["VSRDecode"].execute(each, small_latent, 0, **more).args[0]
            for each in (casting(vae, torch.float16), plain)
        )
        assert (found - expected).abs().max() < 1e-5


@pytest.fixture(scope="module")
def small_latent(nodes: dict[str, Any], lite: Any) -> Any:
    rng = torch.Generator().manual_seed(0)
    large = torch.nn.functional.interpolate(torch.rand(1, 3, 12, 12, generator=rng), size=(100, 100))[0]
    video = torch.stack([large[:, i : i + 96, i : i + 96] for i in range(3)]).movedim(1, -1)
    return nodes["VSREncode"].execute(lite[1], video, "LR latent", "one scene").args[0]


def test_modules_of_ours_are_the_hosts_to_move(host: ModuleType, nodes: dict[str, Any], lite: Any, wide: Any) -> None:
    """Upscale models, controls and CAPMs are on its list while they are used, and leave it when it frees memory."""
    manage = importlib.import_module("comfy.model_management")
    dcm = nodes["VSRLoadDCM"].execute("lite").args[0]
    nodes["VSRUpscaleLR"].execute(torch.rand(1, 16, 16, 3), 4.0, 0, 0, "bicubic", dcm)
    model = capm_on(nodes, lite[0])
    sampled(host, model, part(wide, 2, 16, 16), 1.0, 1)

    def loaded() -> set[str]:
        # The host's list still holds, as None, what an earlier test has let go of.
        return {type(each.model).__name__ for each in manage.loaded_models() if each is not None}

    names = loaded()
    assert "CAPM" in names
    if hasattr(importlib.import_module("comfy.model_patcher"), "CoreModelPatcher"):
        assert type(dcm.model).__name__ in names
    manage.unload_all_models()
    assert not {"CAPM", type(dcm.model).__name__} & loaded()


def test_upscale_models_of_any_loader(nodes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours, the host's, and another pack's, which knows of no patcher: under our node, and ours under the host's."""
    paths, extras = importlib.import_module("folder_paths"), importlib.import_module("comfy_extras.nodes_upscale_model")
    file = importlib.import_module(f"{NAME}.vsr_ops.modules.dcm").LITE_DCM
    monkeypatch.setattr(paths, "get_full_path_or_raise", lambda folder, name: str(file))
    mine = nodes["VSRLoadDCM"].execute("lite").args[0]
    core = extras.UpscaleModelLoader.execute("dcm_lite.safetensors").args[0]
    spandrel = importlib.import_module("spandrel")
    other = spandrel.ModelLoader().load_from_file(file).eval()
    small = torch.rand(1, 16, 20, 3, generator=torch.Generator().manual_seed(0))
    results = [
        nodes["VSRUpscaleLR"].execute(small, 4.0, 0, 0, "bicubic", model).args[0] for model in (mine, core, other)
    ]
    results.append(extras.ImageUpscaleWithModel.execute(mine, small).args[0])
    assert all(torch.equal(each, results[0]) for each in results)
