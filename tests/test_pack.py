"""What makes the folder a ComfyUI pack: metadata, entry point, imports, nodes with their help pages, example graphs.

Everything is read as text: the host is not needed.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vsr_ops.cli import demo_clip
from vsr_ops.pipeline.defaults import AUTO
from vsr_ops.sampling.interval import ALL_NOISE

ROOT = Path(__file__).resolve().parents[1]
HOST_FILES = sorted((ROOT / "nodes/host").glob("*.py"))
NODE_FILES = sorted(set((ROOT / "nodes").rglob("*.py")) - set(HOST_FILES))
PACK_FILES = [ROOT / "__init__.py", *NODE_FILES, *HOST_FILES, *sorted((ROOT / "vsr_ops").rglob("*.py"))]
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "web/docs").glob("*.md"))}
EXAMPLES = sorted((ROOT / "example_workflows").glob("*.json"))

#: The host's packages and modules. Nodes may use `comfy_api.latest`; the rest is for nodes/host alone.
HOST = {"comfy", "comfy_api", "comfy_api_nodes", "comfy_config", "comfy_execution", "comfy_extras", "execution"}
HOST |= {"folder_paths", "latent_preview", "node_helpers", "nodes", "server"}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# --- Metadata -------------------------------------------------------------------------------------------------------


def metadata() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_requirements_are_the_projects_dependencies() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    assert lines == metadata()["project"]["dependencies"] and len(lines) > 5


def test_requirements_name_no_torch_and_pin_nothing() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+", line)] == []
    assert [line for line in lines if line.startswith(("torch", "xformers", "triton"))] == []


def test_the_registry_gets_what_it_asks_for() -> None:
    read = metadata()
    project, comfy = read["project"], read["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9-]*", project["name"]) and "comfyui" not in project["name"]
    assert comfy["PublisherId"] and comfy["DisplayName"] and comfy["requires-comfyui"] == ">=0.3.64"
    # The host serves a `web` named here under a second name, beside WEB_DIRECTORY.
    assert "web" not in comfy


def test_an_installation_keeps_what_it_runs_on() -> None:
    kept = ("__init__.py", "nodes", "vsr_ops", "web", "example_workflows", "docs", "README.md", "LICENSE")
    kept += ("pyproject.toml", "requirements.txt")
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert {pattern.strip("/") for pattern in patterns}.isdisjoint(kept)
    assert {"/tests/", "/benchmarks/", "/training/", "/.ci/"} <= set(patterns)


# --- Entry point and imports ----------------------------------------------------------------------------------------


def bound(tree: ast.Module) -> set[str]:
    """The public names that a module's top level defines or imports."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Assign):
            names |= {part.id for target in node.targets for part in ast.walk(target) if isinstance(part, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
    return {name for name in names if not name.startswith("_")}


def test_the_root_defines_the_entry_point_and_the_web_folder_alone() -> None:
    tree = parse(ROOT / "__init__.py")
    assert bound(tree) == {"WEB_DIRECTORY", "comfy_entrypoint"}
    values = {
        ast.unparse(node.targets[0]): ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)
    }
    assert (ROOT / values["WEB_DIRECTORY"] / "docs").is_dir()


@pytest.mark.parametrize("path", PACK_FILES, ids=relative)
def test_no_second_way_of_registering(path: Path) -> None:
    assert "NODE_CLASS_MAPPINGS" not in path.read_text(encoding="utf-8")


def absolute_imports(tree: ast.AST) -> Iterator[str]:
    """Every module imported by its full name, wherever in the file, also by a literal name at run time."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


def host_internals(tree: ast.AST) -> list[str]:
    """What a file imports from the host beyond its public node API."""
    names = [name for name in absolute_imports(tree) if name.split(".")[0] in HOST]
    return [name for name in names if not f"{name}.".startswith("comfy_api.latest.")]


@pytest.mark.parametrize("path", [path for path in PACK_FILES if path not in HOST_FILES], ids=relative)
def test_only_one_room_imports_host_internals(path: Path) -> None:
    assert host_internals(parse(path)) == []


def test_that_room_does() -> None:
    found = {name for path in HOST_FILES for name in host_internals(parse(path))}
    assert {"comfy.samplers", "latent_preview"} <= found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import comfy.utils", ["comfy.utils"]),
        ("def f():\n    from comfy_extras.nodes_mask import MaskToImage", ["comfy_extras.nodes_mask.MaskToImage"]),
        ("import torch, folder_paths as f", ["folder_paths"]),
        ("from server import PromptServer", ["server.PromptServer"]),
        ("import importlib\nimportlib.import_module('node_helpers')", ["node_helpers"]),
        ("from comfy_api.v0_0_2 import io", ["comfy_api.v0_0_2.io"]),
        ("from comfy_api.latest import io\nfrom . import host\nimport comfortable", []),
    ],
)
def test_the_check_of_imports_would_see_it(source: str, found: list[str]) -> None:
    assert host_internals(ast.parse(source)) == found


@pytest.mark.parametrize("path", PACK_FILES, ids=relative)
def test_the_pack_imports_itself_relatively(path: Path) -> None:
    """In the host it goes by the name of its folder, so no other name would find it."""
    own = {"vsr_ops", "training", "benchmarks", "tests"}
    assert [name for name in absolute_imports(parse(path)) if name.split(".")[0] in own] == []


# --- Nodes, as their schemas say ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Widget:
    """An input. `default` and `limits` as a help page writes them; None where it has none."""

    id: str
    default: str | None = None
    limits: str | None = None


@dataclass(frozen=True)
class Node:
    id: str
    bases: list[str]
    inputs: list[Widget]
    outputs: list[str]


#: Functions of nodes/common.py that make a widget: id first, then default and limits, or options and default.
WIDGETS = {"choice", "number", "count"}
TREES = {path: parse(path) for path in NODE_FILES}
#: The other functions that make inputs or outputs.
MAKERS = {
    node.name: node
    for tree in TREES.values()
    for node in tree.body
    if isinstance(node, ast.FunctionDef) and node.name not in WIDGETS
}
NAMED = {"demo_clip.FRAMES": demo_clip.FRAMES, "AUTO": AUTO, "ALL_NOISE": ALL_NOISE}


def made(node: ast.expr, given: dict[str, ast.expr] | None = None) -> Iterator[tuple[ast.Call, dict[str, ast.expr]]]:
    """The calls that make a schema's inputs or outputs, those in helper functions too, with the helper's arguments."""
    given = given or {}
    if isinstance(node, ast.List):
        for element in node.elts:
            yield from made(element, given)
    elif isinstance(node, ast.Starred | ast.Name):
        yield from made(node.value if isinstance(node, ast.Starred) else given[node.id], given)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in MAKERS:
        maker = MAKERS[node.func.id]
        arguments = dict(zip((arg.arg for arg in maker.args.args), node.args, strict=False))
        if maker.args.vararg is not None:
            arguments[maker.args.vararg.arg] = ast.List(node.args[len(maker.args.args) :])
        for part in maker.body:
            if isinstance(part, ast.Return) and part.value is not None:
                yield from made(part.value, arguments)
    else:
        assert isinstance(node, ast.Call), ast.unparse(node)
        yield node, given


def written(node: ast.expr) -> str:
    """A literal as a help page writes it."""
    value = NAMED[ast.unparse(node)] if ast.unparse(node) in NAMED else ast.literal_eval(node)
    return f"`{value}`" if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)


def widget(call: ast.Call, given: dict[str, ast.expr]) -> Widget:
    args = [given.get(arg.id, arg) if isinstance(arg, ast.Name) else arg for arg in call.args]
    name, kind = ast.literal_eval(args[0]), ast.unparse(call.func)
    if kind == "choice":
        return Widget(name, written(args[2]))
    if kind in ("number", "count"):
        return Widget(name, written(args[1]), f"({written(args[2])} to {written(args[3])})")
    words = {keyword.arg: keyword.value for keyword in call.keywords}
    if "default" in words:
        return Widget(name, written(words["default"]))
    return Widget(name, "optional" if "optional" in words else "required")


def nodes_of(tree: ast.Module) -> Iterator[Node]:
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        schemas = [
            call for call in ast.walk(node) if isinstance(call, ast.Call) and "io.Schema" in ast.unparse(call.func)
        ]
        for schema in schemas:
            parts = {keyword.arg: keyword.value for keyword in schema.keywords}
            outputs = [{word.arg: word.value for word in call.keywords} for call, _ in made(parts["outputs"])]
            yield Node(
                ast.literal_eval(parts["node_id"]),
                [ast.unparse(base) for base in node.bases],
                [widget(call, given) for call, given in made(parts["inputs"])],
                [ast.literal_eval(words["display_name"]) for words in outputs],
            )


NODES = {node.id: node for tree in TREES.values() for node in nodes_of(tree)}


def test_every_node_of_the_host_derives_directly() -> None:
    """The host looks for nodes in the source: one class each, its id a literal."""
    assert len(NODES) == 33 and all(name.startswith("VSR") for name in NODES)
    assert {node.id: node.bases for node in NODES.values() if node.bases != ["io.ComfyNode"]} == {}


def test_every_node_is_listed() -> None:
    tree = TREES[ROOT / "nodes/__init__.py"]
    (listed,) = (node.value for node in tree.body if isinstance(node, ast.AnnAssign) and "NODES" in ast.unparse(node))
    assert isinstance(listed, ast.List) and len(listed.elts) == len(NODES)


# --- Help pages -----------------------------------------------------------------------------------------------------


def section(page: str, title: str) -> str:
    return page.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(page: str) -> dict[str, str]:
    """The last cell of every input's row, by the input's id."""
    lines = [line.strip("| \n").split(" | ") for line in section(page, "Inputs").splitlines() if line.startswith("| `")]
    return {cells[0].strip("`"): cells[-1] for cells in lines}


#: Every literal text of the code, the fixed parts of formatted ones each by itself.
TEXTS = {
    node.value
    for path in PACK_FILES
    for node in ast.walk(parse(path))
    if isinstance(node, ast.Constant) and isinstance(node.value, str)
}


def missing(message: str) -> list[str]:
    """Fixed parts of a quoted message, between the ellipses that stand for values, which no text of the code holds."""
    return [part for part in message.split("…") if not any(part in text for text in TEXTS)]


def quoted(page: str) -> list[str]:
    """The messages that a page says can appear."""
    return re.findall(r"^- `([^`]+)`", section(page, "When something goes wrong"), re.MULTILINE)


def test_every_node_has_a_help_page_and_every_page_a_node() -> None:
    assert set(PAGES) == set(NODES)


@pytest.mark.parametrize("name", NODES)
def test_the_page_says_what_the_schema_says(name: str) -> None:
    node, page = NODES[name], PAGES[name]
    cells = rows(page)
    assert list(cells) == [entry.id for entry in node.inputs]
    for entry in node.inputs:
        assert cells[entry.id].split(" (")[0] == entry.default, entry.id
        if entry.limits is not None:
            assert cells[entry.id].endswith(entry.limits), entry.id
    assert re.findall(r"^- `(\w+)`", section(page, "Outputs"), re.MULTILINE) == node.outputs


@pytest.mark.parametrize("name", NODES)
def test_the_page_is_whole_and_short(name: str) -> None:
    page = PAGES[name]
    assert all(section(page, title).strip() for title in ("Wire it like this", "Where it comes from"))
    assert len(page.splitlines()) <= 60


@pytest.mark.parametrize("name", NODES)
def test_the_messages_it_quotes_are_the_codes(name: str) -> None:
    assert {message: parts for message in quoted(PAGES[name]) if (parts := missing(message))} == {}


def test_the_check_of_messages_would_see_it() -> None:
    assert missing("overlap is …: expected a share from 0 to 0.75 (0.5 is the paper's)") == []
    assert missing("overlap is …: expected a share from 0 to 7") == [": expected a share from 0 to 7"]
    assert sum(len(quoted(page)) for page in PAGES.values()) > 50


# --- Example graphs -------------------------------------------------------------------------------------------------


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 4 and "quickstart" in {path.stem for path in EXAMPLES}


@pytest.mark.parametrize("path", EXAMPLES, ids=relative)
def test_an_example_is_a_graph_of_known_nodes_with_a_picture(path: Path) -> None:
    graph = json.loads(path.read_text(encoding="utf-8"))
    assert graph["version"] == 0.4
    inner = graph.get("definitions", {}).get("subgraphs", [])
    kinds = [node["type"] for one in (graph, *inner) for node in one["nodes"]]
    assert any(kind in NODES for kind in kinds)
    assert [kind for kind in kinds if kind.startswith("VSR") and kind not in NODES] == []
    picture = path.with_suffix(".jpg")
    assert picture.is_file() and picture.read_bytes()[:3] == b"\xff\xd8\xff"
