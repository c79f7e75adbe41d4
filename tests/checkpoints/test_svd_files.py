"""Reading and writing SVD weights: round trips on real tiny models, original files, diffusers folders."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.support.svd_files import (
    CLIP_CONFIG,
    UNET_CONFIG,
    VAE_CONFIG,
    make,
    outputs,
    refusal,
    same,
)
from vsr_ops.checkpoints.keymap import CLIP, UNET, VAE
from vsr_ops.checkpoints.svd import SVDWeights, match_host_epsilon, read_svd, write_svd
from vsr_ops.errors import CheckpointError


@pytest.fixture(scope="module")
def weights() -> SVDWeights:
    return make(UNET_CONFIG, VAE_CONFIG)


@pytest.fixture(scope="module")
def lite_file(weights: SVDWeights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lite") / "lite.safetensors"
    write_svd(path, weights, "test noise", torch.float32)
    return path


# --- round trips --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2])
def test_written_weights_give_the_same_outputs(layers: int, tmp_path: Path) -> None:
    before = make(UNET_CONFIG, {**VAE_CONFIG, "layers_per_block": layers})
    write_svd(tmp_path / "x.safetensors", before, "test noise", torch.float32)
    after = read_svd(tmp_path / "x.safetensors")
    expected, found = outputs(before), outputs(after)
    assert all(torch.equal(a, b) for a, b in zip(expected[:3], found[:3], strict=True))
    torch.testing.assert_close(found[3], expected[3], rtol=1e-6, atol=1e-6)
    assert not torch.equal(after.vae["encoder.conv_out.weight"], before.vae["encoder.conv_out.weight"])
    assert after.unet_config == UNET_CONFIG
    assert after.vae_config["scaling_factor"] == 0.3
    assert after.image_encoder_config == CLIP_CONFIG
    assert after.tile == (16, 24, 6)


def test_second_round_trip_is_bit_for_bit(lite_file: Path, tmp_path: Path) -> None:
    once = read_svd(lite_file)
    write_svd(tmp_path / "again.safetensors", once, "test noise", torch.float32)
    twice = read_svd(tmp_path / "again.safetensors")
    assert same(once.unet, twice.unet) and same(once.vae, twice.vae)
    assert same(once.image_encoder, twice.image_encoder)
    assert once.metadata == twice.metadata


def test_metadata_says_what_the_file_is(lite_file: Path) -> None:
    with safe_open(lite_file, "pt") as file:
        metadata = file.metadata()
    assert metadata["vsr.kind"] == "svd"
    assert metadata["vsr.trained_on"] == "test noise"
    assert metadata["vsr.note"] == "kept"
    assert "modelspec.title" not in metadata
    config = json.loads(metadata["vsr.config"])
    assert config["tile"] == [16, 24, 6]
    assert config["unet"]["block_out_channels"] == [32, 64, 64, 64]
    assert read_svd(lite_file).metadata == metadata


def test_file_has_the_tensors_that_the_original_code_asks_for(lite_file: Path) -> None:
    keys = load_file(lite_file).keys()
    assert all(key.startswith((UNET, VAE, CLIP)) for key in keys)
    assert not any("quant_conv" in key for key in keys)
    # At one layer per block too, where diffusers has no second block in the decoder's middle.
    assert VAE + "decoder.mid.block_2.time_stack.out_layers.3.weight" in keys


def test_half_precision_on_disk_and_in_memory(weights: SVDWeights, tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    write_svd(path, weights, "test noise")
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    full, half = read_svd(path), read_svd(path, torch.float16)
    assert {t.dtype for t in full.unet.values()} == {torch.float32}
    assert {t.dtype for t in (*half.unet.values(), *half.vae.values())} == {torch.float16}
    assert torch.equal(full.unet["conv_in.weight"], weights.unet["conv_in.weight"].half().float())


def test_weights_without_image_encoder(weights: SVDWeights, tmp_path: Path) -> None:
    bare = replace(weights, image_encoder=None, image_encoder_config=None)
    write_svd(tmp_path / "bare.safetensors", bare, "test noise")
    found = read_svd(tmp_path / "bare.safetensors")
    assert found.image_encoder is None and found.image_encoder_config is None


# --- original files -----------------------------------------------------------------------------------------


def test_original_file_needs_no_metadata(stock: SVDWeights, stock_tensors: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "svd.safetensors"
    extra = {
        "conditioner.embedders.3.encoder.encoder.conv_in.weight": torch.full((2, 2), torch.nan),
        "conditioner.embedders.0.open_clip.model.logit_scale": torch.zeros(()),
        "denoiser.sigmas": torch.zeros(1000),
    }
    save_file({**stock_tensors, **extra}, path)
    found = read_svd(path)
    assert same(found.unet, stock.unet) and same(found.image_encoder, stock.image_encoder)
    assert found.tile == (64, 64, 14)
    assert found.vae_config["scaling_factor"] == 0.18215
    assert torch.equal(found.vae["quant_conv.weight"][:, :, 0, 0], torch.eye(8))
    assert not found.vae["quant_conv.bias"].any()
    for a, b in zip(outputs(found), outputs(stock), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_original_file_with_a_quant_conv_of_its_own(
    stock: SVDWeights, stock_tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    unfolded = {VAE + f"encoder.conv_out.{p}": stock.vae[f"encoder.conv_out.{p}"] for p in ("weight", "bias")} | {
        VAE + f"quant_conv.{p}": stock.vae[f"quant_conv.{p}"] for p in ("weight", "bias")
    }
    save_file({**stock_tensors, **unfolded}, tmp_path / "svd.safetensors")
    assert same(read_svd(tmp_path / "svd.safetensors").vae, stock.vae)


def test_image_encoder_under_transformers_names(
    stock: SVDWeights, stock_tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    tensors = {key: tensor for key, tensor in stock_tensors.items() if not key.startswith(CLIP)}
    tensors |= {CLIP + key: tensor for key, tensor in (stock.image_encoder or {}).items()}
    save_file(
        {**tensors, CLIP + "vision_model.embeddings.position_ids": torch.arange(5)},
        tmp_path / "x.safetensors",
    )
    found = read_svd(tmp_path / "x.safetensors")
    assert same(found.image_encoder, stock.image_encoder)
    assert (found.image_encoder_config or {}).items() >= CLIP_CONFIG.items()


def test_attention_stored_as_matrices_is_accepted(
    stock: SVDWeights, stock_tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    flat = {k: t.flatten(1) for k, t in stock_tensors.items() if ".attn_1." in k and t.ndim == 4}
    assert len(flat) == 8
    save_file({**stock_tensors, **flat}, tmp_path / "x.safetensors")
    found = read_svd(tmp_path / "x.safetensors").vae
    key = "decoder.mid_block.attentions.0.to_q.weight"
    assert torch.equal(found[key], stock.vae[key])


# --- diffusers folders --------------------------------------------------------------------------------------


def test_diffusers_folder(folder: Path, stock: SVDWeights) -> None:
    found = read_svd(folder)
    assert same(found.unet, stock.unet) and same(found.vae, stock.vae)
    assert same(found.image_encoder, stock.image_encoder)
    for a, b in zip(outputs(found), outputs(stock), strict=True):
        assert torch.equal(a, b)
    assert found.tile == (64, 64, 14)


def test_diffusers_folder_without_image_encoder(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "x", ignore=shutil.ignore_patterns("image_encoder"))
    assert read_svd(tmp_path / "x").image_encoder is None


def test_diffusers_folder_of_half_precision_shards(folder: Path, stock: SVDWeights, tmp_path: Path) -> None:
    path = tmp_path / "x"
    shutil.copytree(folder, path)
    (path / "vae/diffusion_pytorch_model.safetensors").rename(path / "vae/diffusion_pytorch_model.fp16.safetensors")
    file = path / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    shards = {f"diffusion_pytorch_model.fp16-0000{i + 1}-of-00002.safetensors": list(tensors)[i::2] for i in (0, 1)}
    for name, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, path / "unet" / name)
    index = {"weight_map": {key: name for name, keys in shards.items() for key in keys}}
    (path / "unet/diffusion_pytorch_model.safetensors.index.fp16.json").write_text(json.dumps(index))
    found = read_svd(path)
    assert same(found.unet, stock.unet) and same(found.vae, stock.vae)
    (path / "unet" / min(shards)).unlink()
    assert "cannot be opened" in refusal(path)


# --- writing ------------------------------------------------------------------------------------------------


def test_failed_writing_leaves_nothing_behind(weights: SVDWeights, tmp_path: Path) -> None:
    too_large = {**weights.unet, "conv_in.bias": weights.unet["conv_in.bias"] + 1e6}
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"older")
    with pytest.raises(CheckpointError, match=r"input_blocks\.0\.0\.bias holds values too large for torch.float16"):
        write_svd(path, replace(weights, unet=too_large), "test noise")
    (tmp_path / "y.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"y\.safetensors: cannot be written"):
        write_svd(tmp_path / "y.safetensors", weights, "test noise")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_svd(tmp_path / "nowhere" / "x.safetensors", weights, "test noise")
    assert path.read_bytes() == b"older"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.safetensors", "y.safetensors"]


def test_writing_replaces_an_older_file(weights: SVDWeights, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"older")
    write_svd(path, weights, "test noise")
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    assert read_svd(path).tile == (16, 24, 6)


def test_weights_that_do_not_fit_are_not_written(weights: SVDWeights, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    lacking = {k: t for k, t in weights.vae.items() if k != "quant_conv.bias"}
    for wrong, what in (
        (replace(weights, vae=lacking), r"vae tensors 1 missing \(quant_conv.bias\)"),
        (replace(weights, image_encoder=None), "only one of configuration and weights"),
        (replace(weights, tile=(16, 16, 0)), r"tile \[16, 16, 0\], expected"),
        (replace(weights, unet_config={**UNET_CONFIG, "layers_per_block": 2}), "unet tensors"),
    ):
        with pytest.raises(CheckpointError, match=what):
            write_svd(path, wrong, "test noise")
    with pytest.raises(CheckpointError, match=r"suffix '.pt', expected '.safetensors'"):
        write_svd(tmp_path / "x.pt", weights, "test noise")
    assert not list(tmp_path.iterdir())


# --- the norm epsilon ---------------------------------------------------------------------------------------


def test_host_epsilon_is_set_in_the_72_norms_of_the_full_unet() -> None:
    with torch.device("meta"):
        unet = UNetSpatioTemporalConditionModel()
    before = {n: m.eps for n, m in unet.named_modules() if isinstance(m, nn.GroupNorm)}
    assert match_host_epsilon(unet) == 72
    assert match_host_epsilon(unet) == 0
    after = {n: m.eps for n, m in unet.named_modules() if isinstance(m, nn.GroupNorm)}
    # The original's residual blocks and output have 1e-5; its 16 transformers normalise with 1e-6.
    assert {n: eps for n, eps in after.items() if eps == 1e-6}.keys() == {
        n for n in before if n.endswith("attentions.0.norm") or ".attentions." in n
    }
    assert sorted(after.values()) == [1e-6] * 16 + [1e-5] * 89
