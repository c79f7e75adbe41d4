"""Every refusal of what is no UNet of SVD in diffusers' layout, or does not fit the SVD beside it, in one line."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from tests.support.svd_files import UNET_CONFIG, VAE_CONFIG, make, make_stock, save_folder, stock_file
from tests.support.unet_files import STEM, changed, refused_unet, retensored, save_unet, unet_of
from vsr_ops.checkpoints.svd import SVDWeights, read_svd, write_svd


@pytest.fixture(scope="module")
def tuned() -> SVDWeights:
    return make(UNET_CONFIG, VAE_CONFIG)


@pytest.fixture
def folder(tuned: SVDWeights, tmp_path: Path) -> Path:
    return save_unet(tmp_path, tuned)


@pytest.fixture(scope="module")
def svd(tuned: SVDWeights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("svd") / "svd.safetensors"
    write_svd(path, tuned, "test noise", torch.float32)
    return path


# --- Another model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [4, 9, 12])
def test_other_input_channels(channels: int, tuned: SVDWeights, tmp_path: Path) -> None:
    other = make({**UNET_CONFIG, "in_channels": channels}, VAE_CONFIG)
    message = refused_unet(save_unet(tmp_path, other))
    assert f"takes {channels} channels and gives 4, expected 8 (noisy and LR latent) and 4" in message
    # In a file without a configuration the tensors say so.
    bare = tmp_path / "bare.safetensors"
    stock = make_stock()
    wide: Any = unet_of(stock).state_dict()
    save_file({**wide, "conv_in.weight": torch.zeros(64, channels, 3, 3)}, bare)
    assert f"takes {channels} channels" in refused_unet(bare)


def test_an_image_unet(tmp_path: Path) -> None:
    kinds = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    model: Any = UNet2DConditionModel(
        in_channels=8, block_out_channels=(32,), layers_per_block=1, cross_attention_dim=16, **kinds
    )
    model.save_pretrained(tmp_path / "unet")
    words = "'UNet2DConditionModel', expected a 'UNetSpatioTemporalConditionModel'"
    assert words in refused_unet(tmp_path / "unet")
    assert "'UNet2DConditionModel' in unet, expected" in refused_unet(tmp_path)
    changed(tmp_path / "unet", _class_name="UNetSpatioTemporalConditionModel")
    assert "looks like an image UNet (UNet2DConditionModel), expected an SVD's" in refused_unet(tmp_path / "unet")
    (tmp_path / "unet/config.json").unlink()
    file = tmp_path / "unet" / f"{STEM}.safetensors"
    assert "looks like an image UNet (UNet2DConditionModel), expected an SVD's" in refused_unet(file)


def test_an_svd_under_original_names(tuned: SVDWeights, tmp_path: Path) -> None:
    stock_file(tmp_path / "svd.safetensors", tuned)
    assert "a whole checkpoint under original names" in refused_unet(tmp_path / "svd.safetensors")


def test_a_lora_and_an_unknown_model(tmp_path: Path) -> None:
    for name, words in (("unet.x.lora_A.weight", "a LoRA"), ("layers.0.weight", "begin with layers.0.weight")):
        save_file({name: torch.zeros(1)}, tmp_path / "x.safetensors")
        assert words in refused_unet(tmp_path / "x.safetensors")


# --- Files ----------------------------------------------------------------------------------------------------------


def test_nothing_there(tmp_path: Path) -> None:
    assert "no such file or folder" in refused_unet(tmp_path / "unet_ema")
    assert "no config.json, expected config.json of a 'UNetSpatioTemporalConditionModel'" in refused_unet(tmp_path)


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / f"{STEM}.safetensors").unlink()
    assert f"no weights, expected {STEM}.safetensors" in refused_unet(folder)


def test_no_configuration(folder: Path) -> None:
    """A folder's weights alone; a file whose heads are not 64 wide cannot be read off either."""
    (folder / "config.json").unlink()
    assert "no config.json, expected" in refused_unet(folder)
    message = refused_unet(folder / f"{STEM}.safetensors")
    assert "no config.json beside it, and none to be read off its tensors (attention is 32 wide" in message


def test_two_unets_in_one_folder(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "unet")
    assert "holds 2 UNets (unet, unet_ema), expected one; give the one to use" in refused_unet(tmp_path)


def test_pickles(folder: Path, tuned: SVDWeights) -> None:
    file = folder / f"{STEM}.safetensors"
    file.write_bytes(pickle.dumps({"state_dict": 1}))
    assert "a pickle, which can run code, expected safetensors" in refused_unet(folder)
    file.unlink()
    torch.save(tuned.unet, folder / f"{STEM}.bin")
    for given in (folder, folder / f"{STEM}.bin"):
        assert f"{STEM}.bin: a pickle, which can run code, expected safetensors" in refused_unet(given)


def test_shards(tuned: SVDWeights, tmp_path: Path) -> None:
    folder = save_unet(tmp_path, tuned, max_shard_size="300KB")
    first = min(folder.glob("*-00001-of-*"))
    assert "one shard of several, expected all of them; give their folder" in refused_unet(first)
    count = len(list(folder.glob("*-of-*")))
    first.unlink()
    for given in (folder, folder / f"{STEM}.safetensors.index.json"):
        message = refused_unet(given)
        assert f"1 of its {count} files missing ({first.name}), expected all that the index names" in message
    (folder / f"{STEM}.safetensors.index.json").write_text('{"weight_map": {"x": "../x.safetensors"}}')
    assert "no usable weight_map, expected file names" in refused_unet(folder)
    assert "expected the index of shards" in refused_unet(folder / "config.json")


def test_a_damaged_file_and_a_damaged_configuration(folder: Path) -> None:
    file = folder / f"{STEM}.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    assert "truncated or damaged" in refused_unet(folder)
    file.write_bytes(content)
    (folder / "config.json").write_text("{")
    assert "not a JSON object, expected the configuration of a model" in refused_unet(folder)


# --- Tensors and configuration --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite(value: float, folder: Path, svd: Path) -> None:
    retensored(folder, **{"conv_out.bias": torch.tensor([0.0, value, 0.0, 0.0])})
    assert "conv_out.bias holds 1 values of NaN or infinity, expected finite numbers" in refused_unet(folder, svd)


def test_other_precisions(folder: Path, svd: Path) -> None:
    for dtype in (torch.int8, torch.float8_e4m3fn, torch.float64):
        retensored(folder, **{"conv_out.bias": torch.zeros(4).to(dtype)})
        assert f"conv_out.bias is {dtype}, expected torch.float32" in refused_unet(folder, svd)
    retensored(folder, **{"conv_out.bias": torch.zeros(4, dtype=torch.bfloat16)})
    assert not read_svd(svd, unet=folder).unet["conv_out.bias"].any()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"cross_attention_dim": 24}, "tensors"),
        ({"layers_per_block": 2}, "missing (down_blocks.0."),
        ({"block_out_channels": [32, 64, 64, 96]}, "of the wrong shape"),
        ({"num_attention_heads": [2, 4, 4, 5]}, "of the wrong shape"),
        ({"in_channels": 9}, "takes 9 channels"),
        ({"down_block_types": ["DownBlock2D"] * 4}, "configuration does not build a UNetSpatioTemporalConditionModel"),
        ({"block_out_channels": "wide"}, "configuration does not build a UNetSpatioTemporalConditionModel"),
        ({"strange": 1}, "unexpected keyword argument 'strange'"),
    ],
)
def test_a_configuration_that_disagrees_with_the_tensors(values: dict[str, Any], words: str, folder: Path) -> None:
    changed(folder, **values)
    assert words in refused_unet(folder)


# --- Beside an SVD --------------------------------------------------------------------------------------------------


def test_an_svd_of_other_widths(folder: Path, svd: Path, tmp_path: Path) -> None:
    other = make({**UNET_CONFIG, "cross_attention_dim": 24}, VAE_CONFIG)
    message = refused_unet(save_unet(tmp_path / "other", other), svd)
    assert f"a UNet of cross-attention 24, {svd} has cross-attention 16, expected equal ones" in message
    wide = make({**UNET_CONFIG, "block_out_channels": (32, 64, 64, 128)}, VAE_CONFIG)
    message = refused_unet(save_unet(tmp_path / "wide", wide), svd)
    assert f"widths 32-64-64-128, {svd} has widths 32-64-64-64, expected equal" in message
    assert "looks like a LoRA" in _refused_svd(tmp_path, folder)


def _refused_svd(tmp_path: Path, folder: Path) -> str:
    save_file({"x.lora_A.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    return refused_unet(folder, tmp_path / "lora.safetensors")


def test_an_image_encoder_of_another_width(tuned: SVDWeights, tmp_path: Path) -> None:
    """Its own UNet is not there to compare with."""
    save_folder(tmp_path / "svd", tuned)
    shutil.rmtree(tmp_path / "svd/unet")
    other = make({**UNET_CONFIG, "cross_attention_dim": 24}, VAE_CONFIG)
    message = refused_unet(save_unet(tmp_path, other), tmp_path / "svd")
    assert "a UNet of cross-attention 24, " in message and "has an image encoder that gives 16, expected" in message


def test_a_svd_that_lacks_its_vae(folder: Path, svd: Path, tmp_path: Path) -> None:
    kept = {k: t for k, t in load_file(svd).items() if not k.startswith("first_stage_model.")}
    save_file(kept, tmp_path / "x.safetensors")
    assert "holds no VAE" in refused_unet(folder, tmp_path / "x.safetensors")
