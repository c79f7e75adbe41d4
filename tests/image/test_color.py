"""The laws of AdaIN and of the wavelet split, and StableSR's blur as a plain 3x3 convolution."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from vsr_ops.errors import SettingError
from vsr_ops.image.color import COLOR, adain, correct, wavelet, wavelet_split


def clip(seed: int, frames: int = 3, height: int = 40, width: int = 52) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    gain = torch.rand(frames, 3, 1, 1, generator=generator) * 0.5 + 0.1
    return torch.rand(frames, 3, height, width, generator=generator) * gain + gain / 2


def statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.double().mean((-2, -1)), x.double().std((-2, -1), correction=0)


def test_adain_has_the_references_mean_and_deviation() -> None:
    x, reference = clip(0), clip(1, height=17, width=90)
    result = adain(x, reference)
    assert result.shape == x.shape
    for ours, theirs, before in zip(statistics(result), statistics(reference), statistics(x), strict=True):
        assert (ours - theirs).abs().max() < 1e-5
        assert (before - theirs).abs().max() > 1e-2


def test_adain_holds_at_full_frame_size() -> None:
    x, reference = clip(0, 1, 1080, 1920), clip(1, 1, 270, 480)
    for ours, theirs in zip(statistics(adain(x, reference)), statistics(reference), strict=True):
        assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_adain_of_a_flat_frame_is_the_references_mean(value: float) -> None:
    x, reference = torch.full((2, 3, 31, 37), value), clip(1, 2)
    result = adain(x, reference)
    assert (result - reference.mean((-2, -1), keepdim=True)).abs().max() < 1e-5
    assert adain(reference, torch.full_like(x, value)).sub(value).abs().max() < 1e-5


def test_adain_to_itself_is_no_change() -> None:
    x = clip(0)
    assert (adain(x, x) - x).abs().max() < 1e-6


def test_adain_strength_is_linear() -> None:
    x, reference = clip(0), clip(1)
    expected = x + 0.3 * (adain(x, reference) - x)
    assert (adain(x, reference, 0.3) - expected).abs().max() < 1e-6


def test_smoothed_adain_still_removes_a_constant_cast_from_a_changing_scene() -> None:
    truth = clip(3, frames=9)
    cast = truth * torch.tensor([0.8, 1.1, 0.9]).view(3, 1, 1) + 0.05
    assert (adain(cast, truth, smooth=2.0) - truth).abs().max() < 1e-5


def test_smoothing_lessens_the_flicker_that_a_noisy_reference_brings() -> None:
    x = clip(0, frames=1).repeat(15, 1, 1, 1)
    noise = 0.05 * torch.randn(15, 3, 1, 1, generator=torch.Generator().manual_seed(5))
    reference = clip(1, frames=1) + noise

    def flicker(result: torch.Tensor) -> float:
        return float(result.mean((-2, -1)).diff(dim=0).abs().mean())

    rough, smooth = flicker(adain(x, reference)), flicker(adain(x, reference, smooth=3.0))
    assert smooth < 0.3 * rough
    # A width far below one frame reaches no neighbour: it is no smoothing at all.
    assert (adain(x, reference, smooth=0.05) - adain(x, reference)).abs().max() < 1e-6


def test_smoothing_is_symmetric_in_time() -> None:
    x, reference = clip(0, 7), clip(1, 7)
    backward = adain(x.flip(0), reference.flip(0), smooth=1.5).flip(0)
    assert (adain(x, reference, smooth=1.5) - backward).abs().max() < 1e-5


@pytest.mark.parametrize("levels", [1, 3, 5, 9])
def test_wavelet_split_reconstructs(levels: int) -> None:
    x = clip(0)
    high, low = wavelet_split(x, levels)
    assert (high + low - x).abs().max() < 1e-6
    assert high.abs().max() > 1e-2


@pytest.mark.parametrize("shape", [(40, 52), (33, 7)])
def test_wavelet_low_is_stablesrs_blur(shape: tuple[int, int]) -> None:
    x = clip(0, 2, *shape)
    expected = x
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]).div(16).expand(3, 1, 3, 3)
    for level in range(5):
        padded = functional.pad(expected, (2**level,) * 4, mode="replicate")
        expected = functional.conv2d(padded, kernel, groups=3, dilation=2**level)
    assert (wavelet_split(x, 5)[1] - expected).abs().max() < 1e-6


def test_wavelet_takes_low_from_the_reference_and_high_from_x() -> None:
    x, reference = clip(0), clip(1)
    expected = wavelet_split(x)[0] + wavelet_split(reference)[1]
    assert (wavelet(x, reference) - expected).abs().max() < 1e-6
    assert torch.equal(wavelet(x, x), x)
    halfway = x + 0.5 * (wavelet(x, reference) - x)
    assert (wavelet(x, reference, 0.5) - halfway).abs().max() < 1e-6


def test_wavelet_removes_a_constant_shift_exactly() -> None:
    x = clip(0)
    assert (wavelet(x + 0.125, x) - x).abs().max() < 1e-6


def test_wavelet_of_one_pixel_is_the_reference() -> None:
    x, reference = torch.rand(1, 3, 1, 1), torch.rand(1, 3, 1, 1)
    assert torch.allclose(wavelet(x, reference), reference, atol=1e-6)


@pytest.mark.parametrize("name", list(COLOR))
def test_strength_zero_is_the_same_tensor(name: str) -> None:
    x = clip(0)
    assert correct(name, x, clip(1), 0.0) is x


@pytest.mark.parametrize("name", ["adain", "wavelet", "detail"])
def test_correct_keeps_dtype_input_and_frames_apart(name: str) -> None:
    x, reference = clip(0), clip(1)
    before = x.clone()
    result = correct(name, x, reference)
    assert torch.equal(x, before)
    assert torch.equal(correct(name, x[1:2], reference[1:2]), result[1:2])
    half = correct(name, x.half(), reference.half())
    assert half.dtype == torch.float16 and (half.float() - result).abs().max() < 5e-3


def test_none_is_the_input_whatever_the_reference() -> None:
    x = clip(0)
    assert correct("none", x, clip(1, height=8)) is x


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(SettingError, match=r"'lab'.*adain, wavelet, detail, none"):
        correct("lab", clip(0), clip(1))


def test_wavelet_names_both_sizes() -> None:
    with pytest.raises(SettingError, match=r"40x52.*20x26"):
        wavelet(clip(0), clip(1, height=20, width=26))


@pytest.mark.parametrize("name", ["adain", "wavelet", "detail"])
@pytest.mark.parametrize("strength", [-0.1, 1.5, float("nan")])
def test_strength_outside_its_range(name: str, strength: float) -> None:
    with pytest.raises(SettingError, match="strength"):
        correct(name, clip(0), clip(1), strength)


@pytest.mark.parametrize("reference", [clip(1, frames=2), clip(1)[:, :1], clip(1)[0], clip(1)[:0]])
def test_reference_of_other_frames_or_channels(reference: torch.Tensor) -> None:
    for name in ("adain", "wavelet", "detail"):
        with pytest.raises(SettingError, match="frames"):
            correct(name, clip(0), reference)


def test_other_settings_out_of_range() -> None:
    with pytest.raises(SettingError, match="levels is 0"):
        wavelet_split(clip(0), 0)
    for width in (-1.0, float("inf"), float("nan")):
        with pytest.raises(SettingError, match="smooth"):
            adain(clip(0), clip(1), smooth=width)


SMOOTHED = ["adain", "wavelet", "detail"]


@pytest.mark.parametrize("name", SMOOTHED)
def test_smooth_zero_changes_no_bit_whatever_the_cuts(name: str) -> None:
    x, reference = clip(0, 6), clip(1, 6)
    plain = COLOR[name](x, reference, 0.7)
    assert torch.equal(correct(name, x, reference, 0.7, smooth=0.0), plain)
    assert torch.equal(correct(name, x, reference, 0.7, smooth=0.0, cuts=(2, 3)), plain)
    assert not torch.equal(correct(name, x, reference, 0.7, smooth=1.0), plain)


@pytest.mark.parametrize("name", ["wavelet", "detail"])
def test_a_smoothed_wavelet_is_the_gaussian_of_the_corrections(name: str) -> None:
    x, reference = clip(0, 9), clip(1, 9)
    correction = (correct(name, x, reference) - x).double()
    smooth = 0.8
    result = correct(name, x, reference, smooth=smooth) - x
    for i in range(9):
        # Three deviations, rounded up: three frames either side.
        near = range(max(0, i - 3), min(9, i + 4))
        weights = [2.718281828459045 ** (-((i - j) ** 2) / (2 * smooth**2)) for j in near]
        expected = sum(w * correction[j] for j, w in zip(near, weights, strict=True)) / sum(weights)
        assert (result[i] - expected).abs().max() < 1e-6


@pytest.mark.parametrize("name", SMOOTHED)
@pytest.mark.parametrize("smooth", [1e-300, 0.3, 2.0, 50.0, 1e300])
def test_smoothing_still_removes_a_static_colour_error(name: str, smooth: float) -> None:
    truth = clip(3, frames=9)
    cast = truth + torch.tensor([0.1, -0.05, 0.02]).view(3, 1, 1)
    assert (correct(name, cast, truth, smooth=smooth) - truth).abs().max() < 1e-5


def test_smoothing_a_wavelet_removes_a_static_uneven_error_too() -> None:
    truth = clip(3, 7)
    error = wavelet_split(clip(5, 1))[1]
    unsmoothed = wavelet(truth + error, truth)
    assert (wavelet(truth + error, truth, smooth=2.0) - unsmoothed).abs().max() < 1e-5


@pytest.mark.parametrize("name", SMOOTHED)
def test_smoothing_lessens_flicker_by_every_method(name: str) -> None:
    x = clip(0, frames=1).repeat(15, 1, 1, 1)
    noise = 0.05 * torch.randn(15, 3, 1, 1, generator=torch.Generator().manual_seed(5))
    reference = clip(1, frames=1) + noise

    def flicker(result: torch.Tensor) -> float:
        return float(result.mean((-2, -1)).diff(dim=0).abs().mean())

    assert flicker(correct(name, x, reference, smooth=3.0)) < 0.3 * flicker(correct(name, x, reference))


@pytest.mark.parametrize("name", SMOOTHED)
def test_smoothing_never_crosses_a_cut(name: str) -> None:
    x, reference = clip(0, 10), clip(1, 10)
    result = correct(name, x, reference, 0.9, smooth=2.0, cuts=(3, 4))
    alone = [correct(name, x[a:b], reference[a:b], 0.9, smooth=2.0) for a, b in ((0, 3), (3, 4), (4, 10))]
    assert torch.equal(result, torch.cat(alone))
    assert not torch.equal(result, correct(name, x, reference, 0.9, smooth=2.0))


@pytest.mark.parametrize("name", SMOOTHED)
def test_smoothing_runs_the_same_backward(name: str) -> None:
    x, reference = clip(0, 7), clip(1, 7)
    backward = correct(name, x.flip(0), reference.flip(0), smooth=1.5, cuts=(5,)).flip(0)
    assert (correct(name, x, reference, smooth=1.5, cuts=(2,)) - backward).abs().max() < 1e-5


@pytest.mark.parametrize("name", SMOOTHED)
def test_smooth_and_cuts_that_cannot_work_are_named(name: str) -> None:
    for width in (-1.0, float("inf"), float("nan")):
        with pytest.raises(SettingError, match="smooth"):
            correct(name, clip(0), clip(1), smooth=width)
    for cuts in ((0,), (3,), (2, 1), (1, 1), (-1,)):
        with pytest.raises(SettingError, match="scene cuts"):
            correct(name, clip(0), clip(1), cuts=cuts)
