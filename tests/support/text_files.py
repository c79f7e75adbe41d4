"""Real but small text encoders of Stable Diffusion, in the layouts that are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WIDTH, TOKENS = 64, 49408
#: Stable Diffusion 1.x's and 2.x's kind; small, with CLIP's own number of tokens.
CLIP: dict[str, Any] = {
    "vocab_size": TOKENS,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 1,
    "hidden_act": "quick_gelu",
}
OPEN_CLIP = CLIP | {"hidden_act": "gelu"}
#: The prefix that published files have and newer transformers leave out.
MODEL = "text_model."


def text_encoder(config: dict[str, Any] = OPEN_CLIP, seed: int = 3) -> Any:
    torch.manual_seed(seed)
    model = CLIPTextModel(CLIPTextConfig(**config)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    return model


def named(model: Any) -> dict[str, Tensor]:
    """Its tensors under transformers' names, after any `text_model.`."""
    return {key.removeprefix(MODEL): value.contiguous() for key, value in model.state_dict().items()}


def save_tokenizer(folder: Path, pad: str) -> CLIPTokenizer:
    """A tokenizer of a few words, with the ends of CLIP's."""
    folder.mkdir(parents=True)
    ends = {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    words = {"!": 0, "a": 1, "b": 2, "a</w>": 3, "b</w>": 4, "ab</w>": 5}
    (folder / "vocab.json").write_text(json.dumps(words | ends))
    (folder / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special | {"pad_token": pad}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(special | {"pad_token": pad, "tokenizer_class": "CLIPTokenizer", "model_max_length": 77})
    )
    return CLIPTokenizer.from_pretrained(folder)


def save_folder(folder: Path, model: Any, prefix: str = MODEL) -> Path:
    """`text_encoder` as diffusers has it, under published names."""
    model.save_pretrained(folder / "text_encoder")
    stored = {prefix + key: value for key, value in named(model).items()}
    save_file(stored, folder / "text_encoder" / "model.safetensors")
    return folder


class OpenCLIPBlock(nn.Module):
    """A layer of OpenCLIP's text transformer, by its published definition and names."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, WIDTH // 64)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(WIDTH, 96), "c_proj": nn.Linear(96, WIDTH)})

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp["c_proj"](nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class OpenCLIPText(nn.Module):
    """OpenCLIP's text transformer, and what Stable Diffusion 2 takes of it: all layers but the last, normalised."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(TOKENS, WIDTH)
        self.positional_embedding = nn.Parameter(torch.empty(77, WIDTH))
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(OpenCLIPBlock() for _ in range(layers))})
        self.ln_final = nn.LayerNorm(WIDTH)
        self.text_projection = nn.Parameter(torch.empty(WIDTH, WIDTH))
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def forward(self, tokens: Tensor) -> Tensor:
        x = (self.token_embedding(tokens) + self.positional_embedding).permute(1, 0, 2)
        mask = torch.full((77, 77), float("-inf")).triu_(1)
        for block in list(self.transformer["resblocks"])[:-1]:  # type: ignore[arg-type]
            x = block(x, mask)
        return self.ln_final(x.permute(1, 0, 2))


def open_clip(seed: int = 5) -> OpenCLIPText:
    torch.manual_seed(seed)
    model = OpenCLIPText().eval().requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def open_clip_tensors(model: OpenCLIPText, prefix: str = "cond_stage_model.model.") -> dict[str, Tensor]:
    """As a single file of Stable Diffusion 2 has them."""
    return {prefix + key: value.contiguous() for key, value in model.state_dict().items()}
