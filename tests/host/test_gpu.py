"""The host on a GPU, dynamic VRAM and all, against itself on the CPU: `VSR_GPU=1 pytest tests/host/test_gpu.py -s`.

A few minutes. The first test is of correctness, the second prints seconds. `VSR_GPU_FLAGS` are the host's, else none:
what it does there by itself. Skipped where no GPU is asked for.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import numpy as np
import pytest

from tests.host.conftest import running
from tests.host.hosts import Host
from tests.host.whole import FRAMES, shown, whole_prompt

FLAGS = os.environ.get("VSR_GPU_FLAGS", "").split()
#: Weights stay outside the GPU but for what is used, as on a card that is too small for them.
CROWDED = [*FLAGS, "--novram"]
#: In levels of 255: what half precision may change of a mean, and of the worst pixel.
MEAN, WORST = 1.0, 24.0


@pytest.fixture(scope="module", autouse=True)
def asked() -> None:
    if not os.environ.get("VSR_GPU"):
        pytest.skip("no GPU asked for: VSR_GPU=1")


@pytest.fixture(scope="module")
def on_the_cpu(comfyui: Host) -> Iterator[dict[str, np.ndarray]]:
    with running(comfyui) as server:
        yield shown(server)


@pytest.mark.parametrize("flags", [FLAGS, CROWDED], ids=["as it is", "crowded"])
def test_a_gpu_shows_what_a_cpu_shows(comfyui: Host, on_the_cpu: dict[str, np.ndarray], flags: list[str]) -> None:
    with running(comfyui, flags) as server:
        found = shown(server)
        # Once more from loaded models, after another size has been through them.
        server.run(whole_prompt(tile=24), seconds=600)
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
            changed = whole_prompt()
            changed["sampled"]["inputs"]["seed"] = len(run)
            begun = time.monotonic()
            assert server.run(changed, seconds=600)["status"]["status_str"] == "success"
            print(f"\n{comfyui.version}: {run} run {time.monotonic() - begun:.1f} s for {FRAMES} frames of 384x256")
