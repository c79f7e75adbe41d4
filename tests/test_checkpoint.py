"""Reading and writing SVD weights: round trips on real tiny models, and every refusal."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from vsr_ops.checkpoint import SVDWeights, match_host_epsilon, read_svd, write_svd
from vsr_ops.errors import CheckpointError
from vsr_ops.keymap import CLIP, UNET, VAE

UNET_CONFIG: dict[str, Any] = {
    "block_out_channels": (32, 64, 64, 64),
    "layers_per_block": 1,
    "num_attention_heads": (2, 4, 4, 4),
    "cross_attention_dim": 16,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24,
}
VAE_CONFIG: dict[str, Any] = {
    "block_out_channels": (32, 64, 64, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "layers_per_block": 1,
    "scaling_factor": 0.3,
}
CLIP_CONFIG: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 28,
    "projection_dim": 16,
    "hidden_act": "gelu",
}


def randomised(model: nn.Module) -> nn.Module:
    """Every weight away from its usual start, so that no two tensors of a shape agree."""
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def image_encoder(config: dict[str, Any]) -> nn.Module:
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**config)).eval()


def make(unet: dict[str, Any], vae: dict[str, Any], tile: tuple[int, int, int] = (16, 24, 6)) -> SVDWeights:
    torch.manual_seed(0)
    return SVDWeights(
        unet_config=unet,
        vae_config=vae,
        image_encoder_config=CLIP_CONFIG,
        unet=randomised(UNetSpatioTemporalConditionModel(**unet)).state_dict(),
        vae=randomised(AutoencoderKLTemporalDecoder(**vae)).state_dict(),
        image_encoder=randomised(image_encoder(CLIP_CONFIG)).state_dict(),
        tile=tile,
        metadata={"vsr.note": "kept", "modelspec.title": "of another file"},
    )


@pytest.fixture(scope="module")
def weights() -> SVDWeights:
    return make(UNET_CONFIG, VAE_CONFIG)


@pytest.fixture(scope="module")
def stock() -> SVDWeights:
    """Small, but by stock SVD's conventions, so that its configuration can be read off the shapes."""
    return make(
        {"block_out_channels": (64, 64), "layers_per_block": 1, "num_attention_heads": (1, 1)}
        | {"down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal")}
        | {"up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal")}
        | {
            "cross_attention_dim": 16,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24,
        },
        {
            "block_out_channels": (32, 32),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "layers_per_block": 2,
        },
    )


@pytest.fixture(scope="module")
def lite_file(weights: SVDWeights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lite") / "lite.safetensors"
    write_svd(path, weights, "test noise", torch.float32)
    return path


@pytest.fixture(scope="module")
def stock_tensors(stock: SVDWeights, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What an original file without our metadata holds."""
    path = tmp_path_factory.mktemp("stock") / "stock.safetensors"
    write_svd(path, stock, "test noise", torch.float32)
    return load_file(path)


@pytest.fixture(scope="module")
def folder(stock: SVDWeights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder as diffusers and transformers save it."""
    path = tmp_path_factory.mktemp("diffusers")
    for name, model, state in (
        ("unet", UNetSpatioTemporalConditionModel(**stock.unet_config), stock.unet),
        ("vae", AutoencoderKLTemporalDecoder(**stock.vae_config), stock.vae),
        ("image_encoder", image_encoder(CLIP_CONFIG), stock.image_encoder),
    ):
        model.load_state_dict(state)
        model.save_pretrained(path / name)
    return path


def outputs(weights: SVDWeights) -> list[Tensor]:
    """Denoised, decoded and encoded tensors of fixed inputs, and an image embedding."""
    unet = UNetSpatioTemporalConditionModel(**weights.unet_config).eval()
    vae = AutoencoderKLTemporalDecoder(**weights.vae_config).eval()
    clip = image_encoder(weights.image_encoder_config or {})
    unet.load_state_dict(weights.unet)
    vae.load_state_dict(weights.vae)
    clip.load_state_dict(weights.image_encoder or {})
    random = torch.Generator().manual_seed(1)
    x, context = torch.randn(1, 3, 8, 8, 8, generator=random), torch.randn(1, 1, 16, generator=random)
    picture = torch.randn(1, 3, 28, 28, generator=random)
    with torch.no_grad():
        return [
            unet(x, torch.tensor(0.5), context, torch.tensor([[7.0, 127.0, 0.02]])).sample,
            vae.decode(x[0, :, :4], num_frames=3).sample,
            clip(picture).image_embeds,
            vae.encode(picture[..., :16, :16]).latent_dist.parameters,
        ]


def same(a: dict[str, Tensor] | None, b: dict[str, Tensor] | None) -> bool:
    return a is not None and b is not None and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def refusal(path: Path, dtype: torch.dtype = torch.float32) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_svd(path, dtype)
    message = str(caught.value)
    assert "\n" not in message
    return message


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


# --- refusals -----------------------------------------------------------------------------------------------


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


def edited(lite_file: Path, path: Path, edit: Callable[[dict[str, Tensor], dict[str, str]], None]) -> Path:
    tensors = load_file(lite_file)
    with safe_open(lite_file, "pt") as file:
        metadata = file.metadata()
    edit(tensors, metadata)
    save_file(tensors, path, metadata=metadata)
    return path


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
