"""Blocks that several of the pack's small networks are made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """`x + conv2(relu(conv1(x)))` of features `(n, width, h, w)`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Features `(n, c, h, w)` with their change."""
        return x + self.conv2(torch.relu_(self.conv1(x)))
