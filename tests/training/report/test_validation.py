"""The validation: clips whose truth is known, baselines that are what they are called."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from training.data.held_out import shrunk, truths
from training.report.validation import ablation_settings, bicubic, comparison, measured, plan_of, sharpened, whole
from vsr_ops.backbones.svd import SVD
from vsr_ops.cli.demo_clip import ground_truth
from vsr_ops.image.resize import quantize8
from vsr_ops.modules.refiner import Refiner
from vsr_ops.pipeline.parts import PipelineModules
from vsr_ops.pipeline.sampler import Settings, sample

QUICK = Settings(steps=1, guidance="none", color="none")


@pytest.fixture(scope="module")
def moving() -> Tensor:
    return ground_truth()[0][:4, :, 64:192, 64:192]


def save(picture: Tensor, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy()).save(path)


def test_only_clips_kept_out_are_taken_and_all_sides_fit(tmp_path: Path) -> None:
    for name in ("kite-surf", "camel"):
        for i in range(3):
            save(torch.rand(3, 150, 214), tmp_path / name / f"{i:05d}.jpg")
    for name in ("tea-gardens", "serene"):
        save(torch.rand(3, 560, 820), tmp_path / "photos" / f"{name}.jpg")
    found = truths(tmp_path, frames=2)
    assert {name: tuple(clip.shape) for name, clip in found.items()} == {
        "kite-surf": (2, 3, 72, 104),
        "tea-gardens": (2, 3, 256, 384),
    }
    assert all(torch.equal(clip, quantize8(clip)) for clip in found.values())


def test_inputs_are_a_quarter_and_compression_costs_something(moving: Tensor) -> None:
    (clean,), (compressed,) = shrunk({"a": moving}, None), shrunk({"a": moving}, 25)
    assert clean.small.shape == compressed.small.shape == (4, 3, 32, 32)
    assert 0 < (clean.small - compressed.small).abs().mean() < 0.1
    assert bicubic(clean.small).shape == moving.shape


def test_sharpening_is_pillows_unsharp_mask_and_leaves_a_flat_picture(moving: Tensor) -> None:
    flat = torch.full((1, 3, 32, 32), 100 / 255)
    assert torch.equal(sharpened(flat), quantize8(flat))
    picture = Image.fromarray((moving[0] * 255).round().byte().permute(1, 2, 0).numpy())
    pillows = torch.tensor(list(picture.filter(ImageFilter.UnsharpMask(2, 100, 0)).tobytes())).view(128, 128, 3)
    ours = (sharpened(moving[:1])[0] * 255).permute(1, 2, 0)
    # Pillow's Gaussian is three box blurs.
    assert (ours - pillows)[8:-8, 8:-8].abs().mean() < 1


def test_without_steps_the_lr_latent_itself_is_decoded(tiny: SVD, moving: Tensor) -> None:
    lr = torch.randn(4, 4, 16, 16)
    (clip,) = shrunk({"a": moving}, None)
    plan = plan_of(tiny, clip, QUICK)
    assert torch.equal(sample(tiny, lr, plan, replace(QUICK, steps=0)), lr * tiny.scaling_factor)


def test_every_method_gives_a_clip_of_the_truths_size(tiny: SVD, moving: Tensor) -> None:
    (clip,) = shrunk({"a": moving}, None)
    scores, seconds = measured(comparison(tiny, QUICK, PipelineModules(refiner=Refiner())), [clip], tiny, QUICK)
    assert scores.methods == ("bicubic", "bicubic+USM", "DCM", "DCM+USM", "LR latent", "ours")
    assert set(seconds) == set(scores.methods) and scores.clips == ("a",)
    # Without an upscaler the "DCM" is bicubic, and a fresh refiner returns what was upscaled.
    assert scores.value("ours", "psnr_y") == pytest.approx(scores.value("bicubic", "psnr_y"), abs=0.01)
    assert scores.value("bicubic+USM", "vmaf") > scores.value("bicubic", "vmaf")


def test_a_result_comes_back_from_disk_as_it_was(tiny: SVD, moving: Tensor) -> None:
    (clip,) = shrunk({"a": moving}, None)
    upscaled = whole(tiny, clip, QUICK, PipelineModules(refiner=Refiner(), refiner_w=1.0))
    assert torch.equal(upscaled, bicubic(clip.small))


def test_the_ablation_has_every_pair_once() -> None:
    settings = ablation_settings(QUICK)
    assert len(settings) == 20
    assert len({(s.guidance, s.propagation.kinds) for s in settings.values()}) == 20
