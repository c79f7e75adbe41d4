"""What makes the host wait for a device: values that are read, and copies between the two that are not asynchronous."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default, torch.ops.aten.equal.default}


class Waits(TorchDispatchMode):
    """Counts the values that are read, and notes copies between devices, those alone that wait in `waited`."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0
        self.copies: list[str] = []
        self.waited: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.reads += func in READS
        out = func(*args, **kwargs)
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            if source.device != out.device:
                # copy_'s third argument, or by name.
                asynchronous = kwargs.get("non_blocking", False) or (len(args) > 2 and bool(args[2]))
                said = f"{tuple(source.shape)} {source.device.type} to {out.device.type}"
                self.copies.append(said)
                if not asynchronous:
                    self.waited.append(said)
        return out
