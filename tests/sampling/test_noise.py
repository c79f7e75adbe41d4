"""Noise of a frame: the same in every cut of the video, another for every frame, seed and step, and normal."""

from __future__ import annotations

import math

import pytest
import torch

from vsr_ops.sampling.noise import frame_noise

SHAPE = (4, 5, 7)


def test_any_cut_of_a_video_gets_the_same() -> None:
    whole = frame_noise(range(20), SHAPE, seed=3, stream=2)
    assert whole.shape == (20, *SHAPE) and whole.dtype == torch.float32
    assert torch.equal(frame_noise(range(7, 12), SHAPE, 3, 2), whole[7:12])
    assert torch.equal(frame_noise([12, 3], SHAPE, 3, 2), whole[[12, 3]])


def test_frames_seeds_and_steps_are_strangers() -> None:
    """Also where one number takes the other's place, and for seeds of other machines' sizes."""
    keys = [(seed, frame, step) for seed in (0, 1, 2, 2**40, 2**63) for frame in range(12) for step in range(12)]
    drawn = torch.stack([frame_noise([frame], (4, 16, 16), seed, step)[0].flatten() for seed, frame, step in keys])
    alike = torch.corrcoef(drawn) - torch.eye(len(keys))
    # Of 259,000 pairs of 1,024 numbers the most alike are about 4.6 deviations of 1/32.
    assert float(alike.abs().max()) < 6 / math.sqrt(1024)


def test_it_is_normal() -> None:
    drawn = frame_noise(range(64), (4, 32, 32), 11).flatten().double()
    count = drawn.numel()
    assert abs(float(drawn.mean())) < 4 / math.sqrt(count)
    assert abs(float(drawn.square().mean()) - 1) < 4 * math.sqrt(2 / count)
    assert abs(float((drawn**4).mean()) - 3) < 4 * math.sqrt(96 / count)


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    frame_noise(range(3), SHAPE, 5)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("seed", [-1, 2**64 - 1, 2**70])
def test_every_whole_number_is_a_seed(seed: int) -> None:
    assert bool(torch.isfinite(frame_noise([0, 10**6], SHAPE, seed)).all())
