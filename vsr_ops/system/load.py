"""What else a machine does: whether times that are measured on it are those of a quiet one."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

#: What counts as work of a processor, of the times that the systems tell apart.
_WORK = ("user", "nice", "system", "irq", "softirq", "steal", "interrupt", "dpc")
#: Cores' worth of other work that a quiet machine does.
QUIET = 0.25
#: Seconds that say nothing: systems count work in ticks of a hundredth.
BRIEF = 0.1
#: The part of the work that one thread does alone, of all that this pack does on a CPU: about.
ALONE = 0.1


class Moment(NamedTuple):
    """Seconds on the wall, of this process, and of all work on the `cores` that it may use."""

    wall: float
    own: float
    worked: float
    cores: int


def now() -> Moment:
    """This moment; where nothing says what the machine does, as if it were all ours."""
    try:
        import psutil as library
    except ImportError:  # a machine that only samples may be without
        return Moment(time.perf_counter(), time.process_time(), time.process_time(), 1)
    psutil: Any = library
    each: list[Any] = psutil.cpu_times(percpu=True)
    own = psutil.Process()
    allowed: set[int] = set(own.cpu_affinity()) if hasattr(own, "cpu_affinity") else set(range(len(each)))
    mine = [times for number, times in enumerate(each) if number in allowed] or each
    worked = sum(getattr(times, name, 0.0) for times in mine for name in _WORK)
    return Moment(time.perf_counter(), time.process_time(), worked, len(mine))


def others(began: Moment, ended: Moment) -> float:
    """Cores' worth of others' work between two moments; 0 before it can be told."""
    seconds = ended.wall - began.wall
    if seconds < BRIEF:
        return 0.0
    return max((ended.worked - began.worked) - (ended.own - began.own), 0.0) / seconds


class Watch:
    """Looks, from its making on, at what others do on the processors that this process may use."""

    def __init__(self) -> None:
        self._began = now()

    def busy(self, threads: int) -> bool:
        """Whether others leave less than `threads` need."""
        return crowded(others(self._began, now()), self._began.cores, threads)


def crowded(taken: float, cores: int, threads: int) -> bool:
    """Whether `threads` on so many `cores` must share them with others, who take `taken` cores' worth."""
    return taken > max(cores - threads, 0) + QUIET


def speedup(threads: int) -> float:
    """How many times sooner so many threads are done than one, on a quiet machine: Amdahl's law."""
    return 1 / (ALONE + (1 - ALONE) / threads)


@contextmanager
def one_thread() -> Generator[None]:
    """Torch works in one thread within: none waits for another that the machine holds up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
