"""Stable Diffusion's text encoder on disk: CLIP's text transformer, in each layout that it is published in.

- a diffusers folder, or its `text_encoder` alone, or the weights' file in that: transformers' names and configuration;
- a single file of 1.x: transformers' names below `cond_stage_model.transformer.`;
- a single file of 2.x: OpenCLIP's names below `cond_stage_model.model.`, with one layer more than is used;
- a text encoder alone without a configuration, as ComfyUI keeps it in models/text_encoders: transformers' names.

1.x takes the last layer of OpenAI's ViT-L/14 and pads texts with their end; 2.x the last but one of OpenCLIP's ViT-H/14
and pads with token 0 (OpenCLIP's own zeros, diffusers' "!", ComfyUI's 0). The final normalisation follows in both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from . import keymap
from .diffusers_folder import config_kwargs, folder_config, read_named, weight_files
from .keymap import Names, below, pairs
from .ldm_unet import count
from .safefile import Shapes, Source, open_safely, open_weights, refuse_differences
from .svd_parts import Part

#: Tokens that CLIP's texts begin and end with.
START, END = 49406, 49407
#: Channels of a head: 12 heads of ViT-L/14, 16 of ViT-H/14.
HEAD_WIDTH = 64
#: Width of ViT-H/14, by which a text encoder alone is told, and how many of its 24 layers are used.
OPEN_WIDTH, OPEN_LAYERS = 1024, 23
FOLDER, TOKENIZER = "text_encoder", "tokenizer"

_ADVICE = "give Stable Diffusion 1.5 or 2.1 with its text encoder, or the folder text_encoder of its diffusers layout"
#: What transformers' names begin with in files; newer ones of its own leave it out.
_MODEL = "text_model."
_FIRST, _POSITIONS = "embeddings.token_embedding.weight", "position_ids"


@dataclass(frozen=True)
class TextEncoderWeights:
    """A text encoder as plain data: keyword arguments of transformers' CLIPTextConfig, its CLIPTextModel's tensors by
    their names after any `text_model.`, the token that fills a text up, and the folder of its tokenizer, where there
    is one."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    pad: int
    tokenizer: Path | None

    def build(self) -> Any:
        """transformers' CLIPTextModel with these weights."""
        from transformers import CLIPTextConfig, CLIPTextModel

        with torch.device("meta"):
            model: nn.Module = CLIPTextModel(CLIPTextConfig(**self.config))
        names = {key.removeprefix(_MODEL): key for key in model.state_dict()}
        model.load_state_dict({names[key]: value for key, value in self.tensors.items()}, assign=True)
        for module in model.modules():
            # The positions' numbers are no weights, and have no values on meta.
            if isinstance(numbers := getattr(module, _POSITIONS, None), Tensor):
                module.register_buffer(_POSITIONS, torch.arange(numbers.shape[-1])[None], persistent=False)
        return model.eval().requires_grad_(False)


def read_text_encoder(path: Path) -> TextEncoderWeights | None:
    """The text encoder at `path`, float32 on the CPU; None where a checkpoint or folder has none.

    Raises CheckpointError for a path that is missing or unsafe, or an encoder that is damaged or not CLIP's.
    """
    if path.is_dir():
        return _of_folder(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file or folder; {_ADVICE}")
    if (path.parent / "config.json").is_file() and path.parent.name == FOLDER:
        return _of_folder(path.parent)
    with open_weights(path) as source:
        return _of_file(source, _beside(path.parent))


def _beside(folder: Path) -> Path | None:
    """The tokenizer's folder in `folder`: published single files lie beside one."""
    return folder / TOKENIZER if (folder / TOKENIZER).is_dir() else None


def _of_folder(path: Path) -> TextEncoderWeights | None:
    folder, above = (path / FOLDER, path) if (path / FOLDER).is_dir() else (path, path.parent)
    if folder == path and not (path / "config.json").is_file():
        return None
    config = folder_config(folder, TEXT_PART, _ADVICE)
    with contextlib.ExitStack() as stack:
        sources = [stack.enter_context(open_safely(file)) for file in weight_files(folder, TEXT_PART.stem)]
        prefix = _MODEL if any(key.startswith(_MODEL) for source in sources for key in source.shapes) else ""
        tensors = read_named(sources, TEXT_PART, _state(folder, config), torch.float32, folder, prefix)
    return _whole(folder, config, tensors, _beside(above))


def _of_file(source: Source, tokenizer: Path | None) -> TextEncoderWeights | None:
    for prefix in ("cond_stage_model.model.", "conditioner.embedders.0.model."):
        if prefix + "token_embedding.weight" in source.shapes:
            return _original(source, prefix, tokenizer)
    for prefix in ("cond_stage_model.transformer.", ""):
        for model in (prefix + _MODEL, prefix):
            if model + _FIRST in source.shapes:
                return _named(source, model, tokenizer)
    return None


def _original(source: Source, prefix: str, tokenizer: Path | None) -> TextEncoderWeights:
    """Of OpenCLIP's names below `prefix`."""
    shapes = {key.removeprefix(prefix): shape for key, shape in source.shapes.items() if key.startswith(prefix)}
    config = _inferred(source.path, shapes, TEXT_PART.infer)
    names, state = text_map(config), _state(source.path, config)
    meta = {prefix + old: keymap.to_original(old, new, state) for old, new in names.items()}
    _refuse(source, {key: tuple(value.shape) for key, value in meta.items()})
    tensors: dict[str, Tensor] = {}
    for old, new in names.items():
        tensors |= keymap.to_diffusers(new, source.tensor(prefix + old, torch.float32))
    return _whole(source.path, config, tensors, tokenizer)


def _named(source: Source, prefix: str, tokenizer: Path | None) -> TextEncoderWeights:
    """Of transformers' names below `prefix`, without a configuration."""
    shapes = {key.removeprefix(prefix): shape for key, shape in source.shapes.items() if key.startswith(prefix)}
    config = _inferred(source.path, shapes, _infer_named)
    state = _state(source.path, config)
    _refuse(source, {prefix + key: tuple(value.shape) for key, value in state.items()})
    tensors = {key: source.tensor(prefix + key, torch.float32) for key in state}
    return _whole(source.path, config, tensors, tokenizer)


def _inferred(path: Path, shapes: Shapes, infer: Callable[[Shapes], dict[str, Any]]) -> dict[str, Any]:
    try:
        return infer(shapes)
    except (KeyError, ValueError) as error:
        reason = f"no tensor {error.args[0]}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{path}: its {FOLDER} is not CLIP's ({reason}); {_ADVICE}") from error


def _infer_original(shapes: Shapes) -> dict[str, Any]:
    """transformers' keyword arguments for OpenCLIP's text transformer, without its last layer. Raises KeyError for a
    tensor that is not there, ValueError for a width that it cannot have."""
    sizes = shapes["token_embedding.weight"], shapes["transformer.resblocks.0.mlp.c_fc.weight"]
    layers = count(shapes, "transformer.resblocks.{}.ln_1.weight")
    return _kwargs(*sizes, layers - 1, "gelu")


def _infer_named(shapes: Shapes) -> dict[str, Any]:
    """The same under transformers' names: OpenCLIP's by its width, of which diffusers may have left the last layer out,
    else OpenAI's. Raises as _infer_original does."""
    sizes = shapes[_FIRST], shapes["encoder.layers.0.mlp.fc1.weight"]
    layers = count(shapes, "encoder.layers.{}.layer_norm1.weight")
    if sizes[0][1] == OPEN_WIDTH:
        return _kwargs(*sizes, min(layers, OPEN_LAYERS), "gelu")
    return _kwargs(*sizes, layers, "quick_gelu")


def _kwargs(tokens: tuple[int, ...], inner: tuple[int, ...], layers: int, activation: str) -> dict[str, Any]:
    vocabulary, width = tokens
    if layers < 1 or width % HEAD_WIDTH:
        raise ValueError(f"{layers} layers used, {width} wide; expected one at least, of {HEAD_WIDTH}-channel heads")
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner[0],
        "num_hidden_layers": layers,
        "num_attention_heads": width // HEAD_WIDTH,
        "hidden_act": activation,
    }


def _whole(
    path: Path, config: dict[str, Any], tensors: dict[str, Tensor], tokenizer: Path | None
) -> TextEncoderWeights:
    vocabulary = tensors[_FIRST].shape[0]
    if vocabulary <= END:
        what = f"{path}: its text encoder knows {vocabulary} tokens, expected CLIP's {END + 1}"
        raise CheckpointError(f"{what}; {_ADVICE}")
    open_clip = config.get("hidden_act", "quick_gelu") == "gelu"
    return TextEncoderWeights(config, tensors, 0 if open_clip else END, tokenizer)


def _refuse(source: Source, expected: Shapes) -> None:
    """Raises CheckpointError for tensors missing or of another shape: what else a file holds there is not used."""
    found = {key: shape for key, shape in source.shapes.items() if key in expected}
    refuse_differences(source.path, TEXT_PART.name, expected, found)


def _state(path: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    state, _ = TEXT_PART.plan(path, config)
    return {key.removeprefix(_MODEL): value for key, value in state.items() if not key.endswith(_POSITIONS)}


def text_map(config: Mapping[str, Any]) -> Names:
    """OpenCLIP's names to those of transformers' CLIPTextModel, both without what they begin with."""
    names = {
        "positional_embedding": "embeddings.position_embedding.weight",
        "token_embedding.weight": _FIRST,
        **pairs({"ln_final": "final_layer_norm"}),
    }
    for layer in range(config["num_hidden_layers"]):
        names |= below(f"transformer.resblocks.{layer}", f"encoder.layers.{layer}", keymap.CLIP_LAYER)
    return names


def _build(kwargs: Mapping[str, Any]) -> tuple[nn.Module, Mapping[str, Any]]:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(**config_kwargs(kwargs))
    return cast(nn.Module, CLIPTextModel(config)), cast("Mapping[str, Any]", config.to_dict())


TEXT_PART = Part(FOLDER, _MODEL, "CLIPTextModel", "model", _build, text_map, _infer_original)
