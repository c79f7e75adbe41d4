"""What a Stable Diffusion's own text encoder makes of a text: 77 tokens, also of the empty one.

A model that was trained on prompts, and a control on it, know the empty text so; zeros are no text to them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..checkpoints.safefile import first_line
from ..checkpoints.text_encoder import END, START, TextEncoderWeights
from ..checkpoints.text_file import Texts
from ..errors import CheckpointError, SettingError

#: Tokens of a text in CLIP's configurations.
TOKENS = 77


@torch.no_grad()
def encode_texts(encoder: TextEncoderWeights, prompt: str, negative: str, device: torch.device) -> Texts:
    """The last layer's tokens, normalised, of both texts: float32 on the CPU. Raises as `tokens_of` does."""
    texts = {text: tokens_of(encoder, text) for text in (prompt, negative)}
    model = encoder.build().to(device)
    encoded: dict[str, Tensor] = {
        text: model(torch.tensor([tokens], device=device)).last_hidden_state.float().cpu()
        for text, tokens in texts.items()
    }
    return Texts(encoded[prompt], encoded[negative])


def tokens_of(encoder: TextEncoderWeights, text: str) -> list[int]:
    """The tokens of a text, filled up to the encoder's number. The empty text needs no tokenizer.

    Raises SettingError for a text with words where there is no tokenizer, or that is too long, and CheckpointError for
    a tokenizer that cannot be read.
    """
    length = int(encoder.config.get("max_position_embeddings", TOKENS))
    tokens, pad = [START, END], encoder.pad
    if encoder.tokenizer is not None:
        tokenizer = _tokenizer(encoder.tokenizer)
        tokens = list[int](tokenizer(text).input_ids)
        pad = pad if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
    elif text:
        raise SettingError(
            f"the text {text!r} needs a tokenizer, and the text encoder has none beside it: expected the folder"
            " tokenizer, as diffusers' layout has it; put it beside, or leave the text empty"
        )
    if len(tokens) > length:
        raise SettingError(
            f"the text has {len(tokens)} tokens with its two ends, expected {length} at most: shorten it, {text[:40]!r}"
        )
    return tokens + [pad] * (length - len(tokens))


def _tokenizer(folder: Path) -> Any:
    # Slow to import, and needed for a text with words alone.
    from transformers import CLIPTokenizer

    try:
        return cast("Any", CLIPTokenizer).from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever a damaged file breaks inside the other library
        what = f"{folder}: not a tokenizer of CLIP ({first_line(error)})"
        raise CheckpointError(f"{what}; expected vocab.json and merges.txt, copy it again") from error
