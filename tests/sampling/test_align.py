"""Alignment along the flow: the motion error never rises, what is already aligned stays, scenes stay apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.tensors import randn
from vsr_ops.errors import SettingError
from vsr_ops.flow.field import Flow
from vsr_ops.flow.warp import inside, warp
from vsr_ops.sampling.align import MODES, align, check_strength, motion_error, splat

N, C, H, W = 5, 4, 12, 16
HUGE = [1e-6, 0.02, 0.3, 1.0, 7.0, 1e3, 1e12, 1e38]


def flow_of(
    dx: float = 0.0, dy: float = 0.0, cuts: tuple[int, ...] = (), frames: int = N, seed: int | None = None
) -> Flow:
    """A translation that is seen wherever it stays inside, wobbling where there is a seed; none across cuts."""
    there = torch.tensor([dx, dy]).view(1, 2, 1, 1).expand(frames - 1, 2, H, W).clone()
    back = -there
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        there, back = (x + 0.7 * torch.randn(x.shape, generator=generator) for x in (there, back))
    now, after = inside(there), inside(back)
    for cut in cuts:
        for values in (there, back, now, after):
            values[cut - 1] = 0
    return Flow(there, back, now, after, cuts, frames)


def noise(seed: int = 0, frames: int = N, channels: int = C) -> Tensor:
    return randn(frames, channels, H, W, seed=seed)


@pytest.mark.parametrize("strength", HUGE)
@pytest.mark.parametrize("v", [0.01, 1.0, 700.0])
def test_the_motion_error_never_rises(strength: float, v: float) -> None:
    for seed in range(3):
        flow, z = flow_of(1.3, -0.6, cuts=(3,), seed=seed), noise(seed)
        assert motion_error(align(z, flow, strength, v), flow) <= motion_error(z, flow)


@pytest.mark.parametrize("strength", [0.01, 0.5, 1.0])
def test_propagation_never_raises_it_either(strength: float) -> None:
    for seed in range(3):
        flow, z = flow_of(1.3, -0.6, cuts=(3,), seed=seed), noise(seed)
        assert motion_error(align(z, flow, strength, 1.0, "propagate"), flow) <= motion_error(z, flow)


@pytest.mark.parametrize("mode", MODES)
def test_flicker_on_a_moving_picture_goes_down(mode: str) -> None:
    flow = flow_of(2.0, 1.0)
    whole = noise(1, 1)[0].repeat(1, 2, 2)
    true = torch.stack([whole[:, 6 - k : 6 - k + H, 12 - 2 * k : 12 - 2 * k + W] for k in range(N)])
    assert motion_error(true, flow) < 1e-5
    flickers = true + 0.2 * noise(2)
    z = flickers
    for _ in range(10):
        z = align(z, flow, 0.02 if mode == "gradient" else 0.5, 3.0, mode)
    assert motion_error(z, flow) < 0.6 * motion_error(flickers, flow)
    assert float((z - true).square().mean()) < float((flickers - true).square().mean())


def test_the_step_is_against_the_gradient_of_the_error() -> None:
    """By autograd on the definition, for a lambda so small that nothing is halved."""
    flow, z = flow_of(1.3, -0.6, seed=4), noise(4).requires_grad_()
    there = (warp(z[1:], flow.forward) - z[:-1]).abs() * flow.visible_now
    back = (warp(z[:-1], flow.backward) - z[1:]).abs() * flow.visible_next
    total = there.sum() + back.sum()
    total.backward()
    assert z.grad is not None
    seen = C * (int(flow.visible_now.sum()) + int(flow.visible_next.sum()))
    assert motion_error(z.detach(), flow) == pytest.approx(float(total.detach()) / seen, rel=1e-5)
    moved = align(z.detach(), flow, 1e-3, 0.8) - z.detach()
    assert torch.allclose(moved, -1e-3 * 0.8 * z.grad, atol=1e-6)


def test_splat_is_the_transpose_of_warp() -> None:
    flow = flow_of(2.4, -1.7, seed=5).forward
    x, y = noise(5, N - 1), noise(6, N - 1)
    assert float((warp(x, flow) * y).sum()) == pytest.approx(float((x * splat(y, flow)).sum()), rel=1e-3)
    assert float(splat(y, flow).sum()) == pytest.approx(float(y.sum()), rel=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_more_rounds_are_the_step_taken_again(mode: str) -> None:
    flow, z = flow_of(1.3, -0.6, cuts=(3,), seed=3), noise(3)
    twice = align(align(z, flow, 0.1, 2.0, mode), flow, 0.1, 2.0, mode)
    assert torch.equal(align(z, flow, 0.1, 2.0, mode, rounds=2), twice)
    assert motion_error(twice, flow) < motion_error(align(z, flow, 0.1, 2.0, mode), flow)


@pytest.mark.parametrize("mode", MODES)
def test_what_needs_no_alignment_is_left_alone(mode: str) -> None:
    z, flow = noise(7), flow_of(1.0, 1.0)
    assert align(z, flow, 0.0, 5.0, mode) is z and align(z, flow, 0.5, 0.0) is z
    hidden = Flow(
        flow.forward, flow.backward, flow.visible_now & False, flow.visible_next & False, flow.cuts, flow.frames
    )
    assert torch.equal(align(z, hidden, 0.9, 5.0, mode), z) and motion_error(z, hidden) == 0
    static = noise(8, 1).expand(N, -1, -1, -1)
    assert float((align(static, flow_of(), 0.9, 5.0, mode) - static).abs().max()) <= 1e-6
    assert torch.equal(align(z[:1], flow_of(frames=1), 0.9, 5.0, mode), z[:1])


@pytest.mark.parametrize("mode", MODES)
def test_scenes_know_nothing_of_each_other(mode: str) -> None:
    flow, z = flow_of(1.0, -1.0, cuts=(3,), seed=9), noise(9)
    # A gradient step that is too long for the first scene, and not for the large values of the second.
    strength, other = 1.0, torch.cat([z[:3], 50 * noise(10, 2)])
    out = align(z, flow, strength, 2.0, mode)
    assert not torch.equal(out[:3], z[:3])
    assert torch.equal(out[:3], align(other, flow, strength, 2.0, mode)[:3])
    assert torch.equal(out[:3], align(z[:3], flow.part(0, 3), strength, 2.0, mode))


@pytest.mark.parametrize("mode", MODES)
def test_the_input_is_kept_and_its_dtype_comes_out(mode: str) -> None:
    flow, z = flow_of(1.0, 0.5, seed=11), noise(11, channels=9).half()
    before = z.clone()
    out = align(z, flow, 0.2, 2.0, mode)
    assert torch.equal(z, before) and out.dtype == torch.float16 and not torch.equal(out, z)
    assert motion_error(out, flow) <= motion_error(z, flow)


def test_it_runs_where_autograd_is_shut_off() -> None:
    with torch.inference_mode():
        assert not torch.equal(align(noise(12), flow_of(1.0), 0.1, 2.0), noise(12))


def test_more_pairs_than_are_warped_together_give_the_same() -> None:
    frames = 12
    flow, z = flow_of(1.0, 0.5, frames=frames, seed=13), noise(13, frames)
    alone = sum(
        motion_error(z[i : i + 2], flow.part(i, i + 2))
        * C
        * (int(flow.visible_now[i].sum()) + int(flow.visible_next[i].sum()))
        for i in range(frames - 1)
    )
    seen = C * (int(flow.visible_now.sum()) + int(flow.visible_next.sum()))
    assert motion_error(z, flow) == pytest.approx(alone / seen, rel=1e-5)


def test_what_cannot_work_is_refused() -> None:
    z, flow = noise(), flow_of()
    for bad in (-0.1, float("nan"), float("inf")):
        with pytest.raises(SettingError, match=f"lambda is {bad}"):
            align(z, flow, bad, 1.0)
    with pytest.raises(SettingError, match="share from 0 to 1"):
        align(z, flow, 1.5, 1.0, "propagate")
    with pytest.raises(SettingError, match=r"'warp'.*gradient, propagate"):
        align(z, flow, 0.1, 1.0, "warp")
    with pytest.raises(SettingError, match=r"scale is 'edm'.*bounded, ddpm"):
        check_strength(0.1, "gradient", "edm")
    with pytest.raises(SettingError, match=r"'ddpm' in mode propagate.*expected bounded"):
        check_strength(0.1, "propagate", "ddpm")
    with pytest.raises(SettingError, match="5 frames, the latent video of 4"):
        align(z[:4], flow, 0.1, 1.0)
    with pytest.raises(SettingError, match="16x12 pixels, the latent video of 15x12"):
        align(z[..., :15], flow, 0.1, 1.0)
