"""Noise by frame: the same for a frame wherever its video is cut, and nothing in common otherwise."""

from __future__ import annotations

import pytest
import torch

from vsr_ops.sampling.noise import frame_noise

SHAPE = (4, 24, 32)


def test_any_cut_of_a_video_gets_the_same_noise() -> None:
    whole = frame_noise(range(40), SHAPE, seed=5)
    assert torch.equal(frame_noise(range(17, 29), SHAPE, seed=5), whole[17:29])
    assert torch.equal(frame_noise([39, 3, 3], SHAPE, seed=5), whole[[39, 3, 3]])


@pytest.mark.parametrize("seed", [0, 1, -7, 2**63, 2**64 - 1])
def test_it_is_white_and_neighbours_have_nothing_in_common(seed: int) -> None:
    """Frames, seeds and streams beside each other: what a seed of sum or product would make equal."""
    noise = torch.cat(
        [
            frame_noise(range(6), SHAPE, seed),
            frame_noise(range(6), SHAPE, seed + 1),
            frame_noise(range(6), SHAPE, seed, stream=1),
        ]
    ).flatten(1)
    count = noise.shape[1]
    correlation = torch.corrcoef(noise)
    # Of independent samples it is normal with deviation 1/sqrt(n): six of them are beyond chance for 153 pairs.
    assert (correlation - torch.eye(len(noise))).abs().max() < 6 / count**0.5
    assert noise.mean(1).abs().max() < 6 / count**0.5
    assert (noise.std(1) - 1).abs().max() < 6 / (2 * count) ** 0.5


def test_seeds_beyond_64_bits_come_round() -> None:
    """A host's seeds are unsigned, torch's signed: both mean the same 64 bits."""
    assert torch.equal(frame_noise([0], SHAPE, -1), frame_noise([0], SHAPE, 2**64 - 1))
