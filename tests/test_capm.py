"""CAPM: what changes nothing, what the prompts' weights are, tiles that are the whole, files, and its training."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests.conftest import TINY_UNET, TINY_VAE, randomise
from training.capm import CAPMTask, parts_of
from training.draws import generator_at
from training.recipe import to_recipe
from vsr_ops import capm as module
from vsr_ops.capm import (
    CAPM,
    KIND,
    SD_VAE,
    SVD_UNET,
    SVD_VAE,
    CAPMs,
    CAPMShape,
    Place,
    attached,
    check_hint,
    check_strength,
    decoder_widths,
    load_capms,
    shared_weights,
    write_capms,
)
from vsr_ops.checkpoint import SVDWeights, write_svd
from vsr_ops.decode_prompts import Prompts
from vsr_ops.errors import CheckpointError, SettingError
from vsr_ops.module_file import write_module
from vsr_ops.streaming_decode import stream_decode
from vsr_ops.svd import SVD
from vsr_ops.tiling import cores

WIDTHS = {"up_blocks.0": 48, "up_blocks.1": 32}
SHAPE = CAPMShape(SVD_UNET, WIDTHS, code=8, prompt=6, size=4)
VAE_SHAPE = CAPMShape(SVD_VAE, {"up_blocks.1": 32}, code=8, prompt=6, size=4)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(shape: CAPMShape = SHAPE) -> CAPM:
    """A CAPM with random weights everywhere."""
    torch.manual_seed(0)
    model = CAPM(shape)
    randomise(model, 3)
    return model.eval().requires_grad_(False)


# --- What changes nothing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (5, 9), (16, 8)])
@pytest.mark.parametrize("hint", [None, torch.tensor([0.5]), torch.tensor([0.1, 0.2, torch.nan])])
def test_a_fresh_capm_changes_nothing(size: tuple[int, int], hint: Tensor | None) -> None:
    features = noise(3, 32, *size)
    assert torch.equal(CAPM(SHAPE)("up_blocks.1", features, hint), features)


def test_strength_of_zero_is_the_features_themselves() -> None:
    features = noise(2, 32, 6, 6)
    assert filled()("up_blocks.1", features, strength=0) is features


def test_strength_scales_the_change() -> None:
    model, features = filled(), noise(2, 32, 6, 10)
    change = model("up_blocks.1", features) - features
    assert change.abs().mean() > 0.05
    half = model("up_blocks.1", features, strength=0.5) - features
    assert (half - change / 2).abs().max() < 1e-5


def test_a_fresh_one_or_strength_zero_leaves_a_unet_as_it_is(tiny: SVD) -> None:
    widths = decoder_widths(TINY_UNET["block_out_channels"])
    model = filled(CAPMShape(SVD_UNET, widths, code=8))
    x, lr, hint = noise(4, 4, 8, 8), noise(4, 4, 8, 8, seed=1), torch.tensor([0.2, 0.3, 0.4, 0.5])

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


def test_the_dtype_stays() -> None:
    features = noise(2, 32, 6, 6)
    out = filled()("up_blocks.1", features.half())
    assert out.dtype == torch.float16
    assert (out.float() - filled()("up_blocks.1", features)).abs().max() < 0.05


# --- Weights of the prompts -----------------------------------------------------------------------------------------


def test_weights_are_linear_in_the_code() -> None:
    """No softmax and no bias: the paper's ablation has a softmax lose."""
    model = filled()
    code = noise(3, SHAPE.code)
    weights = model.weigh("up_blocks.0", code)
    assert weights.shape == (3, 5)
    assert (model.weigh("up_blocks.0", 2 * code) - 2 * weights).abs().max() < 1e-6
    assert not model.weigh("up_blocks.0", 0 * code).any()


def test_a_hint_takes_the_codes_place() -> None:
    model, features = filled(), noise(3, 32, 6, 6)
    hint = torch.tensor([0.1, torch.nan, 0.9])
    seen, told = model.weights("up_blocks.1", features), model.weights("up_blocks.1", features, hint)
    assert torch.equal(told[1], seen[1]) and not torch.allclose(told[0], seen[0])
    assert torch.allclose(told[[0, 2]], model.weights("up_blocks.1", 5 * features, hint)[[0, 2]])
    assert not torch.allclose(told[0], told[2])


def test_a_hint_for_a_videos_frames_serves_every_video() -> None:
    model, features = filled(), noise(1, 32, 6, 6).repeat(6, 1, 1, 1)
    weights = model.weights("up_blocks.1", features, torch.tensor([0.1, 0.5, 0.9]))
    assert torch.equal(weights[:3], weights[3:]) and not torch.allclose(weights[0], weights[1])


def test_a_reading_is_the_level_whose_embedding_the_code_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = filled()
    levels = torch.tensor([0.0, 25 / 51, 1.0])
    monkeypatch.setattr(CAPM, "code", lambda self, level, features: self.embedded(level, levels))
    assert torch.allclose(model.reading("up_blocks.0", noise(3, 48, 4, 4)), levels)


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
    model, features = filled(), noise(2, 32, *size)
    whole, weights = model("up_blocks.1", features), model.weights("up_blocks.1", features)
    assert model.reach == module.WINDOW
    assert (tiled(model, features, weights, model.reach) - whole).abs().max() < 1e-5
    assert (tiled(model, features, weights, model.reach // 2) - whole).abs().max() > 1e-3, "the margin is needed"


def test_a_hint_gives_tiles_the_frames_weights() -> None:
    model, features = filled(), noise(2, 32, 24, 24)
    hint = torch.tensor([0.2, 0.7])
    assert torch.equal(
        model.weights("up_blocks.1", features[..., :9, :7], hint), model.weights("up_blocks.1", features, hint)
    )


def test_the_mean_of_tiles_weights_is_nearly_the_frames() -> None:
    """w is linear in d, a mean over places: only the encoder's borders differ."""
    model, features = filled(), noise(2, 32, 64, 64)
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
    x = noise(1, 1, size, size)
    expected = nn.functional.interpolate(x, (whole, whole), mode="bilinear")
    assert (rows @ x @ rows.mT - expected).abs().max() < 1e-5
    assert torch.equal(module._enlarging(size, whole, 1, whole - 1), rows[1:])


# --- A decoder in tiles ---------------------------------------------------------------------------------------------

LATENT = 4
"""Pixels of a latent of `decoder_of`'s."""


def decoder_of(temporal: bool) -> Any:
    """A VAE of three levels: pictures', or SVD's."""
    from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder

    shape: dict[str, Any] = {"block_out_channels": (32, 32, 32), "layers_per_block": 1, "latent_channels": 4}
    shape["down_block_types"] = ("DownEncoderBlock2D",) * 3
    if temporal:
        vae: Any = AutoencoderKLTemporalDecoder(**shape)
    else:
        vae = AutoencoderKL(**shape, up_block_types=("UpDecoderBlock2D",) * 3)
    randomise(vae, 2)
    return vae.eval()


def half_of(temporal: bool) -> CAPM:
    widths = decoder_widths((32, 32, 32))
    return filled(CAPMShape(SVD_VAE if temporal else SD_VAE, widths, code=8, prompt=6, size=4))


def uneven(*shape: int) -> Tensor:
    """Latents whose tiles look different."""
    slow = nn.functional.interpolate(noise(*shape[:2], 3, 3), shape[-2:], mode="bilinear")
    return slow + 0.3 * noise(*shape, seed=1)


@torch.no_grad()
def one_pass(vae: Any, z: Tensor, model: CAPM, hint: Tensor | None, strength: float = 1.0) -> Tensor:
    """The VAE's own decoder with the CAPM attached; frames of a picture VAE one by one."""
    if hasattr(vae.decoder, "time_conv_out"):
        with attached(model, vae.decoder, hint, strength):
            return vae.decode(z, num_frames=z.shape[0]).sample / 2 + 0.5
    out: list[Tensor] = []
    for index, frame in enumerate(z):
        with attached(model, vae.decoder, None if hint is None else hint[index : index + 1], strength):
            out.append(vae.decode(frame[None]).sample / 2 + 0.5)
    return torch.cat(out)


@pytest.mark.parametrize("hint", [None, torch.tensor([0.2, 0.8]), torch.tensor([0.5, torch.nan])])
@pytest.mark.parametrize("temporal", [False, True])
def test_a_decoder_in_tiles_is_one_pass(temporal: bool, hint: Tensor | None) -> None:
    vae, model, z = decoder_of(temporal), half_of(temporal), uneven(2, 4, 13, 9)
    whole = one_pass(vae, z, model, hint)
    assert (whole - one_pass(vae, z, model, hint, 0)).abs().max() > 0.1, "it acts"
    one = torch.stack(list(stream_decode(vae, z, capm=model, levels=hint)))
    assert (one - whole).abs().max() < 1e-5
    tiles = torch.stack(list(stream_decode(vae, z, capm=model, levels=hint, tile=5)))
    assert (tiles - whole).abs().max() <= 1e-3


def test_a_tile_s_own_code_would_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: it does where each tile takes the weights that it would have alone, or no margin."""
    vae, model, z = decoder_of(False), half_of(False), uneven(1, 4, 13, 9)
    whole = one_pass(vae, z, model, None)

    def off() -> float:
        return float((torch.stack(list(stream_decode(vae, z, capm=model, tile=5))) - whole).abs().max())

    with monkeypatch.context() as patch:
        patch.setattr(Prompts, "_code", lambda self, name, x, place, own: self.model.code(name, x))
        assert off() > 5e-3
    with monkeypatch.context() as patch:
        patch.setattr("vsr_ops.decode_prompts.WINDOW", 1)
        assert off() > 5e-3


def test_levels_go_with_their_frames_through_chunks_and_cuts() -> None:
    vae, model, z = decoder_of(True), half_of(True), uneven(7, 4, 4, 5)
    levels = torch.linspace(0, 1, 7)
    out = torch.stack(list(stream_decode(vae, z, (3,), capm=model, levels=levels, chunk=4)))
    assert (out[:3] - one_pass(vae, z[:3], model, levels[:3])).abs().max() < 1e-5
    assert (out[3:] - one_pass(vae, z[3:], model, levels[3:])).abs().max() < 1e-5


def test_a_fresh_capm_or_strength_zero_leaves_the_picture_as_it_is() -> None:
    vae, model, z = decoder_of(True), half_of(True), uneven(2, 4, 6, 9)
    for tile in (64, 5):
        plain = torch.stack(list(stream_decode(vae, z, tile=tile)))
        assert torch.equal(torch.stack(list(stream_decode(vae, z, tile=tile, capm=model, strength=0))), plain)
        fresh = torch.stack(list(stream_decode(vae, z, tile=tile, capm=CAPM(model.shape), levels=torch.zeros(2))))
        assert torch.equal(fresh, plain)


def test_a_decoder_refuses_another_s_capm_and_levels() -> None:
    vae, model, z = decoder_of(False), half_of(False), uneven(2, 4, 4, 4)
    for given, words in (
        ({"capm": half_of(True)}, "svd-vae, this model is sd-vae"),
        ({"capm": filled(CAPMShape(SD_VAE, {"up_blocks.0": 48}))}, "'up_blocks.0': 48.*'up_blocks.0': 32"),
        ({"capm": model, "levels": torch.zeros(3)}, "3 compression levels, the latent is of 2 frames"),
        ({"capm": model, "levels": torch.tensor([0.5, 1.5])}, "hint"),
        ({"capm": model, "strength": 2.5}, "strength is 2.5"),
    ):
        with pytest.raises(SettingError, match=words) as caught:
            stream_decode(vae, z, **given)
        assert "\n" not in str(caught.value)


# --- Training -------------------------------------------------------------------------------------------------------


def test_gradients_reach_every_parameter_after_one_step() -> None:
    torch.manual_seed(0)
    model = CAPM(SHAPE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hint, target = torch.tensor([0.3, torch.nan]), noise(2, 32, 10, 12, seed=5)
    for _ in range(2):
        optimizer.zero_grad()
        first = model("up_blocks.0", noise(2, 48, 10, 12), hint)[:, :32]
        second = model("up_blocks.1", noise(2, 32, 10, 12), hint)
        ((first - target).square().mean() + (second - target).square().mean()).backward()
        optimizer.step()
    still = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert still == []


RECIPE: dict[str, object] = {
    "task": "capm",
    "train": {"steps": 1},
    "data": {"size": 64, "frames": 2, "clips": 4, "upscaler": "bicubic", "clean_share": 0.3},
}


@pytest.fixture(scope="module")
def task(tiny: SVD, tmp_path_factory: pytest.TempPathFactory) -> CAPMTask:
    """The trainer's task on a tiny SVD and one photograph; its clips are encoded."""
    folder = tmp_path_factory.mktemp("capm")
    unet, vae = tiny.unet.state_dict(), tiny.vae.state_dict()
    weights = SVDWeights(TINY_UNET, TINY_VAE, None, unet, vae, None, (8, 8, 4), {})
    write_svd(folder / "svd.safetensors", weights, "nothing")
    pixels = np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((100, 100), Image.Resampling.BICUBIC).save(folder / "oak.png")
    recipe = to_recipe({**RECIPE, "model": {"start": str(folder / "svd.safetensors"), "code": 8}})
    made = CAPMTask(recipe, folder, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.latents.SHARD", 4)
        made.prepare(torch.device("cpu"))
        yield made  # type: ignore[misc]


def test_the_trainer_s_task_learns_with_a_frozen_unet(task: CAPMTask, tmp_path: Path) -> None:
    samples = [task.sample(generator_at(0, number)) for number in range(3)]
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
    assert bool((batch["hint"].isnan() | (batch["hint"] == batch["level"])).all())
    torch.manual_seed(0)
    model = task.build().train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(task.trains(name))
    unet, capm = parts_of(model)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    optimizer = torch.optim.AdamW(capm.parameters(), 5e-3)
    values: list[float] = []
    for _ in range(8):
        loss, numbers = task.loss(model, batch)
        assert set(numbers) == {"edm", "agree", "rank"}
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(numbers["edm"])
    assert values[-1] < 0.97 * values[0]
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    with torch.no_grad():
        assert task.picture(model.eval(), batch).shape[0] == 3
    task.export(model, tmp_path / "capm.safetensors", "nothing")
    written = load_capms(tmp_path / "capm.safetensors")
    assert written.unet is not None and written.vae is None
    written.unet.check_fits(SVD_UNET, decoder_widths(TINY_UNET["block_out_channels"]))


def test_a_run_that_goes_on_keeps_the_other_half(task: CAPMTask, tmp_path: Path) -> None:
    file, half = tmp_path / "begun.safetensors", filled(VAE_SHAPE)
    write_capms(file, CAPMs(vae=half), "nothing")
    start = {"start": task.shape.start, "capm": str(file), "code": 8}
    on = CAPMTask(to_recipe({**RECIPE, "model": start}), Path(task.shape.start).parent, tmp_path)
    model = on.build()
    on.export(model, tmp_path / "both.safetensors", "nothing")
    both = load_capms(tmp_path / "both.safetensors")
    assert both.vae is not None and both.unet is not None
    kept = half.half().float().state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in both.vae.state_dict().items())


def test_the_level_of_a_clip_is_what_it_went_through(task: CAPMTask) -> None:
    levels = {round(float(task.sample(generator_at(0, number))["level"]) * 51, 3) for number in range(20)}
    drawn = {float(task._latents.crf(generator_at(1000, number)) or 0) for number in range(4)}
    assert levels == drawn and all(crf == 0 or 15 <= crf <= 35 for crf in drawn)


@pytest.mark.parametrize(
    ("table", "values", "said"),
    [
        ("model", {"start": ""}, "model.start is empty"),
        ("model", {"components": 0}, "components=0"),
        ("data", {"finest": 40}, "data.finest is 40"),
        ("data", {"degradation": "sdatc"}, "data.degradation is 'sdatc'"),
    ],
)
def test_a_wrong_recipe_is_refused(table: str, values: dict[str, object], said: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError) as caught:
        CAPMTask(to_recipe({**RECIPE, table: values}), tmp_path, tmp_path)
    assert said in str(caught.value) and "\n" not in str(caught.value)


# --- What is refused ------------------------------------------------------------------------------------------------


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(SettingError, match=r"unknown CAPM level 'up_blocks\.7': this CAPM has up_blocks\.0, up_bl"):
        filled()("up_blocks.7", noise(1, 32, 4, 4))


def test_features_of_another_width_are_refused() -> None:
    with pytest.raises(SettingError, match=r"takes 32 channels, these features have 48.*svd-unet"):
        filled()("up_blocks.1", noise(1, 48, 4, 4))


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
        filled()("up_blocks.1", noise(4, 32, 4, 4), torch.tensor([0.1, 0.2, 0.3]))


# --- Files ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_capms(tmp_path / "capm.safetensors", CAPMs(filled(), filled(VAE_SHAPE)), "nothing")
    return tmp_path / "capm.safetensors"


def test_what_is_written_is_read(path: Path) -> None:
    read, features = load_capms(path), noise(1, 32, 6, 6)
    for half, shape in ((read.unet, SHAPE), (read.vae, VAE_SHAPE)):
        assert half is not None and half.shape == shape and not half.training
        assert not any(parameter.requires_grad for parameter in half.parameters())
        assert torch.equal(half("up_blocks.1", features), filled(shape).half().float()("up_blocks.1", features))


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


def test_another_kind_is_refused(path: Path) -> None:
    write_module(path, "refiner", {}, {"weight": torch.zeros(1)}, "nothing")
    with pytest.raises(CheckpointError, match="kind 'refiner', expected kind 'capm'"):
        load_capms(path)
    write_module(path, KIND, {}, {"weight": torch.zeros(1)}, "nothing")
    with pytest.raises(CheckpointError, match="neither a UNet's nor a VAE's"):
        load_capms(path)


@pytest.mark.parametrize(
    "config",
    [
        {"vae": {"backbone": SVD_UNET, "widths": WIDTHS}},
        {"encoder": {"backbone": SVD_UNET, "widths": WIDTHS}},
        {"unet": {"backbone": SVD_UNET, "widths": 3}},
        {"unet": {"backbone": SVD_UNET, "widths": {"a": "b"}}},
        {"unet": {"backbone": SVD_UNET, "size": 1}},
        {"backbone": SVD_UNET, "widths": WIDTHS},
    ],
)
def test_a_configuration_of_something_else_is_refused(tmp_path: Path, config: dict[str, object]) -> None:
    write_module(tmp_path / "c.safetensors", KIND, config, {"weight": torch.zeros(1)}, "nothing")
    with pytest.raises(CheckpointError, match="no CAPM's") as caught:
        load_capms(tmp_path / "c.safetensors")
    assert "\n" not in str(caught.value)


def test_levels_are_those_of_a_decoder(tiny: SVD) -> None:
    widths = decoder_widths(TINY_UNET["block_out_channels"])
    assert widths == {"up_blocks.0": 64, "up_blocks.1": 64, "up_blocks.2": 32}
    seen: dict[str, int] = {}

    def look(name: str) -> object:
        return lambda block, inputs, output: seen.update({name: output.shape[1]})

    handles = [tiny.unet.get_submodule(name).register_forward_hook(look(name)) for name in widths]  # type: ignore[arg-type]
    with torch.no_grad():
        tiny.denoise(noise(4, 4, 8, 8), 1.0, noise(4, 4, 8, 8), tiny.context(None), 4)
    for handle in handles:
        handle.remove()
    assert seen == widths


def test_a_video_vae_s_decoder_takes_one_too(tiny: SVD) -> None:
    """Its levels, too, are what `decoder_widths` says, and what is attached acts in each of them."""
    widths = decoder_widths(TINY_VAE["block_out_channels"])
    z, hint = noise(2, 4, 6, 6), torch.tensor([0.2, 0.8])
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
            model("up_blocks.1", noise(1, 32, side, side))
        counts.append(counter.get_total_flops())
    assert all(later < 4.1 * earlier for earlier, later in pairwise(counts))
