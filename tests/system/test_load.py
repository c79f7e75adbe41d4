"""What others do on the machine, against a process that really works."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from vsr_ops.system.load import Moment, Watch, crowded, now, one_thread, others, speedup


def test_another_process_at_work_is_seen() -> None:
    with subprocess.Popen([sys.executable, "-S", "-c", "print(flush=True)\nwhile True: pass"], stdout=-1) as other:
        try:
            assert other.stdout is not None and other.stdout.read(1)
            began, watch = now(), Watch()
            time.sleep(0.4)
            assert others(began, now()) > 0.4 and watch.busy(began.cores)
        finally:
            other.kill()
    assert not Watch().busy(began.cores), "nothing can be told at once"


def test_own_work_is_nobody_elses() -> None:
    began = Moment(10.0, 5.0, 100.0, 2)
    assert others(began, Moment(12.0, 8.0, 103.0, 2)) == 0
    assert others(began, Moment(12.0, 6.0, 103.0, 2)) == pytest.approx(1)
    first = now()
    while (last := now()).own - first.own < 0.1:
        pass
    assert last.worked - first.worked > 0.05 and first.cores >= 1, "own work is counted, before it is taken off"


@pytest.mark.parametrize(
    ("taken", "cores", "threads", "expected"),
    [(0.1, 2, 2, False), (0.5, 2, 2, True), (0.9, 4, 2, False), (2.5, 4, 2, True), (1.0, 1, 2, True)],
)
def test_a_machine_is_busy_where_threads_must_share(taken: float, cores: int, threads: int, expected: bool) -> None:
    assert crowded(taken, cores, threads) is expected


def test_threads_gain_less_than_their_number() -> None:
    assert speedup(1) == 1 and 1.7 < speedup(2) < 2 and speedup(4) < 4
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), one_thread():
        assert torch.get_num_threads() == 1
        raise RuntimeError
    assert torch.get_num_threads() == before
