"""SFA and TFA: nothing at their start, the paper's equation, a guide that matters, scenes of frames, files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from vsr_ops.checkpoints.module_file import write_module
from vsr_ops.errors import CheckpointError, SettingError
from vsr_ops.modules.sateco import SATeCo, SATeCoShape, Strengths
from vsr_ops.modules.sateco_file import KIND, SATeCos, load_satecos, write_satecos

NAMES = ("up_blocks.0", "up_blocks.1")
INNER = dict.fromkeys(NAMES, 8)
UNET = SATeCoShape("sd-unet", {NAMES[0]: 12, NAMES[1]: 8}, INNER, guide=6, head=8, shrinks={NAMES[0]: 2, NAMES[1]: 1})
VAE = SATeCoShape("sd-vae", dict.fromkeys(NAMES, 10), INNER, guide=6, head=8, taps={NAMES[0]: 7, NAMES[1]: 5})


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some(shape: SATeCoShape = UNET) -> SATeCo:
    """One in which nothing is zero."""
    torch.manual_seed(0)
    model = SATeCo(shape)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


def given(frames: int = 4) -> tuple[Tensor, Tensor]:
    """Features of a level and its guide."""
    return rand(frames, 12, 10, 9), rand(frames, 6, 10, 9, seed=1)


def test_a_fresh_one_and_strength_0_change_nothing_to_the_bit() -> None:
    f, guide = given()
    assert torch.equal(SATeCo(UNET)("up_blocks.0", f, guide, 4), f)
    assert some()("up_blocks.0", f, guide, 4, Strengths(0, 0)) is f
    alone = some()("up_blocks.0", f, guide, 4, Strengths(1, 0))
    assert not torch.equal(some()("up_blocks.0", f, guide, 4, Strengths(0, 1)), f)
    assert not torch.equal(alone, some()("up_blocks.0", f, guide, 4))


def test_with_nothing_kept_it_is_the_papers_equation() -> None:
    """S n + M, in float64, of features normalised frame by frame and channel by channel."""
    model, (f, guide) = some(), given()
    block = model.part("up_blocks.0")
    block.sfa.keep.zero_()
    found = model("up_blocks.0", f, guide, 4, Strengths(1, 0))
    wide = f.double()
    n = (wide - wide.mean((2, 3), keepdim=True)) / (wide.var((2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
    gain, shift = block.sfa.modulate.double()(guide.double()).chunk(2, 1)
    torch.testing.assert_close(found.double(), gain * n + shift, atol=1e-5, rtol=1e-5)


def test_the_scale_is_a_unit_of_measure() -> None:
    """Features a hundred times as large, measured so, change a hundred times as much."""
    model, (f, guide) = some(), given()
    change = model("up_blocks.0", f, guide, 4) - f
    model.settle({"up_blocks.0": torch.tensor([-100.0, 100.0])[None, None].expand(1, 12, 1, 2)})
    model.part("up_blocks.0").scale.fill_(100.0)
    torch.testing.assert_close(model("up_blocks.0", 100 * f, guide, 4), 100 * (f + change), atol=1e-2, rtol=1e-4)


def test_settling_measures_the_deviation() -> None:
    model = some()
    model.settle({"up_blocks.0": 7 * rand(4, 12, 16, 16)})
    assert abs(float(model.part("up_blocks.0").scale) - 7) < 0.1


def test_the_guide_decides_and_frames_of_a_clip_see_each_other() -> None:
    model, (f, guide) = some(), given(6)
    found = model("up_blocks.0", f, guide, 3)
    moved = guide.clone()
    moved[1] = moved[1].roll(2, -1)
    changed = (model("up_blocks.0", f, moved, 3) - found).abs().amax((1, 2, 3))
    assert bool((changed[:3] > 1e-4).all()), "the frames of its clip"
    assert torch.equal(changed[3:], torch.zeros(3)), "not those of another"
    spatial = model("up_blocks.0", f, moved, 3, Strengths(1, 0)) - model("up_blocks.0", f, guide, 3, Strengths(1, 0))
    assert bool((spatial.abs().amax((1, 2, 3)) > 0).tolist() == [False, True, False, False, False, False])


def test_guides_have_the_levels_sizes() -> None:
    guides = some().guides(rand(3, 4, 9, 7))
    assert {name: tuple(value.shape) for name, value in guides.items()} == {
        "up_blocks.0": (3, 6, 5, 4),
        "up_blocks.1": (3, 6, 9, 7),
    }
    assert some(VAE).guide_of("up_blocks.1", rand(2, 5, 4, 4)).shape == (2, 6, 4, 4)
    with pytest.raises(SettingError, match="is a VAE's"):
        some(VAE).guides(rand(1, 4, 8, 8))


def test_half_precision_comes_back_in_it() -> None:
    f, guide = given()
    assert some()("up_blocks.0", f.half(), guide, 4).dtype == torch.float16


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    both = SATeCos(some(), some(VAE))
    write_satecos(path, both, "noise")
    again = load_satecos(path)
    assert again.unet is not None and again.vae is not None and again.unet.shape == UNET and again.vae.shape == VAE
    f, guide = given()
    torch.testing.assert_close(
        again.unet("up_blocks.0", f, guide, 4), some()("up_blocks.0", f, guide, 4), atol=0.02, rtol=0.01
    )
    write_satecos(path, SATeCos(vae=some(VAE)), "noise")
    assert load_satecos(path).unet is None


def test_what_is_refused(tmp_path: Path) -> None:
    model, (f, guide) = some(), given()
    for strengths in ((3, 1), (1, -1), (float("nan"), 1)):
        with pytest.raises(SettingError, match=r"expected a number from 0 \(off\) to 2"):
            Strengths(*strengths)
    with pytest.raises(SettingError, match=r"guide at up_blocks\.0 is 4 frames of 4x10, the features 4 of 9x10"):
        model("up_blocks.0", f, guide[..., :4], 4)
    with pytest.raises(SettingError, match=r"unknown SATeCo level 'up_blocks\.7'"):
        model("up_blocks.7", f, guide, 4)
    with pytest.raises(SettingError, match="takes 12 channels, these features have 8"):
        model("up_blocks.0", f[:, :8], guide, 4)
    model.check_fits("sd-unet", {"up_blocks.0": 12, "up_blocks.1": 8, "up_blocks.2": 4})
    for backbone, widths in (("svd-unet", {}), ("sd-unet", {"up_blocks.0": 12})):
        with pytest.raises(SettingError, match="is made for"):
            model.check_fits(backbone, widths)
    with pytest.raises(SettingError, match="expected the same levels"):
        SATeCoShape("sd-unet", {"a": 1}, {"b": 1}, shrinks={"a": 1})
    with pytest.raises(SettingError, match="powers of two"):
        SATeCo(SATeCoShape("sd-unet", {"a": 8}, {"a": 8}, 6, 8, shrinks={"a": 3}))
    write_module(tmp_path / "odd.safetensors", KIND, {"unet": {"backbone": "sd-vae"}}, {"a": torch.ones(1)}, "")
    with pytest.raises(CheckpointError, match="is no SATeCo's"):
        load_satecos(tmp_path / "odd.safetensors")
