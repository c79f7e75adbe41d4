"""Cuts are found where scenes change and nowhere else, without the clip in memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from vsr_ops.errors import SettingError
from vsr_ops.video.scenes import find_cuts


def _scene(seed: int, count: int) -> list[Tensor]:
    """A camera panning by two pixels a frame over a smooth random picture."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 6, 12, generator=generator)
    wide = torch.nn.functional.interpolate(coarse, size=(90, 240), mode="bicubic").clamp(0, 1)[0]
    return [wide[:, :, 2 * i : 2 * i + 160] for i in range(count)]


def test_cuts_are_the_first_frames_of_new_scenes() -> None:
    frames = _scene(0, 7) + _scene(1, 4) + _scene(2, 20)
    assert find_cuts(frames) == (7, 11)


def test_a_moving_picture_without_cuts_has_none() -> None:
    assert find_cuts(_scene(0, 30)) == ()


def test_a_cut_on_the_second_frame_counts_and_the_first_frame_never_does() -> None:
    assert find_cuts(_scene(0, 1) + _scene(1, 3)) == (1,)
    assert find_cuts(_scene(0, 1)) == ()
    assert find_cuts([]) == ()


def test_a_cut_in_the_last_frame_counts() -> None:
    assert find_cuts(_scene(0, 5) + _scene(1, 1)) == (5,)


def test_noise_is_no_cut() -> None:
    generator = torch.Generator().manual_seed(5)
    still = _scene(3, 1)[0]
    noisy = [(still + 0.1 * torch.randn(still.shape, generator=generator)).clamp(0, 1) for _ in range(6)]
    assert find_cuts(noisy) == ()


def test_size_of_the_frames_does_not_decide() -> None:
    frames = _scene(0, 3) + _scene(1, 3)
    large = [torch.nn.functional.interpolate(f[None], scale_factor=4, mode="bilinear")[0] for f in frames]
    assert find_cuts(large) == find_cuts(frames) == (3,)


def test_a_higher_threshold_finds_no_more() -> None:
    dim = [frame * 0.5 for frame in _scene(0, 3)] + [frame * 0.5 + 0.25 for frame in _scene(0, 3)]
    assert find_cuts(dim, threshold=10.0) == (3,)
    assert find_cuts(dim, threshold=250.0) == ()


def test_frames_are_taken_one_at_a_time_and_let_go() -> None:
    living: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def stream() -> Iterator[Tensor]:
        nonlocal most
        for frame in _scene(0, 12):
            copy = frame.clone()
            living.add(copy)
            most = max(most, len(living))
            yield copy

    find_cuts(stream())
    assert most <= 3


@pytest.mark.parametrize("threshold", [0.0, -1.0, 256.0, float("nan")])
def test_a_threshold_that_cannot_work_is_refused(threshold: float) -> None:
    with pytest.raises(SettingError, match=r"\(0, 255\]"):
        find_cuts(_scene(0, 2), threshold=threshold)


def test_a_frame_of_another_shape_is_refused() -> None:
    with pytest.raises(SettingError, match="frame 1 has shape"):
        find_cuts([torch.zeros(3, 8, 8), torch.zeros(1, 8, 8)])
