"""Modules without data: the shapes of real ones."""

from __future__ import annotations

import torch
from torch import nn

from vsr_ops.system.no_data import without_data


def test_shapes_alone_and_only_within() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 5), nn.Embedding(6, 4))

    with without_data():
        empty = build()
    real = build()
    assert all(each.is_meta for each in empty.parameters())
    assert {k: v.shape for k, v in empty.state_dict().items()} == {k: v.shape for k, v in real.state_dict().items()}
    assert all(bool(each.isfinite().all()) for each in real.parameters())
    assert float(next(real.parameters()).detach().std()) > 0.05
    empty.load_state_dict(real.state_dict(), assign=True)
    assert all(torch.equal(a, b) for a, b in zip(empty.parameters(), real.parameters(), strict=True))
