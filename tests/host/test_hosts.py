"""Which ComfyUIs the tests find, and with which Python; none is needed for that."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.host.hosts import known_hosts


def host_at(folder: Path, version: str = "0.33.0") -> Path:
    folder.mkdir(parents=True)
    (folder / "main.py").touch()
    (folder / "comfyui_version.py").write_text(f'__version__ = "{version}"\n', encoding="utf-8")
    return folder


def environment_at(folder: Path) -> str:
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    python.parent.mkdir(parents=True)
    python.touch()
    return str(python)


def test_several_are_named_each_with_its_own_environment(tmp_path: Path) -> None:
    """In its folder, or beside it."""
    old, new = host_at(tmp_path / "old" / "ComfyUI", "0.3.64"), host_at(tmp_path / "new" / "ComfyUI")
    inside, beside = environment_at(old / ".venv"), environment_at(tmp_path / "new" / "venv")
    found = known_hosts({"COMFYUI_HOSTS": f"{old}{os.pathsep}{new}"})
    assert [(host.version, host.python) for host in found] == [("0.3.64", inside), ("0.33.0", beside)]
    assert found[0].numbers < found[1].numbers


def test_one_may_name_its_python(tmp_path: Path) -> None:
    folder = str(host_at(tmp_path / "ComfyUI"))
    assert known_hosts({"COMFYUI_PATH": folder, "COMFYUI_PYTHON": "/some/python"})[0].python == "/some/python"
    assert known_hosts({"COMFYUI_PATH": folder})[0].python == sys.executable


def test_a_wrong_name_is_an_error_and_no_reason_to_skip(tmp_path: Path) -> None:
    for named in ({"COMFYUI_PATH": str(tmp_path)}, {"COMFYUI_HOSTS": str(tmp_path / "typo")}):
        with pytest.raises(FileNotFoundError, match=r"holds no main\.py"):
            known_hosts(named)
