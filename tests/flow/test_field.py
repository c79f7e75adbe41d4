"""The flow of a whole video: true to a known motion, within its scenes, at other sizes, by several estimators."""

from __future__ import annotations

import logging

import pytest
import torch
from skimage.data import astronaut, chelsea
from torch import Tensor

from vsr_ops.errors import SettingError
from vsr_ops.flow.field import ESTIMATORS, Flow, check_fits, estimate_flow, latent_flow, resized
from vsr_ops.flow.warp import inside, warp

DX, DY = 5, -3


@pytest.fixture(scope="module")
def photo() -> Tensor:
    return torch.from_numpy(chelsea()).permute(2, 0, 1).float() / 255


@pytest.fixture(scope="module")
def moving(photo: Tensor) -> Tensor:
    """Six frames in which everything moves by (DX, DY), exactly: more than are estimated together."""
    return torch.stack([photo[:, 60 - k * DY :, 60 - k * DX :][:, :100, :150] for k in range(6)])


@pytest.fixture(scope="module")
def found(moving: Tensor) -> Flow:
    return estimate_flow(moving, cuts=())


def middle(x: Tensor, border: int = 12) -> Tensor:
    return x[..., border:-border, border:-border]


def known(frames: int, height: int, width: int, dx: float, dy: float) -> Flow:
    """A flow in which all moves alike and is seen, but for what leaves the picture."""
    there = torch.tensor([dx, dy]).view(1, 2, 1, 1).expand(frames - 1, 2, height, width).clone()
    return Flow(there, -there, inside(there), inside(-there), (), frames)


def test_a_translation_is_found_both_ways(found: Flow) -> None:
    true = torch.tensor([DX, DY]).view(1, 2, 1, 1)
    assert found.forward.shape == found.backward.shape == (5, 2, 100, 150)
    assert (found.frames, found.size, found.cuts) == (6, (100, 150), ())
    for flow, answer in ((found.forward, true), (found.backward, -true)):
        apart = (flow - answer).square().sum(1).sqrt()
        assert float(middle(apart).mean()) < 0.2


def test_warping_along_it_gives_the_frame_itself(moving: Tensor, found: Flow) -> None:
    for made, true in (
        (warp(moving[1:], found.forward), moving[:-1]),
        (warp(moving[:-1], found.backward), moving[1:]),
    ):
        error = (middle(made) - middle(true)).square().mean()
        assert -10 * float(error.log10()) >= 40


def test_nearly_all_inside_is_visible_and_nothing_that_leaves_is(found: Flow) -> None:
    assert found.visible_now.dtype == torch.bool and found.visible_now.shape == (5, 1, 100, 150)
    assert float(middle(found.visible_now).float().mean()) > 0.95
    assert not bool(found.visible_now[..., -DX:].any()) and not bool(found.visible_next[..., :DX].any())


def test_the_result_does_not_depend_on_what_is_estimated_together(moving: Tensor, found: Flow) -> None:
    alone = estimate_flow(moving[3:5], cuts=())
    assert torch.equal(alone.forward[0], found.forward[3]) and torch.equal(alone.visible_next[0], found.visible_next[3])


def test_nothing_crosses_a_cut(moving: Tensor) -> None:
    other = torch.from_numpy(astronaut()).permute(2, 0, 1).float()[:, :100, :150] / 255
    scenes = torch.cat([moving[:3], other.expand(2, -1, -1, -1)])
    flow, changed = estimate_flow(scenes), estimate_flow(torch.cat([moving[:3], other.flip(2).expand(2, -1, -1, -1)]))
    assert flow.cuts == changed.cuts == (3,) and list(flow.scenes()) == [(0, 3), (3, 5)]
    for values in (flow.forward, flow.backward, flow.visible_now, flow.visible_next):
        assert not bool(values[2].any())
    assert torch.equal(flow.forward[:2], changed.forward[:2])
    assert torch.equal(flow.visible_now[:2], changed.visible_now[:2])
    assert bool(flow.visible_now[3].all()), "a still scene is visible everywhere"
    first = flow.part(0, 3)
    assert first.frames == 3 and torch.equal(first.backward, flow.backward[:2])


def test_every_pair_is_told_of(moving: Tensor) -> None:
    told: list[int] = []
    estimate_flow(moving, cuts=(2,), tick=told.append)
    assert sum(told) == len(moving) - 1


@pytest.mark.parametrize("frames", [0, 1])
def test_fewer_than_two_frames_have_no_flow_and_say_so(frames: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        flow = estimate_flow(torch.zeros(frames, 3, 20, 24))
    assert flow.frames == frames and flow.size == (20, 24) and flow.forward.shape == (0, 2, 20, 24)
    assert "nothing to follow" in caplog.text
    assert latent_flow(flow, 3, 3, 8).visible_now.shape == (0, 1, 3, 3)


def test_at_latent_size_vectors_are_in_latents() -> None:
    small = resized(known(3, 64, 96, 8.0, -4.0), (8, 12))
    assert small.size == (8, 12) and small.frames == 3
    assert torch.allclose(small.forward[:, 0], torch.tensor(1.0)) and torch.allclose(
        small.forward[:, 1], torch.tensor(-0.5)
    )
    back = resized(small, (64, 96))
    assert torch.allclose(back.forward, known(3, 64, 96, 8.0, -4.0).forward)
    assert resized(small, (8, 12)) is small


def test_one_hidden_pixel_hides_the_latent_that_it_is_in() -> None:
    flow = known(2, 64, 96, 0.0, 0.0)
    flow.visible_now[0, 0, 17, 40] = False
    hidden = (~resized(flow, (8, 12)).visible_now[0, 0]).nonzero().tolist()
    assert hidden == [[2, 5]]
    assert bool(resized(flow, (8, 12), share=0.9).visible_now.all())
    flow.visible_now[0, 0, 16:20, 40:48] = False
    assert (~resized(flow, (8, 12), share=0.6).visible_now[0, 0]).nonzero().tolist() == [[2, 5]]
    assert bool(resized(flow, (8, 12), share=0.5).visible_now.all())
    uneven = ~resized(flow, (9, 12)).visible_now[0, 0]
    assert bool(uneven[2, 5]) and int(uneven.sum()) <= 2


def test_what_leaves_the_latent_is_not_visible_there() -> None:
    flow = known(2, 64, 64, 8.0, 0.0)
    flow.visible_now[:] = True
    small = resized(flow, (8, 8))
    assert not bool(small.visible_now[..., -1].any()) and bool(small.visible_now[..., :-1].all())


def test_latents_of_a_padded_video_get_the_flow_of_the_same_place() -> None:
    flow = known(2, 60, 90, 2.0, 1.0)
    flow.forward[..., :8, :8] = 4.0
    small = latent_flow(flow, 8, 12, 8)
    assert torch.allclose(small.forward[0, :, 0, 0], torch.tensor([0.5, 0.5]))
    assert torch.allclose(small.forward[0, :, -1, -1], torch.tensor([0.25, 0.125]))


def test_a_flow_of_another_video_is_refused_with_both_sizes() -> None:
    flow = known(4, 60, 90, 0.0, 0.0)
    check_fits(flow, 4, 8, 12, 8)
    check_fits(flow, 4, 64, 96, 1, multiple=32)
    with pytest.raises(SettingError, match=r"4 frames, the latent video of 5"):
        check_fits(flow, 5, 8, 12, 8)
    with pytest.raises(SettingError, match=r"90x60 pixels, the latent video of 96x72"):
        check_fits(flow, 4, 9, 12, 8)


def test_what_cannot_work_is_refused(moving: Tensor) -> None:
    with pytest.raises(SettingError, match=r"'pwc'.*dis, raft_large, raft_small"):
        estimate_flow(moving, "pwc")
    with pytest.raises(SettingError, match="expected \\(frames, 3"):
        estimate_flow(moving[:, :1])
    for cuts in ((0,), (6,), (3, 2), (2, 2)):
        with pytest.raises(SettingError, match="from 1 to 5"):
            estimate_flow(moving, cuts=cuts)


def test_estimators_are_a_table() -> None:
    assert list(ESTIMATORS) == ["dis", "raft_large", "raft_small"]
