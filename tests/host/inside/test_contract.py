"""The host contract: this host keeps it, it is whole, and it would tell."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from .conftest import NAME, ROOT

HERE, ROOM = Path(__file__).parent, ROOT / "nodes" / "host"
HOST = ("comfy", "comfy_extras", "comfy_api", "folder_paths", "latent_preview", "node_helpers")


@pytest.fixture(scope="session")
def contract(host: ModuleType) -> ModuleType:
    return importlib.import_module(f"{NAME}.nodes.host.contract")


def test_this_host_keeps_it(contract: ModuleType) -> None:
    assert contract.broken() == []


def test_an_upscale_model_of_ours_has_what_the_host_reads_off_it(contract: ModuleType, nodes: dict[str, Any]) -> None:
    """Under any host: 0.33.0 began to ask for a patcher."""
    given = nodes["VSRLoadDCM"].execute("lite").args[0]
    name = "comfy_extras.nodes_upscale_model.ImageUpscaleWithModel.execute"
    asked = contract.reads(name, "upscale_model")
    assert "scale" in asked
    missing = [each for each in asked if not hasattr(given, each)]
    assert not missing, f"{name} reads upscale_model.{', '.join(missing)}: Load DCM (VSR) gives none"


# --- It is whole ----------------------------------------------------------------------------------------------------


def dotted(node: ast.expr, names: dict[str, str]) -> str | None:
    """`comfy.sd.VAE` of an expression that is one, through local names for the host's modules."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    inner = dotted(node.value, names) if isinstance(node, ast.Attribute) else None
    return (inner and isinstance(node, ast.Attribute) and f"{inner}.{node.attr}") or None


def local_names(tree: ast.Module) -> dict[str, str]:
    """What a file calls the host's modules and what it imports from them."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots = {alias.name.split(".")[0] for alias in node.names}
            names |= {root: root for root in roots if root in HOST}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in HOST and node.level == 0:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            pairs = [(node.targets[0], node.value)]
            if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(node.targets[0].elts, node.value.elts, strict=True))
            for target, value in pairs:
                found = dotted(value, names)
                if isinstance(target, ast.Name) and found is not None:
                    names[target.id] = found
    return names


def used(source: str) -> Iterator[str]:
    """Every name of the host's that a file writes, the longest of each chain."""
    tree = ast.parse(source)
    names = local_names(tree)
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Attribute, ast.Name)) and id(node) not in inner:
            found = dotted(node, names)
            if found is not None and found.count("."):
                yield found
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("comfy."):
            yield node.value


def test_the_search_finds_what_is_used() -> None:
    source = """
import comfy.utils
from comfy.sd import VAE
def f():
    manage, other = comfy.model_management, 1
    manage.free_memory(1)
    comfy.utils.ProgressBar(2).update(3)
    return VAE, {"target": "comfy.ldm.Thing"}
"""
    assert {"comfy.model_management.free_memory", "comfy.utils.ProgressBar", "comfy.sd.VAE", "comfy.ldm.Thing"} <= set(
        used(source)
    )


def test_every_symbol_that_the_pack_uses_is_in_it(contract: ModuleType) -> None:
    lines = [line.removeprefix("?") for lines in contract.CONTRACT.values() for line in lines]
    known = {line.split("(")[0].split(" <- ")[0].split(": ")[0].split(" ~ ")[0] for line in lines}
    modules = {name.rsplit(".", 1)[0] for name in known}
    missing = {
        f"{path.name}: {name}"
        for path in ROOM.glob("*.py")
        if path.name != "contract.py"
        for name in used(path.read_text(encoding="utf-8"))
        if name not in known | modules and not any(name.startswith(f"{each}.") for each in known)
    }
    assert missing == set()


def test_every_test_that_it_names_is_there(contract: ModuleType) -> None:
    for test in contract.CONTRACT:
        file, name = test.split("::")
        tree = ast.parse((HERE / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test


# --- It would tell --------------------------------------------------------------------------------------------------


def gone(owner: str, name: str) -> Any:
    return lambda patch: patch.delattr(importlib.import_module(owner), name)


def otherwise(owner: str, name: str, function: Any) -> Any:
    return lambda patch: patch.setattr(importlib.import_module(owner), name, function)


class Emptied:
    """A class without attributes."""

    def encode(self, pixels: Any) -> None: ...


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (gone("comfy.samplers", "calculate_sigmas"), ("comfy.samplers.calculate_sigmas", "is gone", "test_parity.py")),
        (otherwise("comfy.sample", "prepare_noise", lambda latent: None), ("prepare_noise", "it takes (latent)")),
        (
            otherwise("comfy.sampler_helpers", "_prepare_sampling", lambda conds, model: None),
            ("takes conds, model",),
        ),
        (otherwise("comfy.sd", "VAE", Emptied), ("comfy.sd.VAE: ", "vae_dtype", "is gone")),
        (gone("comfy.patcher_extension", "WrappersMP"), ("WrappersMP.APPLY_MODEL", "WrappersMP is gone")),
    ],
    ids=["a function that is gone", "another call", "another place for a hook", "attributes", "a class"],
)
def test_a_break_is_named(
    contract: ModuleType, monkeypatch: pytest.MonkeyPatch, change: Any, words: tuple[str, ...]
) -> None:
    change(monkeypatch)
    found = "\n".join(contract.broken())
    assert all(word in found for word in words), found


def test_what_came_later_may_be_missing(contract: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    management = importlib.import_module("comfy.model_management")
    monkeypatch.delattr(management, "is_oom", raising=False)
    assert contract.broken() == []
