"""The pack as an artist has it: every graph opened, run and looked at in ComfyUI's own page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.host.graphs import (
    EXAMPLES,
    FRAMES,
    KEPT,
    NAMES,
    PACK,
    ROOT,
    make_quick,
    of_type,
    place_public,
    saved,
    scale_of,
)
from tests.host.results import files_of
from tests.host.stock_svd import place_stock_svd

if TYPE_CHECKING:
    from tests.host.conftest import Server
    from tests.host.page import Page, Prompt

#: Of the demo clip.
WIDTH, HEIGHT = 96, 64
RUN_SECONDS = 600
SCREENSHOTS = ROOT / "tests" / "host" / "screenshots"
#: What saves a graph's result: Save Video now, Save Animated WEBP in version 0.1.0.
SAVES = ("SaveVideo", "SaveAnimatedWEBP")
#: The graphs, and how their result and their first Preview Image look: frames, parts across, parts down, and how much
#: higher than that the picture may be (the tile preview has its windows drawn below).
OUTPUTS: dict[str, list[tuple[int, int, int, int]]] = {
    "quickstart": [(FRAMES, 3, 1, 0)],
    "guidance_swap": [(FRAMES, 2, 2, 0), (FRAMES, 1, 1, 0)],
    "tile_and_propagation_study": [(FRAMES, 3, 1, 0), (FRAMES, 1, 1, HEIGHT)],
    "stock_svd_detailer": [(FRAMES, 1, 1, 0)],
    "sdatc_full": [(FRAMES, 3, 1, 0)],
    "sdatc_public": [(FRAMES, 2, 1, 0)],
    "flow_alignment_on_svd": [(FRAMES, 3, 1, 0), (FRAMES - 1, 1, 1, 0)],
    "compressed_clip_three_crfs": [(FRAMES, 2, 2, 0)],
    "own_swinir_as_dcm": [(FRAMES, 3, 1, 0), (FRAMES, 3, 1, 0)],
    "dc_vsr": [(FRAMES, 3, 1, 0)],
    "dc_vsr_guesses": [(FRAMES, 3, 2, 0), (FRAMES, 2, 1, 0)],
}
#: Each as it is now, and as version 0.1.0 had it, if it did. Side by side, so that the second finds in the host's cache
#: what they have in common.
RUNS = [
    (name, version)
    for name in OUTPUTS
    for version, folder in (("now", EXAMPLES), ("0.1.0", KEPT))
    if version == "now" or (folder / f"{name}.json").is_file()
]
#: Of the white lines between parts.
LINES = 8


@pytest.fixture(scope="session")
def stock_svd(page: Page, server: Server) -> None:
    """The checkpoint that one graph asks for. It takes a while to write, and the page reads names when it opens."""
    place_stock_svd(server.base / "models" / "checkpoints", "svd_xt.safetensors")
    page.open(server.url)


@pytest.fixture(scope="session")
def public(page: Page, server: Server) -> None:
    """What another asks for, likewise."""
    place_public(server.base)
    page.open(server.url)


#: Fixtures of the graphs that need files which are large to write.
FILES = {"stock_svd_detailer": "stock_svd", "sdatc_public": "public"}


def check_frames(frames: list[np.ndarray], scale: float, count: int, across: int, down: int, below: int) -> None:
    """They have the right size, and no part of them is constant, which is what NaN is saved as."""
    assert len(frames) == count
    for frame in frames:
        height, width, _ = frame.shape
        assert 0 <= width - across * WIDTH * scale <= LINES * (across - 1), frame.shape
        assert 0 <= height - down * HEIGHT * scale <= LINES * (down - 1) + below, frame.shape
        for part in (p for row in np.array_split(frame, down) for p in np.array_split(row, across, axis=1)):
            # Below the label, which would not be constant either. A difference map may be faint.
            assert part[part.shape[0] // 2 :].std() > 0.005


def check_files(server: Server, name: str, prompt: Prompt, prompt_id: str) -> None:
    """What a run saved."""
    history = server.get(f"/history/{prompt_id}")[prompt_id]
    (save,) = [key for kind in SAVES for key in of_type(prompt, kind)]
    pictures = of_type(prompt, "PreviewImage")
    for node, expected in zip([save, *pictures], OUTPUTS[name], strict=False):
        check_frames(files_of(server, history, node), scale_of(name), *expected)
    # The rest are plots and temporal profiles, of sizes of their own.
    for node in pictures[len(OUTPUTS[name]) - 1 :]:
        assert all(plot.std() > 0.005 for plot in files_of(server, history, node)), node


def check_shown(page: Page, prompt: Prompt) -> None:
    """Every result is to be seen in its node: loaded, not of one colour, and large enough to be noticed."""
    shown = page.results()
    asked = {key for kind in (*SAVES, "PreviewImage") for key in of_type(prompt, kind)}
    assert {one.node for one in shown} == asked
    for one in shown:
        assert one.ready and one.spread > 0.5, one
        assert one.across >= 100 and one.down >= 30, one


def own_errors(said: list[dict[str, str]]) -> list[dict[str, str]]:
    """What the console says of the pack's files."""
    return [one for one in said if one["kind"] in ("error", "pageerror") and PACK in one["text"] + one["url"]]


def test_every_graph_is_run() -> None:
    assert sorted(OUTPUTS) == NAMES
    assert {name for name, version in RUNS if version != "now"} == {path.stem for path in KEPT.glob("*.json")}


@pytest.mark.parametrize(("name", "version"), RUNS)
def test_graph_runs_in_the_page(
    name: str, version: str, page: Page, server: Server, request: pytest.FixtureRequest
) -> None:
    """From Browse Templates, or from the file that an artist saved; then Run."""
    if name in FILES:
        request.getfixturevalue(FILES[name])
    page.dismiss()
    page.console()
    if version == "now":
        page.open_template(PACK, name)
    else:
        page.load(saved(KEPT, name), f"{name} of {version}")
    quick = make_quick(page, name)
    assert page.missing() == [] and page.trouble() == []

    end = page.run(RUN_SECONDS)
    assert end.kind == "execution_success", json.dumps(end.detail, indent=1)[:4000]
    check_shown(page, quick)
    page.screenshot(SCREENSHOTS / server.host.version / f"{name}{'' if version == 'now' else ' ' + version}.png")
    assert page.trouble() == [] and own_errors(page.console()) == []
    # Nodes grow when their result comes. What artists have saved stays as it is.
    assert version != "now" or page.overlaps() == []
    check_files(server, name, quick, end.prompt_id)
    assert "invalid value encountered in cast" not in server.tail(10**6)


@pytest.mark.parametrize("folder", [EXAMPLES, KEPT], ids=["now", "0.1.0"])
def test_saved_values_arrive_by_name(folder: Path, page: Page) -> None:
    """They are saved by place, and hosts differ in how many places a node has."""
    graph = saved(folder, "quickstart")
    page.load(graph, "values")
    prompt = page.prompt()
    (sampler,) = of_type(prompt, "VSRTiledSVDSampler")
    # The older one asks for four steps, as many as suited its weights.
    steps = 0 if folder == EXAMPLES else 4
    expected = {"scale": 4, "steps": steps, "cfg": 1, "seed": 1, "guidance": "none", "guidance_scale": 1, "denoise": 1}
    expected |= {"sampler_name": "euler", "scheduler": "karras", "tile_height": 0, "tile_width": 0, "tile_frames": 0}
    expected |= {"overlap": 0.5, "propagation": "sap+tap", "sap_mode": "auto", "color": "none"}
    taken = prompt[sampler]["inputs"]
    assert {name: taken[name] for name in expected} == expected
    (save,) = [key for kind in SAVES for key in of_type(prompt, kind)]
    assert prompt[save]["inputs"]["filename_prefix"] == "vsr_quickstart"
    fps = [
        node["inputs"]["fps"] for node in prompt.values() if node["class_type"] in ("CreateVideo", "SaveAnimatedWEBP")
    ]
    assert fps == [8]
    # Hosts of 2026 have the codec inside of the format.
    inputs = prompt[save]["inputs"]
    assert {value for name, value in inputs.items() if name in ("format", "codec", "format.codec")} <= {"auto"}


def test_the_guesses_differ_in_one_thing_each(page: Page) -> None:
    """From the node's defaults, all from the same noise: else no difference could be laid to the guess."""
    page.load(saved(EXAMPLES, "dc_vsr_guesses"), "guesses")
    prompt = page.prompt()
    first, *others = (prompt[key]["inputs"] for key in of_type(prompt, "VSRSVDConditioning"))
    assert first["clip_vision"] and first["fps"] == 8 and first["augmentation"] == 0
    differ = [{key: other.get(key) for key in first if other.get(key) != first[key]} for other in others]
    assert differ == [{"fps": 7}, {"augmentation": 0.02}, {"clip_vision": None}]
    noise = [prompt[key]["inputs"] for key in of_type(prompt, "VSRNoiseByFrame")]
    assert len(noise) == 4 and all(each == noise[0] for each in noise)


def test_trouble_is_seen(page: Page) -> None:
    """What the test above looks for is found where it is: else it could not fail."""
    graph: dict[str, Any] = saved(EXAMPLES, "quickstart")
    (clip,) = [node for node in graph["nodes"] if node["type"] == "VSRDemoClip"]
    others = [node for node in graph["nodes"] if node is not clip]
    page.load({**graph, "nodes": [{**clip, "type": "NoSuchNode"}, *others]}, "a")
    assert page.missing() == ["NoSuchNode"] and "NoSuchNode" in "".join(page.trouble())
    page.dismiss()
    assert page.trouble() == []

    page.load(graph, "b")
    page.set("sampler_name", "nonsense")
    end = page.run(60)
    assert end.kind in ("refused", "execution_error") and "nonsense" in json.dumps(end.detail) and page.trouble()
    page.dismiss()
