"""Flow, and what is measured along it: tOF, warping error, flicker. And seams."""

from __future__ import annotations

import math

import pytest
import torch
from skimage.data import chelsea

from vsr_ops.errors import SettingError
from vsr_ops.flow.warp import dis_flow, inside, visibility, warp
from vsr_ops.metrics.seams import Borders, plan_borders, seam_energy, seam_ratio
from vsr_ops.metrics.time import flicker, tof, warp_error, warp_error_along
from vsr_ops.sampling.tiling import TileSize, plan_tiles

DX, DY = 5, -3


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    return torch.from_numpy(chelsea()).permute(2, 0, 1).float() / 255


def moving_by(photo: torch.Tensor, dx: int, dy: int) -> torch.Tensor:
    """Four frames in which everything moves by (dx, dy), exactly."""
    return torch.stack([photo[:, 60 - k * dy :, 60 - k * dx :][:, :100, :150] for k in range(4)])


@pytest.fixture(scope="module")
def moving(photo: torch.Tensor) -> torch.Tensor:
    return moving_by(photo, DX, DY)


def constant(height: int, width: int, dx: float, dy: float) -> torch.Tensor:
    return torch.tensor([dx, dy]).view(1, 2, 1, 1).expand(1, 2, height, width)


def test_warping_along_a_known_translation_gives_the_frame_before(moving: torch.Tensor) -> None:
    flow = constant(100, 150, DX, DY)
    seen = inside(flow)
    assert float(seen.float().mean()) == pytest.approx((100 - abs(DY)) * (150 - abs(DX)) / (100 * 150))
    assert float(((warp(moving[1:2], flow) - moving[:1]).abs() * seen).max()) < 1e-5


def test_warping_error_is_zero_on_a_translation(moving: torch.Tensor) -> None:
    flow = constant(100, 150, DX, DY)
    assert float(warp_error_along(moving[:1], moving[1:2], flow, torch.ones(1, 1, 100, 150))) < 1e-3
    # With the flow estimated, a twentieth of a level; with none, five levels and more.
    assert float(warp_error(moving, moving).max()) < 0.1
    still = warp_error_along(moving[:1], moving[1:2], 0 * flow, torch.ones(1, 1, 100, 150))
    assert float(still) > 5


def test_flow_has_the_sign_and_order_of_the_design(moving: torch.Tensor) -> None:
    forward = dis_flow(moving[:-1], moving[1:])
    assert forward.shape == (3, 2, 100, 150) and forward.dtype == torch.float32
    middle = forward[..., 10:-10, 10:-10]
    assert float((middle - torch.tensor([DX, DY]).view(1, 2, 1, 1)).abs().max()) < 0.2
    assert torch.equal(dis_flow(moving[:-1], moving[1:]), forward)


def test_what_leaves_the_picture_or_is_covered_is_not_visible(moving: torch.Tensor) -> None:
    forward, backward = constant(40, 60, 6, 0), constant(40, 60, -6, 0)
    seen = visibility(forward, backward)
    assert torch.equal(seen[..., :-6], torch.ones(1, 1, 40, 54)) and float(seen[..., -6:].max()) == 0
    astray = backward.clone()
    astray[:, :, 10:20, 20:30] = 3.0
    hidden = visibility(forward, astray)
    assert float(hidden[0, 0, 12:18, 16:22].max()) == 0 and float(hidden[0, 0, 30:, :50].min()) == 1


def test_tof_is_the_difference_of_the_flows(photo: torch.Tensor, moving: torch.Tensor) -> None:
    """|dx| + |dy| of two motions' difference: not of their lengths, which backwards are alike."""
    assert tof(moving, moving).tolist() == [0.0, 0.0, 0.0]
    frozen, apart = moving[:1].expand(4, -1, -1, -1), abs(DX) + abs(DY)
    slower = moving_by(photo, DX - 1, DY + 1)
    for other, expected in ((frozen, apart), (moving.flip(0), 2 * apart), (slower, 2)):
        assert tof(other, moving).numpy() == pytest.approx(expected, abs=0.05)
        assert torch.equal(tof(moving, other), tof(other, moving))


def test_flicker_is_measured_where_the_truth_stands_still(photo: torch.Tensor) -> None:
    truth = photo[None, :, 60:156, 60:188].repeat(4, 1, 1, 1)
    levels = torch.tensor([0.0, 3.0, 0.0, 1.0]).view(4, 1, 1, 1) / 255
    assert flicker(truth + levels, truth).numpy() == pytest.approx([3, 3, 1], abs=1e-3)
    assert flicker(truth, truth).tolist() == [0, 0, 0]
    # The right half of the truth moves; what flickers only there is not flicker.
    busy = truth.clone()
    busy[1::2, :, :, 64:] = truth[1::2, :, :, 64:].flip(-1)
    only_right = busy.clone()
    only_right[1::2, :, :, 72:] += 0.1
    assert flicker(only_right, busy).tolist() == [0, 0, 0]


def test_flicker_says_nothing_where_nothing_stands_still(photo: torch.Tensor) -> None:
    crops = torch.stack([photo[:, 60 : 60 + 96, 60 + 9 * k : 60 + 9 * k + 128] for k in range(3)])
    noise = 0.1 * torch.rand(crops.shape, generator=torch.Generator().manual_seed(0))
    assert all(math.isnan(value) for value in flicker(crops + noise, crops + noise).tolist())


@pytest.mark.parametrize("metric", [tof, warp_error, flicker])
def test_one_frame_has_no_time(metric: object) -> None:
    frame = torch.rand(1, 3, 40, 40)
    with pytest.raises(SettingError, match="at least two RGB frames"):
        metric(frame, frame)  # type: ignore[operator]


def test_flow_of_what_cannot_be_is_refused() -> None:
    for other in (torch.rand(2, 3, 40, 41), torch.rand(2, 1, 40, 40)):
        with pytest.raises(SettingError, match="optical flow got 2x3x40x40 and"):
            dis_flow(torch.rand(2, 3, 40, 40), other)
    with pytest.raises(SettingError, match="at least 12x12"):
        dis_flow(torch.rand(1, 3, 8, 40), torch.rand(1, 3, 8, 40))


# --- Seams ----------------------------------------------------------------------------------------------------------


def test_borders_of_a_plan_are_those_inside_the_picture() -> None:
    plan = plan_tiles(4, 12, 20, TileSize(8, 8, 4), overlap=0.5)
    assert plan_borders(plan, 96, 160) == Borders((32, 64), (32, 64, 96, 128))
    # A latent padded beyond the picture has a border less.
    assert plan_borders(plan, 60, 100) == Borders((32,), (32, 64, 96))
    assert plan_borders(plan_tiles(4, 8, 8, TileSize(8, 8, 4)), 64, 64) == Borders((), ())


def test_seams_show_at_tile_borders_and_not_beside_them(photo: torch.Tensor) -> None:
    truth = photo[None, :, 60:156, 60:188]
    places = Borders((48,), (32, 96))
    assert seam_ratio(truth, truth, places).tolist() == [1.0]
    step = torch.zeros(96, 128)
    step[48:] += 0.03
    step[:, 32:96] += 0.03
    seamed = float(seam_ratio(truth + step, truth, places))
    assert seamed > 1.3
    assert float(seam_ratio(truth + 2 * step, truth, places)) > seamed
    # The same steps half a tile away are no seams.
    assert float(seam_ratio(truth + step.roll((24, 16), (0, 1)), truth, places)) < 1.05


def test_seam_energy_by_hand() -> None:
    """A flat picture with one step: all of the gradient is in the border's three differences."""
    x = torch.zeros(1, 3, 20, 64)
    x[..., 32:] = 0.5
    ratio = float(seam_energy(x, Borders((), (32,))))
    step, floor = 0.5 * 219 / 255, 0.1 / 255
    assert ratio == pytest.approx((step / 3 + floor) / floor, rel=1e-4)


def test_seams_without_borders_are_refused() -> None:
    x = torch.rand(1, 3, 32, 32)
    for places in (Borders((), ()), Borders((32,), (0, 40))):
        with pytest.raises(SettingError, match="expected some inside the picture"):
            seam_energy(x, places)
