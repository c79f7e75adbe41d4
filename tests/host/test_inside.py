"""The tests that need the host's own modules, in the host's Python."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.host.hosts import Host

ROOT = Path(__file__).resolve().parents[2]


def test_inside(comfyui: Host) -> None:
    """Parity and patches, where they can be measured: beside the host's own code."""
    done = subprocess.run(
        [comfyui.python, "-m", "pytest", "tests/host/inside", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env={**os.environ, "COMFYUI_PATH": str(comfyui.folder), "VSR_INSIDE_HOST": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    assert done.returncode == 0, done.stdout[-6000:]
