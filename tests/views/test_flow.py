"""Flow as colours: Middlebury's wheel, held against torchvision's."""

from __future__ import annotations

import pytest
import torch

from vsr_ops.flow.field import estimate_flow
from vsr_ops.views.flow import flow_picture, preview, visibility_picture, wheel


def test_the_wheel_goes_once_around_from_red() -> None:
    colours = wheel()
    assert colours.shape == (55, 3)
    assert colours[0].tolist() == [1, 0, 0] and colours[15].tolist() == [1, 1, 0] and colours[21].tolist() == [0, 1, 0]
    assert colours[25].tolist() == [0, 1, 1] and colours[36].tolist() == [0, 0, 1] and colours[49].tolist() == [1, 0, 1]


def test_it_is_torchvisions_picture() -> None:
    utils = pytest.importorskip("torchvision.utils")
    generator = torch.Generator().manual_seed(7)
    flow = 9 * torch.randn(3, 2, 40, 50, generator=generator)
    flow[0, :, 0, 0] = 0
    theirs = utils.flow_to_image(flow).float() / 255
    assert float((flow_picture(flow) - theirs).abs().max()) <= 2 / 255


def test_white_stands_still_and_colour_grows_with_speed() -> None:
    flow = torch.zeros(1, 2, 4, 4)
    assert torch.equal(flow_picture(flow), torch.ones(1, 3, 4, 4))
    flow[0, 0] = torch.tensor([0.0, 1.0, 2.0, 4.0])
    shades = flow_picture(flow)[0, :, 0].min(0).values
    assert shades.tolist() == pytest.approx([1.0, 0.75, 0.5, 0.0], abs=1e-5)
    assert float(flow_picture(flow, largest=2.0)[0, :, 0, 3].max()) == pytest.approx(0.75)


def test_preview_has_a_picture_of_each_pair_and_one_of_none() -> None:
    video = torch.rand(3, 3, 24, 32)
    colours, seen = preview(estimate_flow(video, cuts=(1,)))
    assert colours.shape == seen.shape == (2, 3, 24, 32)
    assert torch.equal(colours[0], torch.ones(3, 24, 32)) and not bool(seen[0].any())
    colours, seen = preview(estimate_flow(video[:1]))
    assert colours.shape == seen.shape == (1, 3, 24, 32)


def test_visibility_is_black_and_white() -> None:
    mask = torch.tensor([[[[True, False]]]])
    assert visibility_picture(mask).tolist() == [[[[1.0, 0.0]]] * 3]
