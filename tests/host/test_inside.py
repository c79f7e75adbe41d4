"""The tests that need the host's own modules, in the host's Python: every other file in a process of its own core."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.host.hosts import Host

ROOT = Path(__file__).resolve().parents[2]
#: The longest first, so that the processes have about as much to do.
FILES = sorted((ROOT / "tests" / "host" / "inside").glob("test_*.py"), key=lambda file: (-file.stat().st_size, file))
PROCESSES = min(2, os.cpu_count() or 1)


def started(host: Host, files: Sequence[Path]) -> subprocess.Popen[str]:
    """pytest on some files, one thread: their models are too small for more to help."""
    inside = {"COMFYUI_PATH": str(host.folder), "VSR_INSIDE_HOST": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [host.python, "-m", "pytest", "-p", "no:cacheprovider", *map(str, files)],
        cwd=ROOT,
        env={**os.environ, **inside},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    )


def test_inside(comfyui: Host) -> None:
    """Parity and patches, where they can be measured: beside the host's own code."""
    running = [started(comfyui, FILES[first::PROCESSES]) for first in range(PROCESSES)]
    outputs = [process.communicate()[0] for process in running]
    print("\n".join(f"{comfyui.version}: {output.strip().splitlines()[-1]}" for output in outputs))
    assert all(process.returncode == 0 for process in running), "\n".join(output[-6000:] for output in outputs)


def test_what_runs_inside_can_be_imported() -> None:
    """Without a host, too: what they import of each other and of tests/support is there."""
    arguments = ["-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "--collect-only", str(FILES[0].parent)]
    environment = {**os.environ, "VSR_INSIDE_HOST": "1"}
    found = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-3000:]
    assert all(f"{file.name}:" in found.stdout for file in FILES)
