"""Help is there at once: it waits for no library of models, pictures or videos."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import vsr_ops

ROOT = Path(vsr_ops.__file__).parents[1]
#: Libraries that take from a tenth of a second to seconds to import.
SLOW = {"torch", "numpy", "diffusers", "transformers", "safetensors", "av", "PIL", "cv2", "scipy", "kornia", "tqdm"}


def imported(*arguments: str) -> tuple[set[str], str]:
    """The top-level modules that a command imports, as Python itself lists them, and what it prints."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "vsr_ops", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().split(".")[0] for line in lines}, done.stdout + done.stderr


@pytest.mark.parametrize("arguments", [("--help",), ("plan", "--help"), ("upscale", "--help"), ("upscale", "--no")])
def test_help_and_a_mistyped_option_wait_for_nothing(arguments: tuple[str, ...]) -> None:
    found, said = imported(*arguments)
    assert {"argparse", "vsr_ops"} <= found and "usage: python -m vsr_ops" in said
    assert found & SLOW == set()


def test_the_check_would_see_it() -> None:
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", "import tqdm"], capture_output=True, text=True)
    assert any(line.rpartition("|")[2].strip() == "tqdm" for line in done.stderr.splitlines())
