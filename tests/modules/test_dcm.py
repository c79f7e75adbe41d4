"""The upscale model before the diffusion: what spandrel sees in our file, tiles, sizes, files that are refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.refusals import refused
from tests.support.tensors import rand, relative
from vsr_ops.image.resize import resize
from vsr_ops.image.upscale import upscale_frames
from vsr_ops.modules import dcm
from vsr_ops.modules.dcm import LITE_DCM, load_dcm, read_dcm
from vsr_ops.modules.refiner import LITE_REFINER
from vsr_ops.sampling.tiling import TileSize, blend_weight, cut_tile, plan_tiles

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def lite() -> Any:
    return read_dcm("lite")


def swinir(seed: int = 0, **settings: Any) -> Any:
    """A small SwinIR of the published definition, with random weights."""
    from spandrel.architectures.SwinIR import SwinIR  # type: ignore[import-untyped]

    torch.manual_seed(seed)
    shape = {"depths": [2], "num_heads": [2], "embed_dim": 12, "window_size": 8, "img_size": 64, "mlp_ratio": 2}
    return SwinIR(**{**shape, "upsampler": "pixelshuffle", "upscale": 2, **settings}).eval()


def saved(path: Path, module: Any) -> Path:
    save_file({key: value.contiguous() for key, value in module.state_dict().items()}, path)
    return path


@pytest.fixture
def near(tmp_path: Path) -> Path:
    """A SwinIR without its transformer blocks: what is left reaches a few pixels only."""
    module = swinir(upscale=4, upsampler="pixelshuffledirect")
    for name, weight in module.named_parameters():
        if name.startswith("conv_after_body"):
            torch.nn.init.zeros_(weight)
    return saved(tmp_path / "near.safetensors", module)


# --- What it is -----------------------------------------------------------------------------------------------------


def test_spandrel_knows_the_bundled_file(lite: Any) -> None:
    assert lite.architecture.name == "RealESRGAN Compact" and lite.scale == 4
    assert (lite.input_channels, lite.output_channels) == (3, 3)
    assert {parameter.dtype for parameter in lite.model.parameters()} == {torch.float32}
    assert not lite.model.training


def test_a_file_of_the_published_definition_gives_what_its_module_gives(tmp_path: Path) -> None:
    module = swinir()
    frames = rand(2, 3, 16, 24)
    with torch.no_grad():
        expected = module(frames).clamp(0, 1)
    out = load_dcm(saved(tmp_path / "x2.safetensors", module), CPU)(frames)
    assert out.shape == (2, 3, 32, 48) and out.std() > 0.01
    assert (out - expected).abs().max() < 1e-5


def test_diffbirs_swinir_cleans_what_is_enlarged(tmp_path: Path) -> None:
    """Its SwinIRs unshuffle by 8 what they enlarge by 8, with that in front of the first convolution."""
    module = swinir(start_unshuffle=8, upscale=8, upsampler="nearest+conv", img_range=1.0)
    state = {re.sub(r"^conv_first\.", "conv_first.1.", key): value for key, value in module.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "swinir.ckpt")
    frames = rand(1, 3, 16, 16)
    with torch.no_grad():
        expected = module(resize("bicubic", frames, (64, 64)).clamp(0, 1)).clamp(0, 1)
    found = upscale_frames(frames, (64, 64), upscale_fn=load_dcm(tmp_path / "swinir.ckpt", CPU))
    assert relative(found, expected) < 1e-5


# --- Tiles and sizes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 33), (16, 16), (23, 18)])
def test_one_tile_is_the_model_itself(lite: Any, height: int, width: int) -> None:
    frames = rand(2, 3, height, width)
    with torch.no_grad():
        whole = lite(frames)
    assert torch.equal(load_dcm("lite", CPU)(frames), whole)


@pytest.mark.parametrize(("height", "width"), [(16, 41), (25, 17)])
def test_tiles_give_four_times_the_size_within_the_range_of_a_picture(
    monkeypatch: pytest.MonkeyPatch, height: int, width: int
) -> None:
    monkeypatch.setattr(dcm, "TILE", 16)
    # Black and white: an upscaler overshoots there.
    out = load_dcm("lite", CPU)(rand(1, 3, height, width).round())
    assert out.shape == (1, 3, 4 * height, 4 * width) and out.dtype == torch.float32
    assert float(out.min()) >= 0 and float(out.max()) <= 1


def test_tiles_are_blended_by_their_weights(lite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcm, "TILE", 16)
    frames = rand(1, 3, 24, 16)
    plan = plan_tiles(1, 24, 16, TileSize(16, 16, 1), dcm.OVERLAP, factor=1)
    large = plan.magnified(4)
    assert len(plan.spatial) == 2
    total, weights = torch.zeros(1, 3, 96, 64, dtype=torch.float64), torch.zeros(1, 1, 96, 64, dtype=torch.float64)
    with torch.no_grad():
        for m in range(2):
            weight = blend_weight(large, 0, m).double()
            cut_tile(large, 0, m, total).add_(lite(cut_tile(plan, 0, m, frames)).double() * weight)
            cut_tile(large, 0, m, weights).add_(weight)
    assert (load_dcm("lite", CPU)(frames) - total / weights).abs().max() < 1e-6


def test_a_model_that_reaches_little_is_the_untiled_one_inside_tiles(
    near: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SwinIR itself sees far, and tiles of it differ a little: this is the law for what a tile does hold."""
    frames = rand(1, 3, 20, 56)
    whole = load_dcm(near, CPU)(frames)
    monkeypatch.setattr(dcm, "TILE", 32)
    tiled = load_dcm(near, CPU)(frames)
    # Tiles are columns 0 to 32 and 24 to 56, and a tile's border is felt 6 pixels deep.
    difference = (tiled - whole).abs().amax((0, 1, 2))
    assert difference[: 4 * 24].max() < 1e-5 and difference[4 * 32 :].max() < 1e-5
    assert 0 < difference[4 * 24 : 4 * 32].max() < 0.5
    assert whole.std() > 0.01


def test_what_is_outside_a_tile_does_not_matter_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcm, "TILE", 16)
    upscale_fn = load_dcm("lite", CPU)
    frames = rand(1, 3, 16, 28)
    changed = frames.clone()
    changed[..., 16:] = 1 - changed[..., 16:]
    a, b = upscale_fn(frames), upscale_fn(changed)
    assert torch.equal(a[..., : 4 * 12], b[..., : 4 * 12]) and not torch.equal(a[..., 4 * 16 :], b[..., 4 * 16 :])


def test_frames_do_not_touch_each_other_and_keep_their_dtype() -> None:
    upscale_fn = load_dcm("lite", CPU)
    frames = rand(3, 3, 16, 16)
    one_by_one = torch.cat([upscale_fn(frame[None]) for frame in frames])
    assert (upscale_fn(frames) - one_by_one).abs().max() < 1e-5
    half = upscale_fn(frames[:1].half())
    assert half.dtype == torch.float16 and (half.float() - one_by_one[:1]).abs().max() < 5e-3


# --- Files that are refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("under", [None, "params", "params_ema", "state_dict"])
def test_a_pickled_swinir_is_the_same_as_a_safe_one(tmp_path: Path, under: str | None) -> None:
    module = swinir(upscale=4)
    state = module.state_dict()
    torch.save(state if under is None else {under: state, "step": 7}, tmp_path / "swinir.pth")
    frames = rand(1, 3, 16, 24)
    safe = load_dcm(saved(tmp_path / "swinir.safetensors", module), CPU)
    assert torch.equal(load_dcm(tmp_path / "swinir.pth", CPU)(frames), safe(frames))


class Trap:
    """Runs when it is unpickled as pickle does."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_in_a_pickle_runs(tmp_path: Path) -> None:
    torch.save({"params": swinir().state_dict(), "trap": Trap(tmp_path / "ran")}, tmp_path / "bad.pth")
    refused(read_dcm, tmp_path / "bad.pth", "not a pickle of tensors alone")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "bad.pth", weights_only=False)
    assert (tmp_path / "ran").exists()


def test_a_pickle_under_another_name_is_refused(tmp_path: Path) -> None:
    torch.save(swinir().state_dict(), tmp_path / "renamed.safetensors")
    refused(read_dcm, tmp_path / "renamed.safetensors", "a pickle")


def test_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    refused(read_dcm, tmp_path / "nowhere.safetensors", "no such file", "lite")
    (tmp_path / "short.safetensors").write_bytes(LITE_DCM.read_bytes()[:10_000])
    refused(read_dcm, tmp_path / "short.safetensors", "truncated or damaged")


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file({"lora.up": torch.zeros(3, 3)}, tmp_path / "lora.safetensors")
    refused(read_dcm, tmp_path / "lora.safetensors", "not an upscale model", "SwinIR")
    refused(read_dcm, LITE_REFINER, "not an upscale model")
    refused(read_dcm, saved(tmp_path / "grey.safetensors", swinir(in_chans=1)), "takes 1 channels", "colour model")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("layers.0.residual_group.blocks.0.attn.qkv.weight", None, "Missing key"),
        ("conv_after_body.bias", torch.zeros(3), "size mismatch"),
        ("stranger", torch.zeros(3), "Unexpected key"),
        ("conv_first.bias", torch.full((12,), torch.nan), "NaN"),
        ("conv_first.bias", torch.zeros(12, dtype=torch.int8), "quantised"),
    ],
)
def test_a_changed_swinir_is_refused(tmp_path: Path, key: str, value: Tensor | None, words: str) -> None:
    state = load_file(saved(tmp_path / "whole.safetensors", swinir()))
    state.pop(key, None)
    save_file(state if value is None else {**state, key: value}, tmp_path / "changed.safetensors")
    refused(read_dcm, tmp_path / "changed.safetensors", words)
