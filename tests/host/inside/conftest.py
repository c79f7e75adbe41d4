"""The host's own modules in this process, and the pack loaded as the host loads it. Runs in the host's Python."""

from __future__ import annotations

import asyncio
import gc
import importlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
#: What the host makes of a folder's name when it imports the pack: no identifier.
NAME = "custom_nodes/coherent_x_vsr"


#: What comfy's modules and classes held before the pack was loaded, by `module` or `module.Class`.
BEFORE: dict[str, dict[str, object]] = {}


def comfy_now() -> dict[str, dict[str, object]]:
    """What comfy's modules and classes hold: submodules, which imports add, left out."""
    held: dict[str, dict[str, object]] = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] not in ("comfy", "latent_preview", "comfy_extras", "nodes"):
            continue
        values = {key: value for key, value in vars(module).items() if not isinstance(value, ModuleType)}
        held[name] = values
        for key, value in values.items():
            if isinstance(value, type) and value.__module__ == name:
                held[f"{name}.{key}"] = dict(vars(value))
    return held


def load_pack() -> ModuleType:
    """The pack under the host's kind of module name."""
    spec = importlib.util.spec_from_file_location(NAME, ROOT / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def host() -> ModuleType:
    """`nodes/host`, with the host around it."""
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    base = tempfile.mkdtemp()
    sys.argv = ["main.py", "--cpu", "--use-pytorch-cross-attention", "--base-directory", base]
    import comfy.options

    comfy.options.enable_args_parsing()
    import torch

    torch.set_grad_enabled(False)
    importlib.import_module("comfy.sd")
    importlib.import_module("nodes")
    BEFORE.update(comfy_now())
    load_pack()
    # Hosts collect garbage when a run begins on a model whose earlier clones are gone, as after every test here. What
    # is loaded by now stays: it need not be searched each time, which took most of the suite's time.
    gc.collect()
    gc.freeze()
    return sys.modules[f"{NAME}.nodes.host"]


@pytest.fixture(scope="session")
def nodes(host: ModuleType) -> dict[str, Any]:
    """The pack's node classes by id."""
    extension = asyncio.run(sys.modules[NAME].comfy_entrypoint())
    classes = asyncio.run(extension.get_node_list())
    return {cls.define_schema().node_id: cls for cls in classes}


@pytest.fixture(scope="session")
def lite(nodes: dict[str, Any]) -> tuple[Any, Any]:
    """MODEL and VAE of the bundled weights."""
    return nodes["VSRLoadLite"].execute("svd_lite").args


#: Of the small video below: frames, height and width in latents.
SIZE = (6, 24, 24)


@pytest.fixture(scope="session")
def wired(nodes: dict[str, Any], lite: tuple[Any, Any]) -> tuple[Any, Any, Any]:
    """Positive, negative and LATENT of a moving pattern of `SIZE`."""
    import torch

    frames, height, width = (SIZE[0], SIZE[1] * 8, SIZE[2] * 8)
    coarse = torch.rand(1, 3, height // 16 + frames, width // 16, generator=torch.Generator().manual_seed(1))
    large = torch.nn.functional.interpolate(coarse, scale_factor=16, mode="bicubic").clamp(0, 1)[0]
    video = torch.stack([large[:, 4 * i : 4 * i + height, :width] for i in range(frames)]).movedim(1, -1)
    return nodes["VSRSVDConditioning"].execute(*lite, video.contiguous(), 127, 8, 0.0, "noise", "one scene").args


def part(wired: tuple[Any, Any, Any], frames: int, height: int, width: int, **extra: Any) -> tuple[Any, Any, Any]:
    """The corner of this size of what is wired; `extra` goes into the positive conditioning."""

    def cut(conditioning: Any, **extra: Any) -> Any:
        ((context, values),) = conditioning
        concat = values["concat_latent_image"][:frames, :, :height, :width]
        return [[context, {**values, "concat_latent_image": concat, "vsr_frames": frames, **extra}]]

    positive, negative, latent = wired
    return cut(positive, **extra), cut(negative), {"samples": latent["samples"][:frames, :, :height, :width]}


@pytest.fixture(scope="session")
def models(nodes: dict[str, Any]) -> dict[str, Any]:
    """Small MODELs of the published Stable Diffusions, by family."""
    from .small_sd import build

    return {kind: build(kind) for kind in ("SD 1.5", "SD 2.1", "SDXL")}


@pytest.fixture(params=["SD 1.5", "SD 2.1"])
def sd(models: dict[str, Any], request: pytest.FixtureRequest) -> Any:
    return models[request.param]


@pytest.fixture(scope="session")
def sd21(models: dict[str, Any]) -> Any:
    return models["SD 2.1"]


@pytest.fixture
def interrupted() -> Iterator[type[BaseException]]:
    """The artist has pressed stop: what the host raises then."""
    manage = importlib.import_module("comfy.model_management")
    manage.interrupt_current_processing(True)
    yield manage.InterruptProcessingException
    manage.interrupt_current_processing(False)
