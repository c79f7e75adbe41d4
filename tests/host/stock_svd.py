"""A checkpoint that the host takes for stock Stable Video Diffusion: its layout and names, random weights.

As narrow as the host's detection allows (every level as wide as the first), and CLIP's picture encoder, which has one
size, all zeros: a file with holes, since zeros need no room on the disk.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vsr_ops.checkpoints.svd import SVDWeights, write_svd

UNET: dict[str, Any] = {
    "block_out_channels": (320, 320, 320, 320),
    "num_attention_heads": (5, 5, 5, 5),
    "layers_per_block": 2,
    "cross_attention_dim": 1024,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 768,
}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "layers_per_block": 2,
}
#: OpenCLIP's ViT-H/14: width, layers, the width of its hidden layers and of its result, patch, tokens.
WIDTH, LAYERS, HIDDEN, RESULT, PATCH, TOKENS = 1280, 32, 5120, 1024, 14, 257
CLIP_PREFIX = "conditioner.embedders.0.open_clip.model.visual."


Shapes = dict[str, tuple[int, ...]]


def norms(width: int, *names: str) -> Shapes:
    return {f"{name}.{key}": (width,) for name in names for key in ("weight", "bias")}


def layer_shapes(width: int, hidden: int) -> Shapes:
    """A transformer's layer, by OpenCLIP's names."""
    return {
        **norms(width, "ln_1", "ln_2"),
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width),
        "attn.out_proj.bias": (width,),
        "mlp.c_fc.weight": (hidden, width),
        "mlp.c_fc.bias": (hidden,),
        "mlp.c_proj.weight": (width, hidden),
        "mlp.c_proj.bias": (width,),
    }


def clip_shapes() -> Shapes:
    """The picture encoder's tensors, by OpenCLIP's names."""
    layer = layer_shapes(WIDTH, HIDDEN)
    return {
        "class_embedding": (WIDTH,),
        "positional_embedding": (TOKENS, WIDTH),
        "proj": (WIDTH, RESULT),
        "conv1.weight": (WIDTH, 3, PATCH, PATCH),
        **norms(WIDTH, "ln_pre", "ln_post"),
        **{f"transformer.resblocks.{k}.{key}": shape for k in range(LAYERS) for key, shape in layer.items()},
    }


def write_with_holes(path: Path, tensors: dict[str, Tensor], zeros: Shapes) -> None:
    """A safetensors file of half-precision tensors, and of zeros that are never written."""
    shapes = {**{name: tuple(tensor.shape) for name, tensor in tensors.items()}, **zeros}
    header, end = dict[str, Any](), 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.half().contiguous().numpy().tobytes())
        file.truncate(8 + len(text) + end)


def random_state(module: nn.Module) -> dict[str, Tensor]:
    """Weights of a module's shapes, best on the meta device, that keep a signal's size. A module's own start takes
    minutes, as does drawing so many numbers: they are drawn once and repeated."""
    drawn = torch.randn(10**6 + 3).half()
    return {name: weights_of(name, value.shape, drawn) for name, value in module.state_dict().items()}


def weights_of(name: str, shape: torch.Size, drawn: Tensor) -> Tensor:
    """A norm's weight is one, a bias is zero, all others are as large as their inputs ask."""
    if len(shape) < 2:
        return torch.full(shape, float(name.endswith("weight")), dtype=torch.float16)
    numbers = drawn.repeat(shape.numel() // len(drawn) + 1)[: shape.numel()]
    return (numbers * shape[1:].numel() ** -0.5).reshape(shape)


def place_stock_svd(folder: Path, name: str) -> None:
    """The checkpoint, in a folder of the host's."""
    from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel

    torch.manual_seed(0)
    with torch.device("meta"):
        models = UNetSpatioTemporalConditionModel(**UNET), AutoencoderKLTemporalDecoder(**VAE)
    unet, vae = (random_state(model) for model in models)
    folder.mkdir(parents=True, exist_ok=True)
    own = folder / "own.safetensors"
    write_svd(own, SVDWeights(UNET, VAE, None, unet, vae, None, (40, 72, 14), {}), "noise")
    # Under the original's names now, without the pack's metadata.
    clip = {CLIP_PREFIX + key: shape for key, shape in clip_shapes().items()}
    write_with_holes(folder / name, load_file(own), clip)
    own.unlink()
