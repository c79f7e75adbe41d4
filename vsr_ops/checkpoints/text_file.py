"""A text's embedding on disk, for a Stable Diffusion whose text encoder is not at hand: a module's file of kind "text"
(module_file.py), with the encoded prompt and the text of CFG's other branch, float32."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .module_file import read_module, write_module

KIND = "text"
_ADVICE = "make it with `python -m vsr_ops embed`"


@dataclass(frozen=True)
class Texts:
    """What a text encoder makes of the `prompt` and of the `negative` text: `(1, tokens, width)` float32 each."""

    prompt: Tensor
    negative: Tensor

    @property
    def width(self) -> int:
        """Width of the tokens, that of the encoder."""
        return self.prompt.shape[-1]


def write_texts(path: Path, texts: Texts, words: tuple[str, str], encoder: str) -> None:
    """Writes a file that `read_texts` reads. `words` are the two texts, `encoder` says whose embedding it is. Raises
    CheckpointError."""
    config: dict[str, Any] = {"prompt": words[0], "negative": words[1], "width": texts.width}
    # One tensor may be both, and safetensors stores none twice.
    tensors = {"prompt": texts.prompt, "negative": texts.negative.clone()}
    write_module(path, KIND, config, tensors, encoder, torch.float32)


def read_texts(path: Path) -> Texts:
    """The embeddings at `path`. Raises CheckpointError for a file that is missing, damaged, of another kind, or without
    two of one width."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file, expected a text's embedding; {_ADVICE}")
    stored = read_module(path, KIND)
    shapes = {name: tuple(value.shape) for name, value in stored.tensors.items()}
    width = stored.config.get("width")
    fits = all(len(shape) == 3 and shape[0] == 1 and shape[1] > 0 and shape[2] == width for shape in shapes.values())
    if shapes.keys() != {"prompt", "negative"} or not fits:
        what = f"{path}: holds {shapes or 'nothing'}, expected prompt and negative (1, tokens, {width})"
        raise CheckpointError(f"{what}; {_ADVICE}")
    return Texts(stored.tensors["prompt"], stored.tensors["negative"])
