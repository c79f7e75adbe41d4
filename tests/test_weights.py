"""Where bundled files are: one function knows, and every name that the code asks it for is there."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import vsr_ops
from vsr_ops.checkpoints.safefile import UPSCALER_KEY, open_safely
from vsr_ops.weights import bundled

ROOT = Path(vsr_ops.__file__).parent


def calls() -> set[str]:
    """Every literal that `bundled` is called with in the pack."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in ROOT.rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    asked = [node.args[0] for node in nodes if isinstance(node.func, ast.Name) and node.func.id == "bundled"]
    return {node.value for node in asked if isinstance(node, ast.Constant)}


@pytest.mark.parametrize("name", sorted(calls()))
def test_every_bundled_file_is_there(name: str) -> None:
    assert bundled(name).is_file()


def test_every_file_is_asked_for_and_by_one_function() -> None:
    assert {path.stem for path in (ROOT / "weights").glob("*.safetensors")} == calls()
    knows = [path.relative_to(ROOT) for path in ROOT.rglob("*.py") if "__file__" in path.read_text(encoding="utf-8")]
    assert knows == [Path("weights/__init__.py")]


@pytest.mark.parametrize("name", ["svd_lite", "sd_lite", "control_lite"])
def test_models_say_what_enlarged_their_inputs(name: str) -> None:
    """All three learnt on what the bundled DCM makes."""
    with open_safely(bundled(name)) as source:
        assert source.metadata[UPSCALER_KEY] == "dcm"
