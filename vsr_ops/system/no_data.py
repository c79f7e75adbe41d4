"""Models built before their weights are there: shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _Unfilled(TorchFunctionMode):
    """Leaves out what fills a fresh weight: without data a third of the time that a module takes to build."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else given["tensor"]
        return func(*args, **given)


@contextmanager
def without_data() -> Generator[None]:
    """Within, tensors are made on torch's device "meta", and modules do not fill their weights."""
    with torch.device("meta"), _Unfilled():
        yield
