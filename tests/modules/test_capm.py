"""CAPM: what changes nothing, what the prompts' weights are, tiles that are the whole, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import TINY_UNET, TINY_VAE
from tests.support.tensors import randn
from tests.support.tiny_capm import SHAPE, WIDTHS, filled
from vsr_ops.backbones.svd import SVD
from vsr_ops.errors import SettingError
from vsr_ops.modules import capm as module
from vsr_ops.modules.capm import CAPM, SVD_UNET, SVD_VAE, WEIGHINGS, CAPMShape, attached, decoder_widths, shared_weights
from vsr_ops.modules.capm_hints import check_hint, check_strength
from vsr_ops.modules.windows import Place
from vsr_ops.sampling.tiling import cores


@pytest.mark.parametrize("size", [(1, 1), (5, 9), (16, 8)])
@pytest.mark.parametrize("hint", [None, torch.tensor([0.5]), torch.tensor([0.1, 0.2, torch.nan])])
def test_a_fresh_capm_changes_nothing(size: tuple[int, int], hint: Tensor | None) -> None:
    features = randn(3, 32, *size)
    assert torch.equal(CAPM(SHAPE)("up_blocks.1", features, hint), features)


def test_strength_of_zero_is_the_features_themselves() -> None:
    features = randn(2, 32, 6, 6)
    assert filled()("up_blocks.1", features, strength=0) is features


def test_strength_scales_the_change() -> None:
    model, features = filled(), randn(2, 32, 6, 10)
    change = model("up_blocks.1", features) - features
    assert change.abs().mean() > 0.05
    half = model("up_blocks.1", features, strength=0.5) - features
    assert (half - change / 2).abs().max() < 1e-5


def test_a_fresh_one_or_strength_zero_leaves_a_unet_as_it_is(tiny: SVD) -> None:
    widths = decoder_widths(TINY_UNET["block_out_channels"])
    model = filled(CAPMShape(SVD_UNET, widths, code=8))
    x, lr, hint = randn(4, 4, 8, 8), randn(4, 4, 8, 8, seed=1), torch.tensor([0.2, 0.3, 0.4, 0.5])

    def run() -> Tensor:
        with torch.no_grad():
            return tiny.denoise(torch.cat([x, x]), 1.0, torch.cat([lr, lr]), tiny.context(None), 4)

    plain = run()
    with attached(CAPM(model.shape), tiny.unet, hint):
        assert torch.equal(run(), plain)
    with attached(model, tiny.unet, hint, strength=0):
        assert torch.equal(run(), plain)
    with attached(model, tiny.unet, hint):
        changed = run()
    assert (changed - plain).norm() > 1e-3 * plain.norm()
    assert (changed[:4] - changed[4:]).abs().max() < 1e-5, "the hint's frames serve every video of the batch"
    with attached(model, tiny.unet, 1 - hint):
        assert not torch.allclose(run(), changed, rtol=1e-4)
    with attached(model, tiny.unet, lambda: hint):
        assert torch.equal(run(), changed)
    assert torch.equal(run(), plain), "nothing stays attached"


def test_a_prompt_weighs_the_same_beside_features_of_any_size() -> None:
    """Without their scale, large features drown it: a VAE's decoder has some of deviation 80."""
    features, hints = randn(1, 48, 10, 12), (torch.tensor([0.0]), torch.tensor([1.0]))

    def answer(model: CAPM, times: float) -> Tensor:
        low, high = (model("up_blocks.0", times * features, hint) for hint in hints)
        return (high - low) / times

    model = filled()
    model.settle({"up_blocks.0": features})
    expected = answer(model, 1)
    assert (answer(model, 80) / expected.std()).std() < 0.2
    model.settle({"up_blocks.0": 80 * features})
    assert float(model.get_buffer("levels.up_blocks_0.scale")) == pytest.approx(80 * float(features.std()))
    torch.testing.assert_close(answer(model, 80), expected, atol=1e-5, rtol=1e-4)


def test_the_dtype_stays() -> None:
    features = randn(2, 32, 6, 6)
    out = filled()("up_blocks.1", features.half())
    assert out.dtype == torch.float16
    assert (out.float() - filled()("up_blocks.1", features)).abs().max() < 0.05


# --- Weights of the prompts -----------------------------------------------------------------------------------------


def test_weights_are_linear_in_the_code() -> None:
    """No softmax and no bias: the paper's ablation has a softmax lose."""
    model = filled()
    code = randn(3, SHAPE.code)
    weights = model.weigh("up_blocks.0", code)
    assert weights.shape == (3, 5)
    assert (model.weigh("up_blocks.0", 2 * code) - 2 * weights).abs().max() < 1e-6
    assert not model.weigh("up_blocks.0", 0 * code).any()


def test_the_ablations_weights_sum_to_one_and_even_ones_read_nothing() -> None:
    """SDATC, table V: "+Softmax" and "+Prompt"."""
    code = torch.randn(6, 8, generator=torch.Generator().manual_seed(4))
    plain, soft, even = (filled(replace(SHAPE, weighing=name)) for name in WEIGHINGS)
    linear = plain.weigh("up_blocks.0", code)
    assert torch.equal(soft.weigh("up_blocks.0", code), linear.softmax(-1))
    assert torch.equal(even.weigh("up_blocks.0", code), torch.full_like(linear, 1 / SHAPE.components))
    with pytest.raises(SettingError, match="CAPM's weighing is 'hard': expected one of linear, softmax, even"):
        CAPM(replace(SHAPE, weighing="hard"))


def test_a_hint_takes_the_codes_place() -> None:
    model, features = filled(), randn(3, 32, 6, 6)
    hint = torch.tensor([0.1, torch.nan, 0.9])
    seen, told = model.weights("up_blocks.1", features), model.weights("up_blocks.1", features, hint)
    assert torch.equal(told[1], seen[1]) and not torch.allclose(told[0], seen[0])
    assert torch.allclose(told[[0, 2]], model.weights("up_blocks.1", 5 * features, hint)[[0, 2]])
    assert not torch.allclose(told[0], told[2])


def test_a_hint_for_a_videos_frames_serves_every_video() -> None:
    model, features = filled(), randn(1, 32, 6, 6).repeat(6, 1, 1, 1)
    weights = model.weights("up_blocks.1", features, torch.tensor([0.1, 0.5, 0.9]))
    assert torch.equal(weights[:3], weights[3:]) and not torch.allclose(weights[0], weights[1])


def test_a_reading_is_the_level_whose_embedding_the_code_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = filled()
    levels = torch.tensor([0.0, 25 / 51, 1.0])
    monkeypatch.setattr(CAPM, "code", lambda self, level, features: self.embedded(level, levels))
    assert torch.allclose(model.reading("up_blocks.0", randn(3, 48, 4, 4)), levels)


# --- Tiles ----------------------------------------------------------------------------------------------------------


def tiled(model: CAPM, features: Tensor, weights: Tensor, margin: int) -> Tensor:
    out = torch.empty_like(features)
    height, width = features.shape[-2:]
    for rows in cores(height, 11, margin):
        for cols in cores(width, 13, margin):
            part = features[..., rows.outer, cols.outer]
            place = Place(rows.outer.start, cols.outer.start, height, width)
            result = model("up_blocks.1", part, weights=weights, place=place)
            out[..., rows.core, cols.core] = result[..., rows.inner, cols.inner]
    return out


@pytest.mark.parametrize("size", [(32, 40), (30, 41)])
def test_tiles_with_the_frames_weights_are_the_whole(size: tuple[int, int]) -> None:
    model, features = filled(), randn(2, 32, *size)
    whole, weights = model("up_blocks.1", features), model.weights("up_blocks.1", features)
    assert model.reach == module.WINDOW
    assert (tiled(model, features, weights, model.reach) - whole).abs().max() < 1e-5
    assert (tiled(model, features, weights, model.reach // 2) - whole).abs().max() > 1e-3, "the margin is needed"


def test_a_hint_gives_tiles_the_frames_weights() -> None:
    model, features = filled(), randn(2, 32, 24, 24)
    hint = torch.tensor([0.2, 0.7])
    assert torch.equal(
        model.weights("up_blocks.1", features[..., :9, :7], hint), model.weights("up_blocks.1", features, hint)
    )


def test_the_mean_of_tiles_weights_is_nearly_the_frames() -> None:
    """w is linear in d, a mean over places: only the encoder's borders differ."""
    model, features = filled(), randn(2, 32, 64, 64)
    tiles = torch.cat([features[..., y : y + 32, x : x + 32] for y in (0, 32) for x in (0, 32)])
    apart, whole = model.weights("up_blocks.1", tiles), model.weights("up_blocks.1", features)
    shared = shared_weights(apart, 4)
    assert shared.shape == apart.shape and torch.equal(shared[:2], shared[2:4])
    assert (shared[:2] - whole).norm() < 0.5 * (apart[:2] - whole).norm()


def test_a_place_scales_with_the_level() -> None:
    assert Place(8, 16, 64, 48).scaled(0.25) == Place(2, 4, 16, 12)
    assert Place(8, 16, 64, 48).scaled(8) == Place(64, 128, 512, 384)


@pytest.mark.parametrize(("size", "whole"), [(4, 10), (8, 8), (8, 3), (1, 5)])
def test_the_prompt_is_enlarged_as_torch_does(size: int, whole: int) -> None:
    rows = module._enlarging(size, whole, 0, whole)
    x = randn(1, 1, size, size)
    expected = nn.functional.interpolate(x, (whole, whole), mode="bilinear")
    assert (rows @ x @ rows.mT - expected).abs().max() < 1e-5
    assert torch.equal(module._enlarging(size, whole, 1, whole - 1), rows[1:])


def test_gradients_reach_every_parameter_after_one_step() -> None:
    torch.manual_seed(0)
    model = CAPM(SHAPE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hint, target = torch.tensor([0.3, torch.nan]), randn(2, 32, 10, 12, seed=5)
    for _ in range(2):
        optimizer.zero_grad()
        first = model("up_blocks.0", randn(2, 48, 10, 12), hint)[:, :32]
        second = model("up_blocks.1", randn(2, 32, 10, 12), hint)
        ((first - target).square().mean() + (second - target).square().mean()).backward()
        optimizer.step()
    still = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert still == []


def test_levels_are_those_of_a_decoder(tiny: SVD) -> None:
    widths = decoder_widths(TINY_UNET["block_out_channels"])
    assert widths == {"up_blocks.0": 64, "up_blocks.1": 64, "up_blocks.2": 32}
    seen: dict[str, int] = {}

    def look(name: str) -> object:
        return lambda block, inputs, output: seen.update({name: output.shape[1]})

    handles = [tiny.unet.get_submodule(name).register_forward_hook(look(name)) for name in widths]  # type: ignore[arg-type]
    with torch.no_grad():
        tiny.denoise(randn(4, 4, 8, 8), 1.0, randn(4, 4, 8, 8), tiny.context(None), 4)
    for handle in handles:
        handle.remove()
    assert seen == widths


def test_a_video_vae_s_decoder_takes_one_too(tiny: SVD) -> None:
    """Its levels, too, are what `decoder_widths` says, and what is attached acts in each of them."""
    widths = decoder_widths(TINY_VAE["block_out_channels"])
    z, hint = randn(2, 4, 6, 6), torch.tensor([0.2, 0.8])
    plain = tiny.decode(z)
    with attached(CAPM(CAPMShape(SVD_VAE, widths)), tiny.vae.decoder, hint):
        assert torch.equal(tiny.decode(z), plain)
    for level, width in widths.items():
        with attached(filled(CAPMShape(SVD_VAE, {level: width}, code=8)), tiny.vae.decoder, hint):
            assert (tiny.decode(z) - plain).norm() > 1e-3 * plain.norm()


def test_cost_grows_with_the_area_alone() -> None:
    """Doubling both sides costs four times as many operations, not sixteen."""
    from torch.utils.flop_counter import FlopCounterMode

    counts: list[float] = []
    model = filled()
    for side in (16, 32, 64):
        with FlopCounterMode(display=False) as counter:
            model("up_blocks.1", randn(1, 32, side, side))
        counts.append(counter.get_total_flops())
    assert all(later < 4.1 * earlier for earlier, later in pairwise(counts))


# --- What is refused ------------------------------------------------------------------------------------------------


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(SettingError, match=r"unknown CAPM level 'up_blocks\.7': this one has up_blocks\.0, up_bl"):
        filled()("up_blocks.7", randn(1, 32, 4, 4))


def test_features_of_another_width_are_refused() -> None:
    with pytest.raises(SettingError, match=r"takes 32 channels, these features have 48.*svd-unet"):
        filled()("up_blocks.1", randn(1, 48, 4, 4))


@pytest.mark.parametrize("strength", [-0.1, 2.1, float("nan")])
def test_a_strength_outside_its_range_is_refused(strength: float) -> None:
    with pytest.raises(SettingError, match=rf"strength is {strength}: expected"):
        check_strength(strength)


@pytest.mark.parametrize("hint", [torch.tensor([0.2, 1.2]), torch.tensor([-0.1]), torch.zeros(0), torch.zeros(2, 2)])
def test_a_hint_that_is_no_list_of_levels_is_refused(hint: Tensor) -> None:
    with pytest.raises(SettingError, match="hint") as caught:
        check_hint(hint)
    assert "\n" not in str(caught.value)


def test_a_hint_of_another_length_is_refused() -> None:
    with pytest.raises(SettingError, match="hint has 3 compression levels for 4 frames"):
        filled()("up_blocks.1", randn(4, 32, 4, 4), torch.tensor([0.1, 0.2, 0.3]))


def test_another_backbone_or_width_names_both() -> None:
    for backbone, widths, words in (
        (SVD_VAE, WIDTHS, ("svd-unet", "svd-vae")),
        (SVD_UNET, {"up_blocks.0": 64}, ("{'up_blocks.0': 48, 'up_blocks.1': 32}", "{'up_blocks.0': 64}")),
    ):
        with pytest.raises(SettingError) as caught:
            filled().check_fits(backbone, widths)
        text = str(caught.value)
        assert "\n" not in text and all(word in text for word in words)
    filled().check_fits(SVD_UNET, {**WIDTHS, "up_blocks.2": 32})
