"""Which errors mean that memory ran out: the real ones, and those that only look alike."""

from __future__ import annotations

import pytest
import torch

from vsr_ops.system.memory import ran_out


def raised(act: object) -> BaseException:
    with pytest.raises(BaseException) as caught:
        act()  # type: ignore[operator]
    return caught.value


def test_torchs_own_says_so() -> None:
    assert ran_out(torch.OutOfMemoryError("CUDA out of memory"))
    assert ran_out(MemoryError())


def test_a_cpu_allocation_that_cannot_be_says_so() -> None:
    """Asked of torch itself: 2^60 bytes fit nowhere."""
    assert ran_out(raised(lambda: torch.empty(2**60, dtype=torch.uint8)))


@pytest.mark.skipif(not hasattr(torch, "AcceleratorError"), reason="this torch has no AcceleratorError")
def test_an_accelerators_late_error_says_so() -> None:
    assert ran_out(torch.AcceleratorError("CUDA error: out of memory"))
    assert not ran_out(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))


@pytest.mark.parametrize("error", [RuntimeError("shapes cannot be multiplied"), ValueError("x"), KeyboardInterrupt()])
def test_others_do_not(error: BaseException) -> None:
    assert not ran_out(error)
