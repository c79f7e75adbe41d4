"""The host on a GPU, dynamic VRAM and all, against itself on the CPU: `VSR_GPU=1 pytest tests/host/test_gpu.py -s`.

A few minutes. The first test is of correctness, the second prints seconds. `VSR_GPU_FLAGS` are the host's, else none:
what it does there by itself. Skipped where no GPU is asked for.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
from PIL import Image

from tests.host.conftest import Server, running
from tests.host.hosts import Host

Prompt = dict[str, dict[str, Any]]

FLAGS = os.environ.get("VSR_GPU_FLAGS", "").split()
#: Weights stay outside the GPU but for what is used, as on a card that is too small for them.
CROWDED = [*FLAGS, "--novram"]
FRAMES = 4
#: In levels of 255: what half precision may change of a mean, and of the worst pixel.
MEAN, WORST = 1.0, 24.0


@pytest.fixture(scope="module", autouse=True)
def asked() -> None:
    if not os.environ.get("VSR_GPU"):
        pytest.skip("no GPU asked for: VSR_GPU=1")


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def prompt(tile: int = 32) -> Prompt:
    """All of DC-VSR and SDATC's modules on the lite weights, without what only shows."""
    return {
        "clip": node("VSRDemoClip", frames=FRAMES, crf=25),
        "lite": node("VSRLoadLite", which="svd_lite"),
        "dcm": node("VSRLoadDCM", which="lite"),
        "large": node(
            "VSRUpscaleLR", image=["clip", 0], scale=4.0, width=0, height=0, method="bicubic", upscale_model=["dcm", 0]
        ),
        "levels": node("VSRCompressionEstimate", image=["clip", 0], which="lite", crf=-1.0),
        "tiles": node(
            "VSRTiledDiffusion",
            **{"model": ["lite", 0], "tile_height": tile, "tile_width": tile, "tile_frames": 4, "overlap": 0.5},
            **{"propagation": "sap+tap", "sap_mode": "auto", "sap_rate": 0, "tap_frames": 4, "tap_rate": 1},
            **{"layers": "ends", "start_percent": 0.0, "end_percent": 1.0, "tile_batch": 1},
        ),
        "capm": node("VSRCAPM", model=["tiles", 0], which="lite", strength=1.0, levels=["levels", 0], crf=-1.0),
        "dssag": node("VSRDSSAG", model=["capm", 0], scale=1.0, rho=0.5, layers="ends"),
        "video": node(
            "VSRSVDConditioning",
            **{"model": ["dssag", 0], "vae": ["lite", 1], "image": ["large", 0], "motion_bucket_id": 127, "fps": 8},
            **{"augmentation": 0.0, "start": "LR latent", "scene_cuts": "detect"},
        ),
        "sampled": node(
            "KSampler",
            **{"model": ["dssag", 0], "positive": ["video", 0], "negative": ["video", 1], "latent_image": ["video", 2]},
            **{"seed": 0, "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "karras", "denoise": 0.5},
        ),
        "cfw": node("VSRLoadCFW", which="lite"),
        "stam": node("VSRLoadSTAM", which="lite"),
        "decoded": node(
            "VSRDecode",
            **{"vae": ["lite", 1], "latent": ["sampled", 0], "chunk_frames": 0, "reference": ["large", 0]},
            **{"cfw": ["cfw", 0], "stam": ["stam", 0], "w": 0.75, "tile": 0, "capm": ["capm", 1]},
        ),
        "refiner": node("VSRLoadRefiner", which="lite"),
        "refined": node("VSRRefine", decoded=["decoded", 0], upscaled=["large", 0], refiner=["refiner", 0], w=0.0),
        "large_seen": node("PreviewImage", images=["large", 0]),
        "seen": node("PreviewImage", images=["decoded", 0]),
        "refined_seen": node("PreviewImage", images=["refined", 0]),
    }


def pictures(server: Server, history: dict[str, Any], name: str) -> np.ndarray:
    """What a node showed, `(frames, height, width, 3)` in levels of 255."""
    assert history["status"]["status_str"] == "success", str(history["status"])[-4000:]
    frames: list[np.ndarray] = []
    for saved in history["outputs"][name]["images"]:
        with Image.open(io.BytesIO(server.request("/view?" + urlencode(saved))[1])) as opened:
            frames.append(np.asarray(opened.convert("RGB"), dtype=np.float64))
    return np.stack(frames)


def shown(server: Server) -> dict[str, np.ndarray]:
    history = server.run(prompt(), seconds=600)
    return {name: pictures(server, history, name) for name in ("large_seen", "seen", "refined_seen")}


@pytest.fixture(scope="module")
def on_the_cpu(comfyui: Host) -> Iterator[dict[str, np.ndarray]]:
    with running(comfyui) as server:
        yield shown(server)


@pytest.mark.parametrize("flags", [FLAGS, CROWDED], ids=["as it is", "crowded"])
def test_a_gpu_shows_what_a_cpu_shows(comfyui: Host, on_the_cpu: dict[str, np.ndarray], flags: list[str]) -> None:
    with running(comfyui, flags) as server:
        found = shown(server)
        # Once more from loaded models, after another size has been through them.
        server.run(prompt(tile=24), seconds=600)
        again = shown(server)
        log = server.tail(10**6)
    dynamic = "on" if "DynamicVRAM support detected" in log else "off"
    print(f"\n{comfyui.version} {' '.join(flags)}: dynamic VRAM is {dynamic}")
    for name, expected in on_the_cpu.items():
        for each in (found, again):
            difference = np.abs(each[name] - expected)
            print(f"{name:14} mean {difference.mean():.3f}, worst {difference.max():.0f} levels of 255")
            assert expected.std() > 10 and difference.mean() < MEAN and difference.max() < WORST
    assert "out of memory" not in log.lower() and "Traceback" not in log


def test_seconds(comfyui: Host) -> None:
    """First and second run of the whole."""
    with running(comfyui, FLAGS) as server:
        for run in ("first", "second"):
            changed = prompt()
            changed["sampled"]["inputs"]["seed"] = len(run)
            begun = time.monotonic()
            assert server.run(changed, seconds=600)["status"]["status_str"] == "success"
            print(f"\n{comfyui.version}: {run} run {time.monotonic() - begun:.1f} s for {FRAMES} frames of 384x256")
