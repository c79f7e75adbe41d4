"""A device's memory: how running out is told from other errors, and how tensors cross over without waiting for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .allocator import give_back

#: CUDA's number for its own out-of-memory, in errors that torch does not sort (cudaErrorMemoryAllocation).
_CUDA_NO_MEMORY = 2
#: Newer torch has a class for what an accelerator reports later than at the allocation.
_LATE: type[BaseException] = getattr(torch, "AcceleratorError", RuntimeError)


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out: torch's own, an accelerator's late one, or a CPU allocation's."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    if isinstance(error, _LATE) and (getattr(error, "error_code", None) == _CUDA_NO_MEMORY or "out of memory" in text):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in text


def free_cached() -> None:
    """Gives back what the allocators, torch's and the C library's, keep for later."""
    give_back()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def machine_memory() -> tuple[int, int]:
    """The machine's memory, what is available of it and all of it, in bytes."""
    try:
        import psutil
    except ImportError:
        # A machine that only samples may be without; Linux says itself what is unused.
        page = os.sysconf("SC_PAGE_SIZE")
        return page * os.sysconf("SC_AVPHYS_PAGES"), page * os.sysconf("SC_PHYS_PAGES")
    memory = psutil.virtual_memory()
    return memory.available, memory.total


def free_bytes(device: torch.device) -> int:
    """Memory free now, on the GPU (what torch's allocator keeps for later included) or in the machine."""
    if device.type != "cuda":
        return machine_memory()[0]
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """`x` there, in the order of that device's work but without waiting for it: CUDA takes what it copies from ordinary
    memory at once, and reads pinned memory in its turn."""
    return x.to(device, non_blocking=device.type == "cuda")


def home_of(device: torch.device, nbytes: int) -> torch.device:
    """Where a video of so many bytes is put together: on the device where it takes at most an eighth of what is free,
    else in the machine's memory."""
    return device if device.type == "cuda" and nbytes <= free_bytes(device) / 8 else torch.device("cpu")


def may_pin() -> bool:
    """Whether more of the machine's memory may be pinned: while half of it is free, for torch gives none back."""
    available, total = machine_memory()
    return available > total / 2


def to_host(x: Tensor, pin: bool = True) -> Tensor:
    """A copy of `x` in the machine's memory. Pinned, which only CUDA's is, it may not have arrived when this returns:
    give it to `to_device`, which comes after it in the device's order, or wait for the device before it is read."""
    if x.device.type != "cuda" or not pin:
        return x.to("cpu", copy=True)
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    host.copy_(x, non_blocking=True)
    return host


@dataclass(frozen=True)
class Memory:
    """What a run asks when an evaluation fails: a host has a predicate and a way to free of its own."""

    ran_out: Callable[[BaseException], bool] = ran_out
    free: Callable[[], None] = free_cached
