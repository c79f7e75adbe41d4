"""The ComfyUIs that the tests run on: each its folder, its Python and its version."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

#: How to run what is skipped where no host is named.
HOW = (
    f"COMFYUI_HOSTS=<folder>[{os.pathsep}<folder> ...] pytest tests/host, or COMFYUI_PATH=<folder>"
    " COMFYUI_PYTHON=<its Python> for one"
)


@dataclass(frozen=True)
class Host:
    """One ComfyUI: `folder` holds its main.py, `python` runs it."""

    folder: Path
    python: str

    @property
    def version(self) -> str:
        """What the host calls itself, `0.33.0` say."""
        text = (self.folder / "comfyui_version.py").read_text(encoding="utf-8")
        found = re.search(r"__version__ = \"([^\"]+)\"", text)
        return found[1] if found else "unknown"

    @property
    def numbers(self) -> tuple[int, ...]:
        """The version to compare by."""
        return tuple(int(part) for part in re.findall(r"\d+", self.version))


def known_hosts(environment: Mapping[str, str] = os.environ) -> list[Host]:
    """Those that `COMFYUI_HOSTS` names, folders with the system's separator between; else the one of `COMFYUI_PATH`, or
    of `~/ComfyUI`. Raises FileNotFoundError for a named folder that is no ComfyUI: a typing error must not skip tests.
    """
    if several := environment.get("COMFYUI_HOSTS"):
        return [_host(Path(folder).expanduser()) for folder in several.split(os.pathsep) if folder]
    if one := environment.get("COMFYUI_PATH"):
        return [_host(Path(one).expanduser(), environment.get("COMFYUI_PYTHON"))]
    usual = Path.home() / "ComfyUI"
    return [_host(usual, environment.get("COMFYUI_PYTHON"))] if (usual / "main.py").is_file() else []


def _host(folder: Path, python: str | None = None) -> Host:
    if not (folder / "main.py").is_file():
        raise FileNotFoundError(f"{folder} holds no main.py: expected a ComfyUI's folder")
    return Host(folder.resolve(), python or _python_of(folder))


def _python_of(folder: Path) -> str:
    """Of an environment in the host's folder or beside it; else this one."""
    inner = Path("Scripts/python.exe") if os.name == "nt" else Path("bin/python")
    places = [base / name / inner for base in (folder, folder.parent) for name in ("venv", ".venv")]
    return next((str(place.absolute()) for place in places if place.exists()), sys.executable)
