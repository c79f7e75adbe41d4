"""glibc keeps what is freed, asked of glibc itself: in a process of its own, as it holds for a whole process."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from vsr_ops.system import allocator

GLIBC = sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")

#: Page faults of taking, touching and freeing 40 MiB ten times, and the pages that `give_back` then gives.
MEASURE = """
import ctypes, resource, sys
from vsr_ops.system.allocator import give_back, keep_freed
if sys.argv[1] == "keep":
    assert keep_freed()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def resident():
    return int(open("/proc/self/statm").read().split()[1])
def once():
    block = libc.malloc(40 << 20)
    ctypes.memset(block, 1, 40 << 20)
    libc.free(block)
once()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    once()
faults, held = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, resident()
give_back()
print(faults, held - resident())
"""


def measured(how: str) -> tuple[int, int]:
    command = [sys.executable, "-c", MEASURE, how]
    faults, given = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return int(faults), int(given)


@pytest.mark.skipif(not GLIBC, reason="not glibc on Linux")
def test_pages_are_cleared_once_and_given_back_when_asked() -> None:
    pages = (40 << 20) // 4096
    faults, given = measured("keep")
    assert faults < pages / 10, "the freed block is taken again"
    assert given > pages * 0.9, "and given back between stages"
    # What it mends, on pages of 4 KiB (a kernel with large pages for everything faults less).
    assert measured("leave")[0] > faults


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert not allocator.keep_freed()
    allocator.give_back()
