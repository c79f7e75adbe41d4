"""Laws and outside facts of the name maps between the original SVD file and diffusers."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from vsr_ops.checkpoints import keymap, svd_parts
from vsr_ops.checkpoints.keymap import CLIP, UNET, VAE

CROSS, PLAIN = "CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"
FULL_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
}
FULL_CLIP: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 224,
    "projection_dim": 1024,
    "hidden_act": "gelu",
}


QUANT_CONV = frozenset({"quant_conv.weight", "quant_conv.bias"})


def meta_unet(**kwargs: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    with torch.device("meta"):
        model = UNetSpatioTemporalConditionModel(**kwargs)
    return model.state_dict(), keymap.unet_map(model.config)


def meta_vae(**kwargs: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    with torch.device("meta"):
        model = AutoencoderKLTemporalDecoder(**kwargs)
    return model.state_dict(), keymap.vae_map(model.config)


def meta_clip(**kwargs: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    with torch.device("meta"):
        model = CLIPVisionModelWithProjection(CLIPVisionConfig(**kwargs))
    return model.state_dict(), keymap.clip_map(kwargs)


@pytest.fixture(scope="module")
def full() -> dict[str, tuple[dict[str, Tensor], dict[str, str]]]:
    """The full-size models: state dict without memory, and map."""
    return {"unet": meta_unet(), "vae": meta_vae(**FULL_VAE), "clip": meta_clip(**FULL_CLIP)}


@pytest.fixture(scope="module")
def shapes(full: dict[str, tuple[dict[str, Tensor], dict[str, str]]]) -> dict[str, tuple[int, ...]]:
    """Original names and shapes of the three full-size models."""
    return {
        old: tuple(keymap.to_original(old, new, state).shape)
        for state, names in full.values()
        for old, new in names.items()
    }


def assert_bijection(state: dict[str, Tensor], names: dict[str, str], left_out: frozenset[str] = frozenset()) -> None:
    targets = [name for entry in names.values() for name in keymap.expand(entry)]
    assert len(targets) == len(set(targets))
    assert set(targets) == set(state) - left_out


def test_full_size_maps_are_bijections(full: Any) -> None:
    assert_bijection(*full["unet"])
    assert_bijection(*full["vae"], QUANT_CONV)
    assert_bijection(*full["clip"])


@pytest.mark.parametrize(
    "kwargs",
    [
        {"block_out_channels": (32, 64, 64, 64), "layers_per_block": 1, "num_attention_heads": 2},
        {"block_out_channels": (64, 32, 96, 32), "layers_per_block": (1, 2, 3, 1), "num_attention_heads": 4},
        {
            "block_out_channels": (32, 64),
            "down_block_types": (PLAIN, CROSS),
            "up_block_types": (CROSS.replace("Down", "Up"), PLAIN.replace("Down", "Up")),
            "transformer_layers_per_block": (1, 3),
            "num_attention_heads": (2, 4),
        },
    ],
)
def test_unet_maps_of_other_sizes_are_bijections(kwargs: dict[str, Any]) -> None:
    assert_bijection(*meta_unet(**kwargs))


@pytest.mark.parametrize(("widths", "layers"), [((32, 64, 64, 64), 1), ((64, 32, 96), 2), ((32,), 2), ((32, 32), 3)])
def test_vae_maps_of_other_sizes_are_bijections(widths: tuple[int, ...], layers: int) -> None:
    kinds = ("DownEncoderBlock2D",) * len(widths)
    state, names = meta_vae(block_out_channels=widths, layers_per_block=layers, down_block_types=kinds)
    assert_bijection(state, names, QUANT_CONV)


# Read off Stability AI's svd.yaml and model code.
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (UNET + "input_blocks.0.0.weight", (320, 8, 3, 3)),
        (UNET + "time_embed.0.weight", (1280, 320)),
        (UNET + "label_emb.0.0.weight", (1280, 768)),
        (UNET + "label_emb.0.2.weight", (1280, 1280)),
        (UNET + "input_blocks.1.0.time_stack.in_layers.2.weight", (320, 320, 3, 1, 1)),
        (UNET + "input_blocks.1.0.time_stack.emb_layers.1.weight", (320, 1280)),
        (UNET + "input_blocks.1.0.time_mixer.mix_factor", (1,)),
        (UNET + "input_blocks.1.1.time_pos_embed.0.weight", (1280, 320)),
        (UNET + "input_blocks.1.1.time_pos_embed.2.weight", (320, 1280)),
        (UNET + "input_blocks.1.1.proj_in.weight", (320, 320)),
        (UNET + "input_blocks.1.1.time_stack.0.ff_in.net.0.proj.weight", (2560, 320)),
        (UNET + "input_blocks.3.0.op.weight", (320, 320, 3, 3)),
        (UNET + "input_blocks.4.0.skip_connection.weight", (640, 320, 1, 1)),
        (UNET + "input_blocks.4.1.time_stack.0.attn2.to_k.weight", (640, 1024)),
        (UNET + "input_blocks.11.0.out_layers.3.weight", (1280, 1280, 3, 3)),
        (UNET + "middle_block.1.time_stack.0.norm_in.weight", (1280,)),
        (UNET + "output_blocks.2.1.conv.weight", (1280, 1280, 3, 3)),
        (UNET + "output_blocks.5.0.in_layers.2.weight", (1280, 1920, 3, 3)),
        (UNET + "output_blocks.8.2.conv.weight", (640, 640, 3, 3)),
        (UNET + "output_blocks.9.0.in_layers.0.weight", (960,)),
        (UNET + "out.2.weight", (4, 320, 3, 3)),
        (VAE + "encoder.conv_out.weight", (8, 512, 3, 3)),
        (VAE + "encoder.down.1.block.0.nin_shortcut.weight", (256, 128, 1, 1)),
        (VAE + "encoder.mid.attn_1.q.weight", (512, 512, 1, 1)),
        (VAE + "decoder.conv_in.weight", (512, 4, 3, 3)),
        (VAE + "decoder.mid.block_1.time_stack.in_layers.2.weight", (512, 512, 3, 1, 1)),
        (VAE + "decoder.mid.block_2.mix_factor", (1,)),
        (VAE + "decoder.up.0.block.0.nin_shortcut.weight", (128, 256, 1, 1)),
        (VAE + "decoder.up.3.upsample.conv.weight", (512, 512, 3, 3)),
        (VAE + "decoder.conv_out.time_mix_conv.weight", (3, 3, 3, 1, 1)),
        (CLIP + "class_embedding", (1280,)),
        (CLIP + "positional_embedding", (257, 1280)),
        (CLIP + "conv1.weight", (1280, 3, 14, 14)),
        (CLIP + "proj", (1280, 1024)),
        (CLIP + "transformer.resblocks.31.attn.in_proj_weight", (3840, 1280)),
        (CLIP + "transformer.resblocks.0.mlp.c_fc.weight", (5120, 1280)),
    ],
)
def test_known_shapes_of_the_published_file(
    name: str, shape: tuple[int, ...], shapes: dict[str, tuple[int, ...]]
) -> None:
    assert shapes[name] == shape


def test_every_name_and_shape_of_the_published_file(shapes: dict[str, tuple[int, ...]]) -> None:
    """DiffSynth-Studio knows svd_xt.safetensors by an MD5 over its names and shapes: ours give the same.

    Added to ours are the tensors that are knowingly ignored: the second VAE, which is a plain image VAE, and
    what is left of the text encoder.
    """
    assert [sum(k.startswith(p) for k in shapes) for p in (UNET, VAE, CLIP)] == [1428, 372, 392]
    second, text = "conditioner.embedders.3.encoder.", "conditioner.embedders.0.open_clip.model."
    temporal = (".time_stack.", ".mix_factor", ".time_mix_conv.")
    ignored = {
        second + k[len(VAE) :]: shape
        for k, shape in shapes.items()
        if k.startswith(VAE) and not any(word in k for word in temporal)
    }
    for name, channels in (("quant_conv", 8), ("post_quant_conv", 4)):
        ignored[f"{second}{name}.weight"] = (channels, channels, 1, 1)
        ignored[f"{second}{name}.bias"] = (channels,)
    ignored |= {text + f"ln_final.{p}": (1024,) for p in ("weight", "bias")}
    ignored |= {text + "logit_scale": (), text + "positional_embedding": (77, 1024)}
    ignored |= {text + "text_projection": (1024, 1024), text + "token_embedding.weight": (49408, 1024)}
    published = shapes | ignored
    assert len(published) == 2446
    entries = [f"{k}:{'_'.join(map(str, shape))}" for k, shape in published.items()] + list(published)
    assert hashlib.md5(",".join(sorted(entries)).encode()).hexdigest() == "2a07abce74b4bdc696b76254ab474da6"


# Names of equal shape that a wrong map could swap unseen.
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("time_embed.2.bias", "time_embedding.linear_2.bias"),
        ("label_emb.0.0.weight", "add_embedding.linear_1.weight"),
        ("input_blocks.2.0.in_layers.0.weight", "down_blocks.0.resnets.1.spatial_res_block.norm1.weight"),
        ("input_blocks.2.0.out_layers.3.bias", "down_blocks.0.resnets.1.spatial_res_block.conv2.bias"),
        (
            "input_blocks.10.0.time_stack.out_layers.0.bias",
            "down_blocks.3.resnets.0.temporal_res_block.norm2.bias",
        ),
        ("input_blocks.8.1.time_mixer.mix_factor", "down_blocks.2.attentions.1.time_mixer.mix_factor"),
        (
            "input_blocks.7.1.transformer_blocks.0.attn1.to_k.weight",
            "down_blocks.2.attentions.0.transformer_blocks.0.attn1.to_k.weight",
        ),
        (
            "output_blocks.4.1.time_stack.0.attn1.to_q.weight",
            "up_blocks.1.attentions.1.temporal_transformer_blocks.0.attn1.to_q.weight",
        ),
        (
            "output_blocks.11.1.time_stack.0.norm3.bias",
            "up_blocks.3.attentions.2.temporal_transformer_blocks.0.norm3.bias",
        ),
        ("middle_block.0.skip_connection.weight", None),
        ("middle_block.2.in_layers.2.weight", "mid_block.resnets.1.spatial_res_block.conv1.weight"),
        ("output_blocks.2.1.conv.bias", "up_blocks.0.upsamplers.0.conv.bias"),
        ("output_blocks.5.2.conv.bias", "up_blocks.1.upsamplers.0.conv.bias"),
        ("out.0.weight", "conv_norm_out.weight"),
    ],
)
def test_known_unet_pairs(old: str, new: str | None, full: Any) -> None:
    assert full["unet"][1].get(UNET + old) == new


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("encoder.down.2.block.1.norm2.weight", "encoder.down_blocks.2.resnets.1.norm2.weight"),
        ("encoder.down.0.downsample.conv.bias", "encoder.down_blocks.0.downsamplers.0.conv.bias"),
        ("encoder.mid.block_2.conv1.weight", "encoder.mid_block.resnets.1.conv1.weight"),
        ("encoder.mid.attn_1.k.bias", "encoder.mid_block.attentions.0.to_k.bias"),
        ("decoder.mid.attn_1.proj_out.weight", "decoder.mid_block.attentions.0.to_out.0.weight"),
        (
            "decoder.up.3.block.2.time_stack.in_layers.0.bias",
            "decoder.up_blocks.0.resnets.2.temporal_res_block.norm1.bias",
        ),
        ("decoder.up.1.block.0.mix_factor", "decoder.up_blocks.2.resnets.0.time_mixer.mix_factor"),
        ("decoder.up.1.upsample.conv.weight", "decoder.up_blocks.2.upsamplers.0.conv.weight"),
        ("decoder.conv_out.time_mix_conv.bias", "decoder.time_conv_out.bias"),
        ("quant_conv.weight", None),
    ],
)
def test_known_vae_pairs(old: str, new: str | None, full: Any) -> None:
    assert full["vae"][1].get(VAE + old) == new


def test_maps_are_those_that_gave_equal_outputs(full: Any) -> None:
    """The maps under which ComfyUI 0.3.64 and diffusers agreed to 6e-15 in float64 on random weights."""
    lines = sorted(f"{old}={new}" for _, names in full.values() for old, new in names.items())
    assert hashlib.md5("\n".join(lines).encode()).hexdigest() == "a50a514eda35a7750af835352b6ffff5"


def test_published_configuration_is_inferred_from_shapes(shapes: dict[str, tuple[int, ...]]) -> None:
    config = svd_parts.infer_unet(shapes)
    assert config["block_out_channels"] == (320, 640, 1280, 1280)
    assert config["num_attention_heads"] == (5, 10, 20, 20)
    assert config["down_block_types"] == (CROSS, CROSS, CROSS, PLAIN)
    assert (config["layers_per_block"], config["transformer_layers_per_block"]) == (2, 1)
    assert (config["in_channels"], config["out_channels"], config["cross_attention_dim"]) == (8, 4, 1024)
    assert (config["addition_time_embed_dim"], config["projection_class_embeddings_input_dim"]) == (256, 768)
    vae = svd_parts.infer_vae(shapes)
    assert {k: vae[k] for k in FULL_VAE} == FULL_VAE
    assert (vae["in_channels"], vae["out_channels"], vae["latent_channels"]) == (3, 3, 4)
    clip = svd_parts.infer_clip(shapes)
    assert {k: clip[k] for k in FULL_CLIP} == FULL_CLIP


@pytest.mark.parametrize(
    "kwargs",
    [
        {"block_out_channels": (64, 128), "layers_per_block": (1, 2), "num_attention_heads": (1, 2)},
        {
            "block_out_channels": (64, 64, 192),
            "down_block_types": (PLAIN, CROSS, PLAIN),
            "transformer_layers_per_block": (1, 2, 1),
            "num_attention_heads": (1, 1, 3),
            "cross_attention_dim": 32,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24,
        },
    ],
)
def test_inferred_configuration_builds_the_same_model(kwargs: dict[str, Any]) -> None:
    down = kwargs.get("down_block_types", (CROSS,) * len(kwargs["block_out_channels"]))
    up = tuple(kind.replace("Down", "Up") for kind in reversed(down))
    state, names = meta_unet(**{**kwargs, "down_block_types": down, "up_block_types": up})
    shapes = {old: tuple(keymap.to_original(old, new, state).shape) for old, new in names.items()}
    again, _ = meta_unet(**svd_parts.infer_unet(shapes))
    assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in state.items()}


def test_widths_without_whole_heads_cannot_be_inferred(shapes: dict[str, tuple[int, ...]]) -> None:
    narrow = {**shapes, UNET + "input_blocks.2.0.out_layers.3.weight": (96, 320, 3, 3)}
    with pytest.raises(ValueError, match=r"96 wide.*64-channel"):
        svd_parts.infer_unet(narrow)


def test_conversion_there_and_back_is_the_identity() -> None:
    config = {
        **FULL_CLIP,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "projection_dim": 8,
    }
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**config))
    vae = AutoencoderKLTemporalDecoder(block_out_channels=(32,), layers_per_block=2)
    for state, names in (
        (model.state_dict(), keymap.clip_map(config)),
        (vae.state_dict(), keymap.vae_map(vae.config)),
    ):
        back: dict[str, Tensor] = {}
        for old, new in names.items():
            back |= keymap.to_diffusers(new, keymap.to_original(old, new, state))
        assert all(torch.equal(tensor, state[key]) for key, tensor in back.items())
        assert set(state) - set(back) <= QUANT_CONV


def test_folded_quant_conv_gives_the_same_moments() -> None:
    torch.manual_seed(0)
    conv, quant = nn.Conv2d(6, 8, 3, padding=1).double(), nn.Conv2d(8, 8, 1).double()
    weights = {f"encoder.conv_out.{k}": v for k, v in conv.state_dict().items()}
    weights |= {f"quant_conv.{k}": v for k, v in quant.state_dict().items()}
    folded = keymap.fold_quant_conv(weights)
    picture = torch.randn(1, 6, 5, 7, dtype=torch.float64)
    weight, bias = folded["encoder.conv_out.weight"], folded["encoder.conv_out.bias"]
    torch.testing.assert_close(
        nn.functional.conv2d(picture, weight, bias, padding=1), quant(conv(picture)), rtol=0, atol=1e-14
    )
    assert set(folded) == {"encoder.conv_out.weight", "encoder.conv_out.bias"}


def test_folding_an_identity_keeps_the_bits() -> None:
    weights = {"encoder.conv_out.weight": torch.randn(8, 6, 3, 3), "encoder.conv_out.bias": torch.randn(8)}
    folded = keymap.fold_quant_conv({**weights, **keymap.identity_quant_conv(8, torch.float32)})
    assert all(folded[key] is weights[key] for key in weights)


def test_unknown_block_type_is_named() -> None:
    with pytest.raises(ValueError, match="'DownBlock2D', expected one of CrossAttnDownBlockSpatioTemporal"):
        keymap.has_attention("DownBlock2D")
