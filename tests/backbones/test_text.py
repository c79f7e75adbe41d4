"""What a text becomes: transformers' own encoder and OpenCLIP's published definition, in every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
from safetensors.torch import save_file
from torch import Tensor

from tests.support.tensors import relative
from tests.support.text_files import (
    CLIP,
    MODEL,
    OPEN_CLIP,
    TOKENS,
    WIDTH,
    named,
    open_clip,
    open_clip_tensors,
    save_folder,
    save_tokenizer,
    text_encoder,
)
from vsr_ops.backbones.text import encode_texts, tokens_of
from vsr_ops.checkpoints.keymap import expand
from vsr_ops.checkpoints.text_encoder import TEXT_PART, TextEncoderWeights, read_text_encoder
from vsr_ops.checkpoints.text_file import Texts
from vsr_ops.errors import CheckpointError, SettingError

CPU = torch.device("cpu")
#: The empty text: its two ends, then OpenCLIP's zeros or CLIP's ends.
EMPTY_2 = [49406, 49407] + [0] * 75
EMPTY_1 = [49406, 49407] + [49407] * 75


def read(path: Path) -> TextEncoderWeights:
    found = read_text_encoder(path)
    assert found is not None
    return found


def encoded(path: Path, prompt: str = "", negative: str = "") -> Texts:
    return encode_texts(read(path), prompt, negative, CPU)


def by_transformers(model: Any, tokens: list[int]) -> Tensor:
    return model(torch.tensor([tokens])).last_hidden_state


# --- Layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "tokens"), [(OPEN_CLIP, EMPTY_2), (CLIP, EMPTY_1)], ids=["2.x", "1.x"])
@pytest.mark.parametrize("prefix", [MODEL, ""], ids=["published", "newer"])
@pytest.mark.parametrize("given", ["", "text_encoder", "text_encoder/model.safetensors"])
def test_a_folder_is_transformers_own(
    config: dict[str, Any], tokens: list[int], prefix: str, given: str, tmp_path: Path
) -> None:
    model = text_encoder(config)
    found = encoded(save_folder(tmp_path, model, prefix) / given)
    assert found.prompt.shape == (1, 77, WIDTH) and found.prompt.dtype == torch.float32
    assert relative(found.prompt, by_transformers(model, tokens)) < 1e-5
    assert torch.equal(found.prompt, found.negative)


def test_a_single_file_of_2_is_open_clips_last_layer_but_one(tmp_path: Path) -> None:
    model = open_clip()
    expected = model(torch.tensor([EMPTY_2]))
    for number, prefix in enumerate(("cond_stage_model.model.", "conditioner.embedders.0.model.")):
        save_file(open_clip_tensors(model, prefix), tmp_path / f"{number}.safetensors")
        assert relative(encoded(tmp_path / f"{number}.safetensors").prompt, expected) < 1e-5
    torch.save({"state_dict": open_clip_tensors(model)}, tmp_path / "2.ckpt")
    assert relative(encoded(tmp_path / "2.ckpt").prompt, expected) < 1e-5


def test_a_single_file_of_2_is_what_diffusers_converts(tmp_path: Path) -> None:
    stored = open_clip_tensors(open_clip())
    save_file(stored, tmp_path / "sd.safetensors")
    ours, shell = read(tmp_path / "sd.safetensors"), text_encoder()
    theirs = convert_open_clip_checkpoint(shell, dict(stored))
    theirs = {key.removeprefix(MODEL): value for key, value in theirs.items()}
    assert len(ours.tensors) == 2 + 2 * 16 + 2
    assert all(torch.equal(value, theirs[key]) for key, value in ours.tensors.items())


@pytest.mark.parametrize("prefix", [MODEL, ""], ids=["usual", "old"])
def test_a_single_file_of_1(prefix: str, tmp_path: Path) -> None:
    model = text_encoder(CLIP)
    stored = {f"cond_stage_model.transformer.{prefix}{key}": value for key, value in named(model).items()}
    stored[f"cond_stage_model.transformer.{prefix}embeddings.position_ids"] = torch.arange(77.0)[None]
    save_file(stored, tmp_path / "sd.safetensors")
    assert relative(encoded(tmp_path / "sd.safetensors").prompt, by_transformers(model, EMPTY_1)) < 1e-5


@pytest.mark.parametrize("layers", [23, 24])
def test_an_encoder_alone_is_told_by_its_width(layers: int, tmp_path: Path) -> None:
    """ViT-H/14 as ComfyUI keeps it, with its last layer or without: 23 are used, with the exact GELU, and pad 0."""
    config = OPEN_CLIP | {"hidden_size": 1024, "intermediate_size": 8, "num_hidden_layers": layers}
    config |= {"num_attention_heads": 16}
    with torch.device("meta"):
        from transformers import CLIPTextConfig, CLIPTextModel

        names = named(CLIPTextModel(CLIPTextConfig(**config)))
    # Halves of zeros: what is asked of is the configuration.
    save_file({MODEL + key: torch.zeros(v.shape).half() for key, v in names.items()}, tmp_path / "h.safetensors")
    found = read(tmp_path / "h.safetensors")
    expected = {"hidden_size": 1024, "num_hidden_layers": 23, "num_attention_heads": 16, "hidden_act": "gelu"}
    assert expected.items() <= found.config.items() and tokens_of(found, "") == EMPTY_2


def test_the_maps_of_full_size() -> None:
    """ViT-H/14's 23 layers that are used, key by key."""
    config = OPEN_CLIP | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23}
    config |= {"num_attention_heads": 16}
    state, names = TEXT_PART.plan(Path("full"), config)
    assert {new for name in names.values() for new in expand(name)} == {key.removeprefix(MODEL) for key in state}
    assert sum(value.numel() for value in state.values()) == 340_387_840


def test_where_there_is_none(tmp_path: Path) -> None:
    save_file({"model.diffusion_model.out.2.weight": torch.zeros(1)}, tmp_path / "unet.safetensors")
    (tmp_path / "unet").mkdir()
    assert read_text_encoder(tmp_path / "unet.safetensors") is None and read_text_encoder(tmp_path / "unet") is None


# --- Texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", ["!", "<|endoftext|>"])
def test_words_are_the_folders_own_tokenizers(pad: str, tmp_path: Path) -> None:
    model = text_encoder()
    tokenizer = save_tokenizer(save_folder(tmp_path, model) / "tokenizer", pad)
    found = encoded(tmp_path, "ab a b", "b")
    for text, ours in (("ab a b", found.prompt), ("b", found.negative), ("", encoded(tmp_path).prompt)):
        tokens = tokenizer(text, padding="max_length", max_length=77).input_ids
        assert tokens_of(read(tmp_path), text) == tokens
        assert relative(ours, by_transformers(model, tokens)) < 1e-5
    assert tokens_of(read(tmp_path), "")[2] == {"!": 0}.get(pad, 49407)
    assert relative(found.negative, found.prompt) > 1e-2


def test_a_single_file_takes_the_tokenizer_beside_it(tmp_path: Path) -> None:
    save_file(open_clip_tensors(open_clip()), tmp_path / "sd.safetensors")
    with pytest.raises(SettingError, match="'ab' needs a tokenizer, and the text encoder has none beside it"):
        encoded(tmp_path / "sd.safetensors", "ab")
    save_tokenizer(tmp_path / "tokenizer", "!")
    assert tokens_of(read(tmp_path / "sd.safetensors"), "ab")[:4] == [49406, 5, 49407, 0]


def test_a_text_is_never_cut(tmp_path: Path) -> None:
    save_tokenizer(save_folder(tmp_path, text_encoder()) / "tokenizer", "!")
    assert tokens_of(read(tmp_path), "a " * 75)[-1] == 49407
    with pytest.raises(SettingError, match="has 78 tokens with its two ends, expected 77 at most"):
        tokens_of(read(tmp_path), "a " * 76)


# --- Refusals ---------------------------------------------------------------------------------------------------------


def test_other_encoders_are_refused(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "f", text_encoder())
    config = json.loads((folder / "text_encoder/config.json").read_text())
    (folder / "text_encoder/config.json").write_text(json.dumps(config | {"architectures": ["T5EncoderModel"]}))
    with pytest.raises(CheckpointError, match="a 'T5EncoderModel', expected a 'CLIPTextModel'"):
        read(folder)
    (folder / "text_encoder/config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(CheckpointError, match=r"text_encoder tensors 16 missing \(encoder.layers.3"):
        read(folder)
    stored = open_clip_tensors(open_clip())
    del stored["cond_stage_model.model.ln_final.bias"]
    save_file(stored, tmp_path / "less.safetensors")
    with pytest.raises(CheckpointError, match=r"text_encoder tensors 1 missing \(cond_stage_model.model.ln_final.bias"):
        read(tmp_path / "less.safetensors")
    small = {"cond_stage_model.model.token_embedding.weight": torch.zeros(100, WIDTH)}
    save_file(open_clip_tensors(open_clip()) | small, tmp_path / "small.safetensors")
    with pytest.raises(CheckpointError, match="knows 100 tokens, expected CLIP's 49408"):
        read(tmp_path / "small.safetensors")
    odd = {"cond_stage_model.model.token_embedding.weight": torch.zeros(TOKENS, 40)}
    save_file(open_clip_tensors(open_clip()) | odd, tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match=r"is not CLIP's \(2 layers used, 40 wide"):
        read(tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match="no such file or folder"):
        read(tmp_path / "none.safetensors")


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    save_tokenizer(save_folder(tmp_path, text_encoder()) / "tokenizer", "!")
    (tmp_path / "tokenizer/vocab.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a tokenizer of CLIP"):
        tokens_of(read(tmp_path), "")
