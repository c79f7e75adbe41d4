"""A command of its own imports no more than it needs, and leaves everything importable."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import vsr_ops
from vsr_ops.system.lean import COMPILER, OPTIONAL, lean

ROOT = Path(vsr_ops.__file__).parents[1]
#: Seconds to import, all together; what diffusers would bring in, and a library of upscalers.
SLOW = {*OPTIONAL, "torch._dynamo", "sympy", "spandrel", "skimage", "kornia", "pandas"}

COMMAND = """
import sys
from vsr_ops.__main__ import main
code = main(["plan", "nowhere.mp4"], alone=True)
print(code, *sorted(sys.modules))
import scipy
"""


def test_plan_waits_for_no_library_that_it_does_not_need() -> None:
    done = subprocess.run([sys.executable, "-c", COMMAND], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    code, *found = done.stdout.split()
    assert code == "2" and "nowhere.mp4" in done.stderr
    assert {"torch", "diffusers.models.modeling_utils", "vsr_ops.cli.commands"} <= set(found)
    assert SLOW & set(found) == set()


def test_marks_leave_a_function_as_it_is_and_what_was_there_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (COMPILER, *OPTIONAL):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "scipy", sys)  # imported before
    before = dict(sys.modules)
    with lean():
        marks = importlib.import_module(COMPILER)
        assert marks.disable(len) is len and marks.disable()(len) is len and marks.allow_in_graph(len) is len
        assert marks.disable(len, True, reason="slow") is len
        assert importlib.import_module("scipy") is sys
        with pytest.raises(ImportError):
            importlib.import_module("transformers")
    assert sys.modules == before
