"""Every refusal of files and folders that are no SVD weights, each in one line that says what they are."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.svd_files import UNET_CONFIG, VAE_CONFIG, edited, make, refusal
from vsr_ops.checkpoints.keymap import CLIP, UNET, VAE
from vsr_ops.checkpoints.svd import read_svd, write_svd


@pytest.fixture(scope="module")
def lite_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lite") / "lite.safetensors"
    write_svd(path, make(UNET_CONFIG, VAE_CONFIG), "test noise", torch.float32)
    return path


# --- files -----------------------------------------------------------------------------------------------


def test_missing_path_is_refused(tmp_path: Path) -> None:
    assert "no such file or folder" in refusal(tmp_path / "svd.safetensors")


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin", ".CKPT"])
def test_pickle_suffix_is_refused_whatever_it_holds(suffix: str, lite_file: Path, tmp_path: Path) -> None:
    path = tmp_path / f"svd{suffix}"
    shutil.copy(lite_file, path)
    assert "a pickle, which can run code" in refusal(path)


def test_pickle_content_is_refused_whatever_its_name(tmp_path: Path) -> None:
    path = tmp_path / "svd.safetensors"
    for protocol in (2, 3, 4, 5):
        path.write_bytes(pickle.dumps({"state_dict": list(range(100))}, protocol=protocol))
        assert "a pickle, which can run code" in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"x")
    assert "a pickle, which can run code" in refusal(path)
    torch.save({"a": torch.zeros(2)}, path)
    assert "a pickle, which can run code" in refusal(path)


def test_header_length_that_looks_like_a_pickle_is_read(tmp_path: Path) -> None:
    path = tmp_path / "svd.safetensors"
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(0x280)
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert "looks like no known model, its 1 tensors begin with x" in refusal(path)


def test_truncated_file_is_refused(lite_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "svd.safetensors"
    content = lite_file.read_bytes()
    for length in (0, 5, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        message = refusal(path)
        assert "truncated or damaged" in message and f"{length} bytes" in message


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a git-lfs pointer"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (b"GGUF\x03\x00\x00\x00\x00\x00\x00\x00\x00\x00", "a GGUF file"),
    ],
)
def test_other_content_is_named(content: bytes, what: str, tmp_path: Path) -> None:
    (tmp_path / "svd.safetensors").write_bytes(content)
    assert what in refusal(tmp_path / "svd.safetensors")


SD_UNET = UNET + "input_blocks.0.0.weight"


@pytest.mark.parametrize(
    ("names", "what"),
    [
        ([SD_UNET, "cond_stage_model.transformer.text_model.x"], "Stable Diffusion 1.x"),
        ([SD_UNET, "cond_stage_model.model.transformer.x"], "Stable Diffusion 2.x"),
        ([SD_UNET, "conditioner.embedders.1.model.ln_final.bias"], "an SDXL checkpoint"),
        ([SD_UNET], "without SVD's temporal layers"),
        (["lora_unet_down_blocks_0.lora_up.weight"], "a LoRA"),
        (["unet.mid_block.attentions.0.to_q.lora_A.weight"], "a LoRA"),
        (["control_model.input_blocks.0.0.weight"], "a ControlNet"),
        (
            ["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"],
            "a ControlNet",
        ),
        (["down_blocks.0.resnets.0.spatial_res_block.conv1.weight"], "one file of a diffusers folder"),
        (["encoder.conv_in.weight"], "a VAE alone"),
        (["layers.0.weight"], "no known model, its 1 tensors begin with layers.0.weight"),
        ([], "no known model, its 0 tensors"),
    ],
)
def test_other_models_are_named(names: list[str], what: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({name: torch.zeros(1) for name in names}, path)
    message = refusal(path)
    assert what in message and "expected Stable Video Diffusion" in message


@pytest.mark.parametrize(
    ("lost", "what"),
    [
        ("", "no VAE"),
        ("encoder.", "a VAE without its encoder"),
        ("decoder.conv_out.time_mix_conv.", "decoder is not temporal"),
    ],
)
def test_svd_without_a_whole_vae_is_refused(
    lost: str, what: str, stock_tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    save_file({k: t for k, t in stock_tensors.items() if not k.startswith(VAE + lost)}, path)
    assert what in refusal(path)


def test_missing_unexpected_and_misshapen_tensors_are_named_and_counted(lite_file: Path, tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
        for key in [k for k in tensors if k.startswith(UNET + "middle_block.1.")]:
            del tensors[key]
        tensors[UNET + "stranger.weight"] = torch.zeros(1)
        tensors[UNET + "out.2.bias"] = torch.zeros(5)

    message = refusal(edited(lite_file, tmp_path / "x.safetensors", edit))
    assert "57 missing (model.diffusion_model.middle_block.1.norm.bias, " in message and ", ...)" in message
    assert "1 unexpected (model.diffusion_model.stranger.weight)" in message
    assert "1 of the wrong shape (model.diffusion_model.out.2.bias (5,) for (4,))" in message


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("key", [UNET + "out.0.bias", VAE + "encoder.norm_out.weight", CLIP + "ln_pre.bias"])
def test_values_that_are_not_finite_are_refused(value: float, key: str, lite_file: Path, tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
        tensors[key][3] = value

    message = refusal(edited(lite_file, tmp_path / "x.safetensors", edit))
    assert f"{key} holds 1 values of NaN or infinity" in message


def test_values_too_large_for_the_dtype_are_refused(lite_file: Path, tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
        tensors[UNET + "out.0.bias"][3] = 1e6

    path = edited(lite_file, tmp_path / "x.safetensors", edit)
    assert "out.0.bias holds values too large for torch.float16" in refusal(path, torch.float16)
    assert read_svd(path).unet["conv_norm_out.bias"][3] == 1e6


def test_quantised_tensors_are_refused(lite_file: Path, tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
        tensors[UNET + "out.0.bias"] = tensors[UNET + "out.0.bias"].to(torch.int8)

    assert "torch.int8, expected floating point" in refusal(edited(lite_file, tmp_path / "x.safetensors", edit))


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("vsr.kind", "dcm", "kind 'dcm', expected kind 'svd'"),
        ("vsr.version", "2", "vsr.version '2', expected '1'; update this pack"),
        ("vsr.config", "{", "expected a JSON object with 'unet' and 'vae'"),
        ("vsr.config", '{"unet": {}}', "expected a JSON object with 'unet' and 'vae'"),
        ("vsr.config", '{"unet": {}, "vae": {}, "tile": [16, 0, 4]}', "tile [16, 0, 4], expected"),
        ("vsr.config", '{"unet": {"widths": 3}, "vae": {}}', "its unet configuration does not build"),
    ],
)
def test_metadata_that_cannot_be_used_is_refused(
    key: str, value: str, what: str, lite_file: Path, tmp_path: Path
) -> None:
    def edit(_: dict[str, Tensor], metadata: dict[str, str]) -> None:
        metadata[key] = value

    assert what in refusal(edited(lite_file, tmp_path / "x.safetensors", edit))


def test_original_whose_heads_cannot_be_known_is_refused(lite_file: Path, tmp_path: Path) -> None:
    save_file(load_file(lite_file), tmp_path / "x.safetensors")
    assert "attention is 32 wide, expected a multiple of 64-channel heads" in refusal(tmp_path / "x.safetensors")


def test_working_middle_block_at_one_layer_is_refused(lite_file: Path, tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
        tensors[VAE + "decoder.mid.block_2.conv2.bias"] += 1

    message = refusal(edited(lite_file, tmp_path / "x.safetensors", edit))
    assert "decoder.mid.block_2.conv2.bias is not zero" in message


# --- diffusers folders --------------------------------------------------------------------------------------


def test_folder_of_another_class_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "x")
    file = tmp_path / "x/unet/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "_class_name": "UNet2DConditionModel"}))
    message = refusal(tmp_path / "x")
    assert "'UNet2DConditionModel', expected a 'UNetSpatioTemporalConditionModel'" in message


def test_folder_with_only_a_pickle_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "x")
    (tmp_path / "x/vae/diffusion_pytorch_model.safetensors").rename(tmp_path / "x/vae/diffusion_pytorch_model.bin")
    assert "diffusion_pytorch_model.bin: a pickle" in refusal(tmp_path / "x")
    (tmp_path / "x/vae/diffusion_pytorch_model.bin").unlink()
    assert "no weights, expected diffusion_pytorch_model.safetensors" in refusal(tmp_path / "x")


def test_folder_without_models_or_with_broken_json_is_refused(folder: Path, tmp_path: Path) -> None:
    assert "config.json: no such file" in refusal(tmp_path)
    shutil.copytree(folder, tmp_path / "x")
    (tmp_path / "x/unet/config.json").write_text("{")
    assert "not a JSON object" in refusal(tmp_path / "x")


def test_folder_whose_index_leaves_it_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "x")
    (tmp_path / "x/unet/diffusion_pytorch_model.safetensors").unlink()
    index = {"weight_map": {"conv_in.weight": "../vae/diffusion_pytorch_model.safetensors"}}
    (tmp_path / "x/unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert "no usable weight_map" in refusal(tmp_path / "x")
