"""The pack in a real ComfyUI, asked as the web page asks it: nodes, example graphs, interruption, bad input."""

from __future__ import annotations

import ast
import io
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import numpy as np
import pytest
from PIL import Image, ImageSequence

from tests.host.workflows import PAGE_ONLY, Prompt, input_specs, of_type, override, to_prompt

if TYPE_CHECKING:
    from tests.host.conftest import Server

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "example_workflows"
WIDTH, HEIGHT, FRAMES = 384, 256, 2
#: The example graphs, and what their output nodes show of such a run, the first of each type: type, frames,
#: parts across, parts down, and how much higher than that the picture may be (the tile preview has its windows drawn
#: below).
OUTPUTS: dict[str, list[tuple[str, int, int, int, int]]] = {
    "quickstart": [("SaveAnimatedWEBP", FRAMES, 3, 1, 0)],
    "guidance_swap": [("SaveAnimatedWEBP", FRAMES, 2, 2, 0), ("PreviewImage", FRAMES, 1, 1, 0)],
    "tile_and_propagation_study": [("SaveAnimatedWEBP", FRAMES, 3, 1, 0), ("PreviewImage", FRAMES, 1, 1, HEIGHT // 4)],
    "stock_svd_detailer": [("SaveAnimatedWEBP", FRAMES, 1, 1, 0)],
    "sdatc_full": [("SaveAnimatedWEBP", FRAMES, 3, 1, 0)],
    "flow_alignment_on_svd": [("SaveAnimatedWEBP", FRAMES, 3, 1, 0), ("PreviewImage", FRAMES - 1, 1, 1, 0)],
    "compressed_clip_three_crfs": [("SaveAnimatedWEBP", FRAMES, 2, 2, 0)],
    "own_swinir_as_dcm": [("SaveAnimatedWEBP", FRAMES, 3, 1, 0), ("PreviewImage", FRAMES, 3, 1, 0)],
}
#: Plots and temporal profiles, of sizes of their own: their places among a graph's PreviewImages.
PLOTS = {
    "tile_and_propagation_study": (1,),
    "sdatc_full": (0,),
    "flow_alignment_on_svd": (2,),
    "compressed_clip_three_crfs": (0, 1, 2),
}
#: Of the white lines between parts.
LINES = 8


@pytest.fixture(scope="session")
def own_swinir(server: Server) -> None:
    """Under the name of the official one that a graph asks for, a small SwinIR of random weights,
    in the host's folder and as the original's file is laid out."""
    import torch
    from spandrel.architectures.SwinIR import SwinIR  # type: ignore[import-untyped]

    torch.manual_seed(0)
    shape = {"depths": [1, 1], "num_heads": [2, 2], "embed_dim": 12, "window_size": 8, "img_size": 64, "mlp_ratio": 2}
    module = SwinIR(**shape, upsampler="pixelshuffle", upscale=4)
    graph = json.loads((EXAMPLES / "own_swinir_as_dcm.json").read_text(encoding="utf-8"))
    (loader,) = [node for node in graph["nodes"] if node["type"] == "UpscaleModelLoader"]
    (name,) = loader["widgets_values"]
    folder = server.base / "models" / "upscale_models"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"params": module.state_dict()}, folder / name)


def example(name: str, object_info: dict[str, Any]) -> Prompt:
    """An example graph as a prompt, with few frames and steps and everything else as it is shipped."""
    graph = json.loads((EXAMPLES / f"{name}.json").read_text(encoding="utf-8"))
    prompt = override(to_prompt(graph, object_info), frames=FRAMES, steps=2)
    return override(lite_for_stock(prompt), "VSRUpscaleLR", scale=4.0)


def lite_for_stock(prompt: Prompt) -> Prompt:
    """The stock graph asks for a checkpoint of 9 GB. Here the bundled weights take its place, which have no CLIP: the
    loader is replaced, and CLIP's branch is taken out. Every other node and wire stays."""
    loaders = of_type(prompt, "ImageOnlyCheckpointLoader")
    dropped = {key for kind in ("CLIPVisionEncode", "ImageFromBatch") for key in of_type(prompt, kind)}
    changed: Prompt = {}
    for key, node in prompt.items():
        if key in loaders:
            changed[key] = {"class_type": "VSRLoadLite", "inputs": {"which": "svd_lite"}}
        elif key not in dropped:
            inputs = {name: value for name, value in node["inputs"].items() if not comes_from(value, dropped)}
            # The checkpoint's outputs are MODEL, CLIP_VISION, VAE; Load Lite's are MODEL, VAE.
            moved = {name: [value[0], 1] for name, value in inputs.items() if comes_from(value, loaders) and value[1]}
            changed[key] = {**node, "inputs": {**inputs, **moved}}
    return changed


def comes_from(value: Any, nodes: Any) -> bool:
    """Whether an input is linked to one of these nodes."""
    return isinstance(value, list) and value[0] in nodes


def pictures(server: Server, history: dict[str, Any], node: str) -> list[np.ndarray]:
    """The frames that an output node saved, `(height, width, 3)` in [0, 1], fetched as the page fetches them."""
    assert history["status"]["status_str"] == "success", json.dumps(history["status"], indent=1)[-4000:]
    frames: list[np.ndarray] = []
    for saved in history["outputs"][node]["images"]:
        status, content = server.request("/view?" + urlencode(saved))
        assert status == 200
        with Image.open(io.BytesIO(content)) as opened:
            frames += [np.asarray(frame.convert("RGB")) / 255 for frame in ImageSequence.Iterator(opened)]
    return frames


def message(history: dict[str, Any], kind: str) -> dict[str, Any]:
    """What a run's status says of an event; fails where there was none."""
    assert kind in dict(history["status"]["messages"]), json.dumps(history["status"], indent=1)[-4000:]
    return dict(history["status"]["messages"])[kind]


def node_ids() -> set[str]:
    """The ids written in the pack's schemas."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "nodes").glob("*.py")]
    keywords = [part for tree in trees for part in ast.walk(tree) if isinstance(part, ast.keyword)]
    return {ast.literal_eval(part.value) for part in keywords if part.arg == "node_id"}


def test_every_node_is_listed_with_tooltips(object_info: dict[str, Any]) -> None:
    assert len(node_ids()) >= 14
    for name in node_ids():
        info = object_info[name]
        assert info["display_name"] != name and info["description"] and info["category"].split("/")[0] == "VSR", name
        bare = [key for key, (_, options) in input_specs(info).items() if not options.get("tooltip")]
        assert not bare, (name, bare)
        assert len(info["output_tooltips"]) == len(info["output"]) and all(info["output_tooltips"]), name


def test_examples_are_offered_as_templates_with_a_thumbnail(server: Server) -> None:
    assert sorted(OUTPUTS) == sorted(server.get("/workflow_templates")["coherent-vsr"])
    for name in OUTPUTS:
        status, content = server.request(f"/api/workflow_templates/coherent-vsr/{name}.jpg")
        assert status == 200 and len(content) < 120_000
        with Image.open(io.BytesIO(content)) as picture:
            assert picture.width == 512


@pytest.mark.parametrize("name", OUTPUTS)
def test_example_is_in_the_pages_format(name: str, object_info: dict[str, Any]) -> None:
    """Every link joins two slots of one type, known to both its ends, and a note explains the graph."""
    graph = json.loads((EXAMPLES / f"{name}.json").read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert graph["version"] == 0.4 and graph["last_node_id"] == max(nodes)
    for number, start, out, end, into, kind in graph["links"]:
        assert number in nodes[start]["outputs"][out]["links"] and nodes[end]["inputs"][into]["link"] == number
        info = object_info[nodes[start]["type"]]
        assert info["output"][out] == kind
        taken = input_specs(object_info[nodes[end]["type"]])[nodes[end]["inputs"][into]["name"]][0]
        assert taken in (kind, "*"), (name, number)
    assert [node for node in nodes.values() if node["type"] == "MarkdownNote" and node["type"] in PAGE_ONLY]


@pytest.mark.usefixtures("own_swinir")
@pytest.mark.parametrize("name", OUTPUTS)
def test_example_runs(name: str, server: Server, object_info: dict[str, Any]) -> None:
    """Outputs have the right size, and no part of them is constant, which is what NaN is saved as."""
    prompt = example(name, object_info)
    history = server.run(prompt)
    for kind, count, across, down, below in OUTPUTS[name]:
        frames = pictures(server, history, of_type(prompt, kind)[0])
        assert len(frames) == count
        for frame in frames:
            height, width, _ = frame.shape
            assert 0 <= width - across * WIDTH <= LINES * (across - 1), frame.shape
            assert 0 <= height - down * HEIGHT <= LINES * (down - 1) + below, frame.shape
            for part in (p for row in np.array_split(frame, down) for p in np.array_split(row, across, axis=1)):
                # Below the label, which would not be constant either. A difference map may be faint.
                assert part[part.shape[0] // 2 :].std() > 0.005
    for place in PLOTS.get(name, ()):
        assert all(plot.std() > 0.005 for plot in pictures(server, history, of_type(prompt, "PreviewImage")[place]))
    assert "invalid value encountered in cast" not in server.tail(10**6)


def test_interrupted_run_ends_and_the_next_is_clean(server: Server, object_info: dict[str, Any]) -> None:
    prompt = override(example("quickstart", object_info), lossless=True)
    (sampler,), (save,) = of_type(prompt, "VSRTiledSVDSampler"), of_type(prompt, "SaveAnimatedWEBP")
    before = pictures(server, server.run(prompt), save)

    status, answer = server.queue(override(prompt, steps=1000))
    assert status == 200
    # The sampler has begun when the host is 3 s into a run whose other nodes are cached or take less.
    time.sleep(3)
    assert server.request("/interrupt", {})[0] == 200
    asked = time.monotonic()
    interrupted = message(server.wait(answer["prompt_id"], 30), "execution_interrupted")
    assert time.monotonic() - asked < 5
    assert interrupted["node_type"] == "VSRTiledSVDSampler"

    history = server.run(prompt)
    assert sampler not in message(history, "execution_cached")["nodes"]
    after = pictures(server, history, save)
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_errors_say_what_to_do(server: Server) -> None:
    """What a node raises reaches the artist word for word."""
    load = {"class_type": "VSRLoadLite", "inputs": {"which": "svd_lite"}}
    clip = {"class_type": "VSRDemoClip", "inputs": {"frames": 1}}
    show = {"class_type": "PreviewImage", "inputs": {"images": ["x", 0]}}
    plan = {"class_type": "VSRTilePreview", "inputs": {"model": ["load", 0], "steps": 4, "passes": 1}}
    text = {"mode": "side by side", "label_a": "a", "label_b": "b", "label_c": "c", "position": 0.5, "gain": 8.0}
    compare = {"class_type": "VSRCompare", "inputs": {"a": ["clip", 0], "b": ["clip", 1], **text}}
    for node, expected in (
        (plan, "neither image nor latent is wired"),
        ({**plan, "inputs": {**plan["inputs"], "image": ["clip", 0]}}, "this MODEL has no tiles"),
        (compare, "96"),
    ):
        error = message(server.run({"load": load, "clip": clip, "x": node, "show": show}), "execution_error")
        assert expected in error["exception_message"]
        assert error["node_id"] == "x" and error["exception_type"].endswith("Error")


def test_unknown_choices_are_refused(server: Server, object_info: dict[str, Any]) -> None:
    """By the host where it looks, by the node where it does not."""
    prompt = override(example("quickstart", object_info), guidance="magic")
    status, answer = server.queue(prompt)
    said = answer if status == 400 else message(server.wait(answer["prompt_id"]), "execution_error")
    assert "magic" in json.dumps(said) and "dssag" in json.dumps(said)
