"""The house's floors: imports go down, never in a circle, and everything stands in a room."""

from __future__ import annotations

import graphlib
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def architecture() -> ModuleType:
    spec = importlib.util.spec_from_file_location("architecture", ROOT / "docs/architecture.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_room_imports_from_floors_below_its_own(architecture: ModuleType) -> None:
    links = architecture.links()
    assert len(links) > 40
    floor = architecture.floor_of
    assert [link for link in links if floor(link[0], link[1]) <= floor(link[0], link[2])] == []


def test_a_house_knows_no_other_above_it(architecture: ModuleType) -> None:
    pairs = {
        (name.split(".")[0], other.split(".")[0]) for name, others in architecture.graph().items() for other in others
    }
    assert {(a, b) for a, b in pairs if a != b} == {("training", "vsr_ops"), ("nodes", "vsr_ops")}


def test_no_import_goes_in_a_circle(architecture: ModuleType) -> None:
    graph = architecture.graph()
    assert set(graphlib.TopologicalSorter(graph).static_order()) == set(graph)


@pytest.mark.parametrize("house", ["vsr_ops", "training"])
def test_nothing_stands_outside(architecture: ModuleType, house: str) -> None:
    rooms = {room for floor in architecture.FLOORS[house] for room in floor}
    there = {path.stem for path in (ROOT / house).iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert there == rooms | {"__init__"}


def test_the_picture_is_of_these_imports(architecture: ModuleType) -> None:
    """`python docs/architecture.py` draws it again."""
    assert (ROOT / "docs/architecture.svg").read_text(encoding="utf-8") == architecture.svg()


@pytest.mark.parametrize("house", ["vsr_ops", "nodes", "training", "benchmarks", "tests", "docs"])
def test_files_stay_short(house: str) -> None:
    lines = {path: path.read_text(encoding="utf-8").count("\n") for path in (ROOT / house).rglob("*.py")}
    assert {path.name: count for path, count in lines.items() if count > 350} == {}


def test_an_import_upwards_would_be_seen(architecture: ModuleType, tmp_path: Path) -> None:
    """In each way of writing it, also inside a function."""
    known = architecture.modules("vsr_ops")
    for line in ("from ..cli.options import model_of", "from ..cli import options", "from .. import cli"):
        (tmp_path / "warp.py").write_text(f"def late():\n    {line}\n")
        found = set(architecture.imports("vsr_ops.flow.warp", tmp_path / "warp.py", known))
        assert {architecture.room_of(name) for name in found} == {("vsr_ops", "cli")}
    (tmp_path / "warp.py").write_text("import vsr_ops.cli.options\nimport torch\n")
    assert set(architecture.imports("vsr_ops.flow.warp", tmp_path / "warp.py", known)) == {"vsr_ops.cli.options"}
