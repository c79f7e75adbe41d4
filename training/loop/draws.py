"""Random numbers that can be drawn again: every generator comes from a seed and the number of the step."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


def generator_at(seed: int, step: int) -> torch.Generator:
    """The generator of one training step, so that a resumed run draws what the uninterrupted one drew.

    Seed and step are hashed: neighbouring seeds share no steps.
    """
    digest = hashlib.blake2b(f"{seed}:{step}".encode(), digest_size=4).digest()
    # Four bytes: torch's CPU generator reads no more of a seed.
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def uniform(rng: torch.Generator, low: float, high: float) -> float:
    """A number in [low, high)."""
    return low + (high - low) * torch.rand((), generator=rng).item()


def integer(rng: torch.Generator, high: int) -> int:
    """A whole number in [0, high)."""
    return int(torch.randint(max(high, 1), (), generator=rng).item())


def pick(rng: torch.Generator, choices: Sequence[T]) -> T:
    """One of `choices`, each as likely."""
    return choices[integer(rng, len(choices))]


def pick_weighted(rng: torch.Generator, shares: Mapping[str, float]) -> str:
    """One of the names, as likely as its share of the sum."""
    left = uniform(rng, 0, sum(shares.values()))
    for name, share in shares.items():
        left -= share
        if left < 0:
            return name
    return list(shares)[-1]
