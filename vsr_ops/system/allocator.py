"""glibc's allocator in a process that is a run's own: what is freed is kept for the next tensor.

By default glibc gives every tensor above 32 MiB back to the kernel when it is freed, and its heap's end above 64 MiB,
and the kernel clears the pages of the next one again: a third and more of a CPU run. Values: mallopt(3).
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
#: As much of the heap's free top is kept: the most that mallopt's `int` holds, 2 GiB.
_KEPT = 2**31 - 1
#: Larger tensors still are mappings of their own, which cannot leave holes: none of a 1080p run's is.
_MAPPED = 2**30
#: The heap grows by so much at a time.
_STEP = 2**26


def keep_freed() -> bool:
    """Has glibc keep freed memory until `give_back`, or until more than 2 GiB of it lie at the heap's end; whether it
    does. For the start of a process that is nobody else's: elsewhere than on Linux with glibc nothing happens."""
    mallopt = _of_glibc("mallopt")
    if mallopt is None:
        return False
    options = ((_MMAP_THRESHOLD, _MAPPED), (_TRIM_THRESHOLD, _KEPT), (_TOP_PAD, _STEP))
    return all(bool(mallopt(option, value)) for option, value in options)


def give_back() -> None:
    """Gives the kernel every free page of the heap, between stages that need different memory; glibc alone."""
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _of_glibc(name: str) -> ctypes._NamedFuncPointer | None:  # pyright: ignore[reportPrivateUsage]
    """A function of the process's C library where that is glibc: musl has neither function, other systems no use."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return getattr(library, name, None) if hasattr(library, "gnu_get_libc_version") else None
