"""Imports without what a run never uses, for the start of a process that is nobody else's.

Importing diffusers' models brings in transformers, accelerate, SciPy and torchvision, and with torch's compiler SymPy:
more than all the rest takes. The packages are optional to it, and of the compiler it takes marks for functions alone,
which mean nothing to a process that compiles nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

#: What diffusers does without where Python says that it is not there.
OPTIONAL = ("accelerate", "peft", "scipy", "torchvision", "transformers")
#: Torch's compiler, and its marks: a function that is not compiled, and one that is not looked into.
COMPILER, MARKS = "torch._dynamo", ("disable", "allow_in_graph")


@contextmanager
def lean() -> Generator[None]:
    """Within, none of OPTIONAL can be imported, and of torch's compiler its marks alone, each of which leaves a
    function as it is; afterwards all is there as before. What is imported already stays."""
    compiler = ModuleType(COMPILER, "Marks without a compiler.")
    for mark in MARKS:
        setattr(compiler, mark, _mark)
    held = {name: None for name in OPTIONAL if name not in sys.modules}
    placed: dict[str, Any] = held if COMPILER in sys.modules else held | {COMPILER: compiler}
    sys.modules.update(placed)
    try:
        yield
    finally:
        for name, module in placed.items():
            if sys.modules.get(name, ...) is module:
                del sys.modules[name]


def _mark(fn: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    """A mark as a decorator, bare or called."""
    return fn if fn is not None else _mark
