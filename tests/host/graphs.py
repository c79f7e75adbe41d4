"""The graphs that the pack offers, and those it once offered: where they are, and how one is made quick to run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.host.page import Page, Prompt
from tests.host.stock_sd import place_stock_sd

ROOT = Path(__file__).resolve().parents[2]
#: What Browse Templates offers, and what version 0.1.0 offered, which artists have saved.
EXAMPLES, KEPT = ROOT / "example_workflows", ROOT / "tests" / "graphs" / "0.1.0"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.json"))
PACK = "coherent-vsr"
FRAMES, STEPS = 2, 2

#: How much larger a graph's result is in the tests. Stock SVD and SD are too large for more on a CPU.
SCALES = {"stock_svd_detailer": 2.0, "sdatc_public": 2.0}


def saved(folder: Path, name: str) -> dict[str, Any]:
    """A graph's file."""
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def scale_of(name: str) -> float:
    """How much larger a graph's result is in the tests."""
    return SCALES.get(name, 4.0)


def make_quick(page: Page, name: str) -> Prompt:
    """The prompt of the page's graph, now with few frames and steps, of a size for tests, and all else as shipped."""
    page.set("frames", FRAMES, "VSRDemoClip")
    page.set("steps", STEPS)
    page.set("scale", scale_of(name), "VSRUpscaleLR")
    prompt = page.prompt()
    assert {node["inputs"]["frames"] for node in prompt.values() if node["class_type"] == "VSRDemoClip"} == {FRAMES}
    assert {node["inputs"]["steps"] for node in prompt.values() if "steps" in node["inputs"]} == {STEPS}
    return prompt


def of_type(prompt: Prompt, kind: str) -> list[str]:
    """Ids of the nodes of a type, the oldest first; those inside of subgraphs have a colon and come last."""
    ids = [key for key, node in prompt.items() if node["class_type"] == kind]
    return sorted(ids, key=lambda key: (":" in key, [int(part) for part in key.split(":")]))


def override(prompt: Prompt, **values: Any) -> Prompt:
    """The prompt with inputs of these names set, wherever one is there and not linked."""

    def changed(inputs: dict[str, Any]) -> dict[str, Any]:
        free = {name for name in values if name in inputs and not isinstance(inputs[name], list)}
        return {**inputs, **{name: values[name] for name in free}}

    return {key: {**node, "inputs": changed(node["inputs"])} for key, node in prompt.items()}


def place_swinir(base: Path) -> None:
    """Under the name of the official one that a graph asks for, a small SwinIR of random weights, laid out as the
    original's file is."""
    import torch
    from spandrel.architectures.SwinIR import SwinIR  # type: ignore[import-untyped]

    torch.manual_seed(0)
    shape = {"depths": [1, 1], "num_heads": [2, 2], "embed_dim": 12, "window_size": 8, "img_size": 64, "mlp_ratio": 2}
    module = SwinIR(**shape, upsampler="pixelshuffle", upscale=4)
    graph = saved(EXAMPLES, "own_swinir_as_dcm")
    (loader,) = [node for node in graph["nodes"] if node["type"] == "UpscaleModelLoader"]
    (name,) = loader["widgets_values"]
    folder = base / "models" / "upscale_models"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"params": module.state_dict()}, folder / name)


def place_public(base: Path) -> None:
    """Under the names that a graph asks for, small weights laid out as those of Stable Diffusion 2.1, DiffBIR and
    StableSR."""
    kinds = ("CheckpointLoaderSimple", "VSRLoadControl", "VSRLoadCFW")
    nodes = saved(EXAMPLES, "sdatc_public")["nodes"]
    loaders = {node["type"]: node["widgets_values"] for node in nodes if node["type"] in kinds}
    checkpoint, control, cfw = (loaders[kind][0] for kind in kinds)
    place_stock_sd(base / "models", checkpoint, control, cfw)


def place_dcvsr(base: Path) -> None:
    """Under the names that a graph asks for, the bundled SVD: its UNet alone, as diffusers writes it and DC-VSR's was
    published, and the whole in the place of the SVD beside it."""
    from tests.support.unet_files import save_unet
    from vsr_ops.checkpoints.svd import LITE, read_svd

    graph = saved(EXAMPLES, "dc_vsr")
    (loader,) = [node for node in graph["nodes"] if node["type"] == "VSRLoadDCVSR"]
    unet, svd = loader["widgets_values"]
    models = base / "models"
    assert save_unet((models / "vsr" / unet).parent, read_svd(LITE)) == models / "vsr" / unet
    (models / "checkpoints").mkdir(parents=True, exist_ok=True)
    shutil.copy(LITE, models / "checkpoints" / svd)
