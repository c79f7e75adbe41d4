"""A device's memory running out: how that is told from other errors, and what is freed before the next try."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

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
    """Gives back what torch's allocator keeps for later."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Memory:
    """What a run asks when an evaluation fails: a host has a predicate and a way to free of its own."""

    ran_out: Callable[[BaseException], bool] = ran_out
    free: Callable[[], None] = free_cached
