"""Draws `architecture.svg`, the rooms of the software and what imports what, from the code's own imports.

python docs/architecture.py
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Each house's floors, the lowest first. A room imports from floors below its own, and from itself.
FLOORS: dict[str, list[list[str]]] = {
    "vsr_ops": [
        ["errors", "units", "weights"],
        ["system"],
        ["checkpoints", "image", "video"],
        ["flow"],
        ["sampling"],
        ["modules"],
        ["backbones", "vae", "views"],
        ["metrics", "pipeline"],
        ["cli"],
        ["__main__"],
    ],
    "training": [["loop"], ["data"], ["losses"], ["report"], ["tasks"], ["__main__", "validation", "sdatc"]],
    "nodes": [["session"], ["host"], ["."]],
}


def module_name(path: Path) -> str:
    """`vsr_ops/flow/warp.py` as "vsr_ops.flow.warp", a package as itself."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def modules(house: str) -> dict[str, Path]:
    """A house's files by their modules' names."""
    return {module_name(path): path for path in sorted((ROOT / house).rglob("*.py"))}


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of the houses in `known` that a module imports, wherever in it."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{source}.{alias.name}"
                if full in known or source in known:
                    yield full if full in known else source


def graph() -> dict[str, set[str]]:
    """Every module of the three houses, and those of them that it imports."""
    known = {name: path for house in FLOORS for name, path in modules(house).items()}
    return {name: set(imports(name, path, known)) - {name} for name, path in known.items()}


def room_of(module: str) -> tuple[str, str]:
    """House and room of a module; what stands in a house outside of any room is named itself, in `nodes` "."."""
    house, *rest = module.split(".")
    rooms = {room for floor in FLOORS[house] for room in floor}
    return house, rest[0] if rest and rest[0] in rooms else "."


def floor_of(house: str, room: str) -> int:
    """The number of a room's floor, from 0. Raises KeyError for a room that stands on none."""
    for number, floor in enumerate(FLOORS[house]):
        if room in floor:
            return number
    raise KeyError(f"{house}/{room} stands on no floor of docs/architecture.py")


def links() -> set[tuple[str, str, str]]:
    """(house, importing room, imported room) within each house."""
    pairs = ((room_of(name), room_of(other)) for name, others in graph().items() for other in others)
    return {(a[0], a[1], b[1]) for a, b in pairs if a[0] == b[0] and a != b}
