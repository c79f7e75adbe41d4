"""The video upscaler's laws: nothing at its start, the same both ways, whole or frame by frame, never past a cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.small_vaes import pictures
from vsr_ops.checkpoints.safefile import UPSCALER_KEY
from vsr_ops.cli.demo_clip import ground_truth
from vsr_ops.errors import CheckpointError, SettingError
from vsr_ops.flow.warp import warp
from vsr_ops.image.resize import quantize8, resize, resize_bicubic
from vsr_ops.image.upscale import upscale_frames
from vsr_ops.metrics.pixels import psnr_y
from vsr_ops.modules.dcm import load_dcm
from vsr_ops.modules.enlarging import Enlarging
from vsr_ops.modules.motion_pairs import Pairs
from vsr_ops.modules.tmsa import Windows, taken
from vsr_ops.modules.video_upscaler import (
    VideoUpscaler,
    VideoUpscalerShape,
    check_base,
    load_video_upscaler,
    sharpened,
    write_video_upscaler,
)

SMALL = VideoUpscalerShape(8, 2, 1)
ATTENTIVE = VideoUpscalerShape(16, 3, form="attention")
#: Both hear of two frames on each side.
FORMS = pytest.mark.parametrize("shape", [SMALL, ATTENTIVE], ids=lambda shape: shape.form)
CLOSE = 2e-5


def some(shape: VideoUpscalerShape = SMALL) -> VideoUpscaler:
    """A model in which nothing is zero."""
    torch.manual_seed(0)
    model = VideoUpscaler(shape)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def moving(frames: int, height: int = 24, width: int = 32) -> tuple[Tensor, Tensor]:
    """A picture that moves two pixels a frame, and the same enlarged."""
    wide = pictures(1, 3, 4 * height, 4 * (width + 2 * frames))
    large = torch.cat([wide[..., 8 * t : 8 * t + 4 * width] for t in range(frames)])
    return resize_bicubic(large, (height, width)).clamp(0, 1), large


def result(model: VideoUpscaler, lr: Tensor, large: Tensor, cuts: tuple[int, ...] = (), strength: float = 1) -> Tensor:
    return torch.stack(list(sharpened(model, zip(lr, large, strict=True), cuts, strength)))


@FORMS
def test_a_new_one_and_strength_0_leave_the_enlarged_video_to_the_bit(shape: VideoUpscalerShape) -> None:
    lr, large = moving(3)
    assert torch.equal(result(VideoUpscaler(shape), lr, large), large)
    assert torch.equal(result(some(shape), lr, large, strength=0), large)


@torch.no_grad()
@FORMS
@pytest.mark.parametrize("frames", [1, 2, 3, 6])
def test_frame_by_frame_is_the_whole_scene_at_once(frames: int, shape: VideoUpscalerShape) -> None:
    model, (lr, large) = some(shape), moving(frames)
    whole = model(lr[None], large[None], Pairs.of(lr[:-1], lr[1:]))[0]
    assert whole.abs().max() > 0.05
    torch.testing.assert_close(result(model, lr, large), (large + whole).clamp(0, 1), atol=CLOSE, rtol=0)


@FORMS
def test_backwards_is_the_same_backwards(shape: VideoUpscalerShape) -> None:
    model, (lr, large) = some(shape), moving(5)
    torch.testing.assert_close(
        result(model, lr.flip(0), large.flip(0)), result(model, lr, large).flip(0), atol=CLOSE, rtol=0
    )


@FORMS
def test_a_frame_hears_of_as_many_as_its_shape_says_and_of_no_more(shape: VideoUpscalerShape) -> None:
    """Exchanges, or the radius: two."""
    model, (lr, large) = some(shape), moving(7)
    other = large.clone()
    other[6] = other[6].flip(-1)
    changed = (result(model, lr, other) - result(model, lr, large)).abs().amax((1, 2, 3))
    assert bool((changed[:4] == 0).all()) and bool((changed[4:] > 1e-4).all())


@FORMS
def test_nothing_is_heard_across_a_cut(shape: VideoUpscalerShape) -> None:
    model, (lr, large) = some(shape), moving(5)
    parts = torch.cat([result(model, lr[:2], large[:2]), result(model, lr[2:], large[2:])])
    assert torch.equal(result(model, lr, large, (2,)), parts)
    assert not torch.equal(result(model, lr, large), parts)


@FORMS
def test_frames_too_small_for_a_flow_stand_still(shape: VideoUpscalerShape) -> None:
    lr, large = moving(2, 8, 12)
    assert bool(torch.isfinite(result(some(shape), lr, large)).all())


@torch.no_grad()
def test_windows_look_where_the_mean_flow_leads() -> None:
    """A window's keys are the pixels of another frame that its flow leads to, and none beyond the border."""
    frame = torch.arange(16 * 24, dtype=torch.float32).view(1, 16, 24, 1)
    flow = torch.zeros(1, 2, 16, 24)
    flow[:, 0, :, 8:], flow[:, 1] = 2.6, -1.4
    windows = Windows.of(16, 24, 0, flow.device)
    seen, there = taken(frame, *windows.displaced(flow))
    corner = seen[0, 1].view(8, 8)  # rows 0 to 8, columns 8 to 16: three to the right, one up
    assert torch.equal(corner[1:], frame[0, :7, 11:19, 0]) and not there[0, 1].view(8, 8)[0].any()
    still = seen[0, 3].view(8, 8)  # rows 8 on, columns 0 to 8: one up alone
    assert torch.equal(still, frame[0, 7:15, :8, 0]) and bool(there[0, 3].all())
    shifted = Windows.of(16, 24, 4, flow.device)
    again, _ = taken(frame, shifted.rows[None], shifted.cols[None])
    assert torch.equal(shifted.joined(again, 16, 24), frame)


def test_the_bundled_one_is_nearer_to_the_truth_than_the_dcm_and_steadier() -> None:
    truth = ground_truth()[0][:6, :, :192, :256]
    lr = quantize8(resize_bicubic(truth, (48, 64)))
    large = load_dcm("lite", torch.device("cpu"))(lr)
    found = result(load_video_upscaler("lite"), lr, large)
    assert float(psnr_y(found, truth).mean()) > float(psnr_y(large, truth).mean()) + 0.4
    pairs = Pairs.of(truth[:-1], truth[1:])
    warped = [((warp(x[1:], pairs.forward) - x[:-1]) * pairs.seen_after).abs().mean() for x in (found, large)]
    assert warped[0] < 0.9 * warped[1]


def test_on_top_of_an_upscaler_and_at_another_size() -> None:
    """Whatever is below it is brought to four times first; strength 0 is that alone, to the bit."""
    model, (lr, _) = some(), moving(4)
    dcm, size = load_dcm("lite", torch.device("cpu")), (96, 128)
    whole = torch.stack(list(Enlarging(dcm, model)(lr, size)))
    expected = result(model, lr, upscale_frames(lr, size, upscale_fn=dcm))
    torch.testing.assert_close(whole, expected, atol=CLOSE, rtol=0)
    smaller = torch.stack(list(Enlarging(dcm, model, method="lanczos")(lr, (50, 61))))
    assert torch.equal(smaller, resize("lanczos", whole, (50, 61)).clamp(0, 1))
    off, plain = (list(Enlarging(dcm, video, 0)(lr, size)) for video in (model, None))
    assert all(torch.equal(a, b) for a, b in zip(off, plain, strict=True))
    bare = torch.stack(list(Enlarging(None, model)(lr, size)))
    torch.testing.assert_close(bare, result(model, lr, upscale_frames(lr, size)), atol=CLOSE, rtol=0)


def test_what_a_file_was_trained_on_is_asked_for(tmp_path: Path) -> None:
    for base in ("dcm", None):
        write_video_upscaler(tmp_path / "own.safetensors", some(), "noise", {UPSCALER_KEY: base} if base else {})
        check_base(tmp_path / "own.safetensors")
    write_video_upscaler(tmp_path / "other.safetensors", some(), "noise", {UPSCALER_KEY: "swinir.pth"})
    with pytest.raises(SettingError, match=r"pictures enlarged by swinir\.pth, which is not bundled"):
        check_base(tmp_path / "other.safetensors")


@FORMS
def test_files(tmp_path: Path, shape: VideoUpscalerShape) -> None:
    model, path = some(shape), tmp_path / "v.safetensors"
    write_video_upscaler(path, model, "noise")
    lr, large = moving(3)
    again = load_video_upscaler(path)
    assert again.shape == shape
    torch.testing.assert_close(result(again, lr, large), result(model, lr, large), atol=1e-2, rtol=0)


def test_what_is_refused(tmp_path: Path) -> None:
    lr, large = moving(2)
    with pytest.raises(SettingError, match=r"the enlarged video is 64x48, the input 32x24: .* 128x96"):
        result(some(), lr, large[..., ::2, ::2])
    for strength in (-0.1, 2.1, float("nan")):
        with pytest.raises(SettingError, match=r"strength is .*: expected 0"):
            result(some(), lr, large, strength=strength)
    with pytest.raises(SettingError, match="form is 'other': expected one of exchange, attention"):
        VideoUpscaler(VideoUpscalerShape(form="other"))
    with pytest.raises(CheckpointError, match="no such file"):
        load_video_upscaler(tmp_path / "none.safetensors")
