"""What latents were made from is told by weights alone, not by the machine that adds them up."""

from __future__ import annotations

import torch

from training.data.latents import fingerprint


def test_threads_do_not_matter_and_a_bit_does() -> None:
    rng = torch.Generator().manual_seed(0)
    weights = [torch.randn(300, 257, generator=rng), torch.tensor(0.18215, dtype=torch.float64)]
    before, found = torch.get_num_threads(), set[str]()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.add(fingerprint(weights))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1
    assert fingerprint([weights[0].half().float(), weights[1]]) in found, "as a file holds them"
    weights[0][17, 5] *= 1.01
    assert fingerprint(weights) not in found
