"""What importing the headless part does not do: no host, no files, no network."""

from __future__ import annotations

import ast
import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vsr_ops

ROOT = Path(vsr_ops.__file__).parent
HOST = {"comfy", "comfy_api", "comfy_extras", "comfy_execution"} | {"folder_paths", "server", "node_helpers"}
HOST |= {"execution", "nodes"}
FILES = sorted(ROOT.rglob("*.py"))
#: Every module, by its name.
MODULES = [module.name for module in pkgutil.walk_packages([str(ROOT)], "vsr_ops.")]


def imported(source: str, *, at_import: bool = False) -> Iterator[str]:
    """Every module that a source imports, wherever in it, also through `importlib` or `__import__` with a literal.

    `at_import`: only the import statements that run when the source itself is imported.
    """
    tree = ast.parse(source)
    for node in tree.body if at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            literal = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            if name in ("import_module", "__import__"):
                yield from literal


def host_imports(source: str) -> list[str]:
    return [name for name in imported(source) if name.split(".")[0] in HOST]


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_no_file_imports_the_host(path: Path) -> None:
    assert host_imports(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import comfy.sd", ["comfy.sd"]),
        ("import torch, folder_paths as f", ["folder_paths"]),
        ("from nodes import VAEDecode", ["nodes"]),
        ("def f():\n    from comfy_api.latest import io", ["comfy_api.latest"]),
        ("try:\n    import server\nexcept ImportError:\n    pass", ["server"]),
        ("import importlib\nimportlib.import_module('comfy.utils')", ["comfy.utils"]),
        ("__import__('execution')", ["execution"]),
        ("import comfortable\nfrom . import nodes\nfrom vsr_ops import server\nx = 'import comfy'", []),
    ],
)
def test_the_check_would_see_it(source: str, found: list[str]) -> None:
    assert host_imports(source) == found


def test_there_is_something_to_check() -> None:
    assert len(FILES) > 10 and ROOT / "pipeline" / "upscale.py" in FILES


WATCHED = """
import importlib, json, os, sys
sys.dont_write_bytecode = True
others, mine, after = json.load(sys.stdin)
seen, strict = [], False

def watch(event, args):
    writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and args[0] != os.devnull
    changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate")
    connects = event in ("socket.connect", "socket.sendto", "socket.getaddrinfo")
    if connects or strict and (writes or changes or event.startswith("socket.") or event == "subprocess.Popen"):
        seen.append(f"{event} {args}")

sys.addaudithook(watch)
for name in others:
    importlib.import_module(name)
strict = True
for name in mine:
    importlib.import_module(name)
exec(after)
strict = False
print(json.dumps([seen, sorted(sys.modules)]))
"""


def watch(others: list[str], mine: list[str], after: str, folder: Path) -> tuple[list[str], set[str]]:
    """Imports in a new process, in an empty folder that is also its home: what it wrote or connected to, and the
    top-level modules that are there in the end.

    Of other packages only connections count: one asks the system whether it knows IPv6, one makes a cache folder.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT.parent), "HOME": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", WATCHED],
        input=json.dumps([others, mine, after]),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    seen, names = json.loads(done.stdout.splitlines()[-1])
    return seen, {name.split(".")[0] for name in names}


#: Libraries that are large or need what a host may lack: imported inside the functions that use them.
LAZY = {"spandrel", "piq", "vmaf_torch"}


def test_importing_everything_writes_nothing_opens_no_socket_and_leaves_large_libraries(tmp_path: Path) -> None:
    names = {name for path in FILES for name in imported(path.read_text(encoding="utf-8"), at_import=True)}
    others = sorted(name for name in names if name.split(".")[0] not in ("vsr_ops", "__future__", "training"))
    assert "torch" in others and "diffusers" in {name.split(".")[0] for name in others}
    seen, loaded = watch(others, MODULES, "", tmp_path)
    assert seen == [] and list(tmp_path.iterdir()) == []
    assert {"torch", "vsr_ops"} <= loaded and loaded.isdisjoint(LAZY)


def test_an_upscaler_is_imported_without_large_libraries(tmp_path: Path) -> None:
    _, loaded = watch([], ["torch", "vsr_ops.modules.dcm"], "", tmp_path)
    assert "torch" in loaded and loaded.isdisjoint(LAZY | {"torchvision"})


def test_the_watch_would_see_it(tmp_path: Path) -> None:
    after = "open('left', 'w').close(); import socket; socket.socket().close(); os.mkdir('folder')"
    seen, loaded = watch([], ["json"], f"{after}; import colorsys", tmp_path)
    assert "colorsys" in loaded
    assert [word in line for word, line in zip(("left", "socket", "folder"), seen, strict=True)] == [True] * 3
