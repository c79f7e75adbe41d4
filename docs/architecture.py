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
        ["errors", "names", "units", "weights"],
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


# --- The picture ------------------------------------------------------------------------------------------------------

#: What a house is, above its floors.
TITLES = {
    "nodes": "nodes/  ComfyUI's side: V3 nodes, and nodes/host, which alone touches its internals",
    "training": "training/  makes the weights",
    "vsr_ops": "vsr_ops/  the product without a host",
}
WIDTH, PAD, CHARACTER, LINE = 1240, 12, 7.3, 15


def members(house: str, room: str) -> list[str]:
    """The modules of a room, without what only starts them."""
    folder = ROOT / house if room == "." else ROOT / house / room
    names = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("__"))
    return names if folder.is_dir() else []


def described(house: str, room: str) -> str:
    """The first sentence of a room's docstring."""
    path = ROOT / house / room
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.split("\n\n")[0].replace("\n", " ")


def wrapped(words: list[str], room: int, separator: str) -> list[str]:
    """Words in lines of at most `room` characters."""
    lines = [""]
    for word in words:
        longer = f"{lines[-1]}{separator if lines[-1] else ''}{word}"
        if len(longer) <= room:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def box(house: str, room: str, x: float, y: float, width: float, below: list[str]) -> tuple[list[str], float]:
    """A room's drawing and its height: name, what it is, its modules, and the rooms that it imports from."""
    fits = int((width - 2 * PAD) / CHARACTER)
    name = {"__main__": "__main__.py", ".": "nodes/*.py"}.get(room, room)
    lines = [("name", name)]
    lines += [("text", line) for line in wrapped(described(house, room).split(), fits, " ")]
    lines += [("code", line) for line in wrapped(members(house, room), fits, "  ")]
    if below:
        lines += [("uses", line) for line in wrapped(["uses", *below], fits, " ")]
    height = len(lines) * LINE + 2 * PAD - 4
    drawn = [f'<rect class="room" x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="@" rx="6"/>']
    for number, (kind, line) in enumerate(lines, 1):
        escaped = line.replace("&", "&amp;").replace("<", "&lt;")
        drawn.append(f'<text class="{kind}" x="{x + PAD:.0f}" y="{y + PAD + number * LINE - 5:.0f}">{escaped}</text>')
    return drawn, height


def svg() -> str:
    """The three houses from the top floor down; every arrow of an import would point downwards."""
    uses: dict[tuple[str, str], list[str]] = {}
    for house, importing, imported in sorted(links()):
        uses.setdefault((house, importing), []).append(imported)
    parts, y = list[str](), 26.0
    for house, title in TITLES.items():
        parts.append(f'<text class="house" x="{PAD}" y="{y:.0f}">{title}</text>')
        y += PAD
        for floor in reversed(FLOORS[house]):
            width = (WIDTH - PAD * (len(floor) + 1)) / len(floor)
            drawn = [
                box(house, room, PAD + i * (width + PAD), y, width, uses.get((house, room), []))
                for i, room in enumerate(floor)
            ]
            height = max(each for _, each in drawn)
            parts += [line.replace('"@"', f'"{height:.0f}"') for lines, _ in drawn for line in lines]
            y += height + PAD
        y += 2 * PAD
    style = (
        "text{font:12px ui-monospace,Menlo,Consolas,monospace;fill:#24292f}"
        ".house{font-weight:bold;font-size:15px}.name{font-weight:bold;font-size:13px}.text{fill:#57606a}"
        ".code{fill:#0550ae}.uses{fill:#8250df}.room{fill:#f6f8fa;stroke:#d0d7de}"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y:.0f}" width="{WIDTH}" height="{y:.0f}">'
    ground = '<rect width="100%" height="100%" fill="#ffffff"/>'
    return "\n".join([head, f"<style>{style}</style>", ground, *parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    (ROOT / "docs/architecture.svg").write_text(svg(), encoding="utf-8")
