"""Stable Video Diffusion weights on disk: the original single file, a diffusers folder, this pack's files.

Own files keep the original names and add to the safetensors metadata `vsr.kind` ("svd"), `vsr.version`,
`vsr.trained_on` and `vsr.config`, a JSON object `{"unet": {...}, "vae": {...}, "tile": [h, w, t]}` that holds
the keyword arguments of diffusers' classes (and `"image_encoder"`, of transformers' CLIPVisionConfig, where
there is one). Only safetensors are read: a pickle can run code.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..weights import bundled
from . import keymap
from .diffusers_folder import config_kwargs, folder_config, read_named, weight_files
from .keymap import CLIP, QUANT, UNET, VAE, Names
from .safefile import (
    Shapes,
    Source,
    json_object,
    open_safely,
    refuse_differences,
    refuse_not_finite,
    write_whole,
)
from .svd_parts import IMAGE_ENCODER_PART, PARTS, UNET_PART, VAE_PART, Part, in_transformers_names
from .unet_alone import OpenUNet, open_unet

#: The weights that come with the pack.
LITE = bundled("svd_lite")

KIND = "svd"
VERSION = "1"
TILE = (64, 64, 14)
SCALING_FACTOR = 0.18215
HOST_EPSILON = 1e-5

_ADVICE = "give svd.safetensors, svd_xt.safetensors, a diffusers folder, or a file of this pack"
# What another project's file looks like, by a pattern over all its names; the first that fits is named.
_OTHER_MODELS = {
    r"\.lora_|^lora_|\.hada_w": "a LoRA",
    r"^control_model\.|^controlnet_|^input_hint_block": "a ControlNet",
    r"^conditioner\.embedders\.1\.model\.": "an SDXL checkpoint",
    r"^cond_stage_model\.transformer\.": "a Stable Diffusion 1.x checkpoint",
    r"^cond_stage_model\.model\.": "a Stable Diffusion 2.x checkpoint",
    r"\.motion_modules\.": "an AnimateDiff motion module",
    r"^down_blocks\.\d+\.": "one file of a diffusers folder (give the folder)",
    r"^(encoder|decoder)\.conv_in\.": "a VAE alone",
    r"^model\.diffusion_model\.": "a diffusion model without SVD's temporal layers",
}


@dataclass(frozen=True)
class SVDWeights:
    """A Stable Video Diffusion model as plain data, under diffusers' and transformers' names.

    `unet_config` and `vae_config` are keyword arguments of diffusers' UNetSpatioTemporalConditionModel and
    AutoencoderKLTemporalDecoder, `image_encoder_config` of transformers' CLIPVisionConfig. `tile` is the
    default tile (height, width, frames) in latents, `metadata` what the file says of itself.
    """

    unet_config: dict[str, Any]
    vae_config: dict[str, Any]
    image_encoder_config: dict[str, Any] | None
    unet: dict[str, Tensor]
    vae: dict[str, Tensor]
    image_encoder: dict[str, Tensor] | None
    tile: tuple[int, int, int]
    metadata: dict[str, str]


def read_svd(path: Path, dtype: torch.dtype = torch.float32, unet: Path | None = None) -> SVDWeights:
    """Reads an SVD in any of the three layouts, tensor by tensor, onto the CPU as `dtype`.

    Of a single file only the UNet, the VAE and the image encoder are looked at: the published ones also hold
    a second VAE (`conditioner.embedders.3.*`) and rests of a text encoder, which nothing here needs. `unet` is a UNet
    alone (unet_alone.py), which takes the place of the SVD's own; of that no tensor is read. Raises CheckpointError
    when a path is missing, unsafe, damaged, or not an SVD of the layout it claims to be, or the two do not fit.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder; {_ADVICE}")
    with contextlib.nullcontext() if unet is None else open_unet(Path(unet)) as own:
        return _read_folder(path, dtype, own) if path.is_dir() else _read_file(path, dtype, own)


def svd_configs(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The configurations of an SVD's models in a single file, by "unet", "vae" and, where it has one, "image_encoder",
    and the file's metadata; no tensor is read. Raises CheckpointError as read_svd does."""
    with open_safely(path) as source:
        return _file_configs(source, _stored_config(path, source.metadata)), source.metadata


def write_svd(path: Path, weights: SVDWeights, trained_on: str, dtype: torch.dtype = torch.float16) -> None:
    """Writes one of the pack's own files: original names, configuration in the metadata, `dtype` tensors.

    Entries of `weights.metadata` under `vsr.` are kept. The file is written beside `path` and renamed when
    whole. Raises CheckpointError when the weights do not fit their configuration, are not finite as `dtype`,
    or the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: suffix '{path.suffix}', expected '.safetensors'; rename the output")
    config: dict[str, Any] = {"tile": list(_tile(path, list(weights.tile)))}
    tensors: dict[str, Tensor] = {}
    for part, kwargs, state in (
        (UNET_PART, weights.unet_config, weights.unet),
        (VAE_PART, weights.vae_config, weights.vae),
        (IMAGE_ENCODER_PART, weights.image_encoder_config, weights.image_encoder),
    ):
        if (kwargs is None) != (state is None):
            raise CheckpointError(f"{path}: {part.name} has only one of configuration and weights; give both")
        if kwargs is not None and state is not None:
            config[part.name] = config_kwargs(kwargs)
            tensors |= _originals(path, part, config[part.name], state, dtype)
    own = {"vsr.kind": KIND, "vsr.version": VERSION, "vsr.trained_on": trained_on}
    own["vsr.config"] = json.dumps(config, sort_keys=True)
    kept = {k: v for k, v in weights.metadata.items() if k.startswith("vsr.")}
    write_whole(path, tensors, {"format": "pt", **kept, **own})


def match_host_epsilon(unet: nn.Module) -> int:
    """Sets the norm epsilon of the UNet's residual blocks to the original's 1e-5; returns how many changed.

    diffusers builds those of the up blocks and of the down blocks with attention with 1e-6: 72 GroupNorms at
    full size. Everything else, the whole VAE included, agrees with the original already.
    """
    changed = 0
    for name, module in cast("Iterable[tuple[str, nn.Module]]", unet.named_modules()):
        if re.search(r"\.(spatial|temporal)_res_block\.norm[12]$", name) and isinstance(module, nn.GroupNorm):
            changed += module.eps != HOST_EPSILON
            module.eps = HOST_EPSILON
    return changed


# --- single files -------------------------------------------------------------------------------------------


def _read_file(path: Path, dtype: torch.dtype, own: OpenUNet | None) -> SVDWeights:
    with open_safely(path) as source:
        stored = _stored_config(path, source.metadata)
        configs = _file_configs(source, stored)
        tile = _tile(path, (stored or {}).get("tile", list(TILE)))
        states = _own_unet(path, configs, dtype, own)
        for part in PARTS:
            if part.name in configs and part.name not in states:
                states[part.name] = _read_part(source, part, configs[part.name], dtype)
        return _weights(configs, states, tile, source.metadata)


def _file_configs(source: Source, stored: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    if stored is None:
        _refuse_other_models(source.path, source.shapes)
    clip = any(key.startswith(CLIP) for key in source.shapes)
    return {part.name: _file_config(source, part, stored) for part in PARTS if clip or part is not IMAGE_ENCODER_PART}


def _own_unet(
    path: Path, configs: dict[str, dict[str, Any]], dtype: torch.dtype, own: OpenUNet | None
) -> dict[str, dict[str, Tensor]]:
    """The tensors of a UNet alone, whose configuration takes its place among those of the SVD at `path`; else none."""
    if own is None:
        return {}
    own.refuse_beside(path, configs)
    configs[UNET_PART.name] = own.config
    return {UNET_PART.name: own.read(dtype)}


def _weights(
    configs: dict[str, dict[str, Any]],
    states: dict[str, dict[str, Tensor]],
    tile: tuple[int, int, int],
    metadata: dict[str, str],
) -> SVDWeights:
    return SVDWeights(
        unet_config=configs["unet"],
        vae_config={"scaling_factor": SCALING_FACTOR, **configs["vae"]},
        image_encoder_config=configs.get("image_encoder"),
        unet=states["unet"],
        vae=states["vae"],
        image_encoder=states.get("image_encoder"),
        tile=tile,
        metadata=metadata,
    )


def _stored_config(path: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The configuration in the metadata; None for a file that is not this pack's."""
    kind = metadata.get("vsr.kind")
    if kind is None:
        return None
    if kind != KIND:
        raise CheckpointError(f"{path}: weights of kind '{kind}', expected kind '{KIND}'; {_ADVICE}")
    if (version := metadata.get("vsr.version")) != VERSION:
        raise CheckpointError(f"{path}: vsr.version '{version}', expected '{VERSION}'; update this pack")
    config = json_object(metadata.get("vsr.config", ""))
    if config is None or not all(isinstance(config.get(name), dict) for name in ("unet", "vae")):
        raise CheckpointError(
            f"{path}: its vsr.config metadata cannot be used, expected a JSON object with 'unet' and 'vae'; "
            "get the file again from where it was made"
        )
    return config


def _file_config(source: Source, part: Part, stored: Mapping[str, Any] | None) -> dict[str, Any]:
    if stored is not None and isinstance(stored.get(part.name), dict):
        return config_kwargs(stored[part.name])
    try:
        return part.infer(source.shapes)
    except KeyError as error:
        reason = f"no tensor {error.args[0]}"
    except (ValueError, IndexError) as error:
        reason = str(error)
    raise CheckpointError(f"{source.path}: not a {part.name} of SVD's layout ({reason}); {_ADVICE}")


def _read_part(source: Source, part: Part, kwargs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """One of the models of a single file, under diffusers' names."""
    state, names = part.plan(source.path, kwargs)
    found = {key: shape for key, shape in source.shapes.items() if key.startswith(part.prefix)}
    if part is IMAGE_ENCODER_PART and in_transformers_names(found):
        return read_named([source], part, state, dtype, source.path, prefix=CLIP)
    own_quant_conv = part is VAE_PART and any(key.startswith(QUANT) for key in found)
    if own_quant_conv:
        names |= {QUANT + p: f"quant_conv.{p}" for p in ("weight", "bias")}
    meta = {original: keymap.to_original(original, name, state) for original, name in names.items()}
    idle = keymap.idle_middle_block(meta) if part is VAE_PART and not _runs_middle(names) else {}
    refuse_differences(source.path, part.name, _shapes(meta | idle), found)
    for key in idle:
        if source.tensor(key, dtype).any():
            what = f"{source.path}: {key} is not zero, which diffusers cannot run at one layer per block"
            raise CheckpointError(f"{what}; expected zeros, give the VAE two layers per block")
    weights: dict[str, Tensor] = {}
    for original, name in names.items():
        weights |= keymap.to_diffusers(name, source.tensor(original, dtype))
    if part is VAE_PART and not own_quant_conv:
        weights |= keymap.identity_quant_conv(len(state["quant_conv.bias"]), dtype)
    return weights


def _runs_middle(names: Names) -> bool:
    return VAE + "decoder.mid.block_2.conv1.weight" in names


def _originals(
    path: Path, part: Part, kwargs: Mapping[str, Any], weights: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """One of the models under its original names, on the CPU as `dtype`."""
    state, names = part.plan(path, kwargs)
    refuse_differences(path, part.name, _shapes(state), _shapes(weights))
    if part is VAE_PART:
        weights = keymap.fold_quant_conv(weights)
    tensors: dict[str, Tensor] = {}
    for original, name in names.items():
        tensor = keymap.to_original(original, name, weights).detach()
        tensors[original] = tensor.to("cpu", dtype, copy=True).contiguous()
        refuse_not_finite(path, original, tensors[original], tensor)
    return tensors if part is not VAE_PART or _runs_middle(names) else tensors | keymap.idle_middle_block(tensors)


# --- diffusers folders --------------------------------------------------------------------------------------


def _read_folder(path: Path, dtype: torch.dtype, own: OpenUNet | None) -> SVDWeights:
    # A UNet given beside it may be all that is missing.
    needless = [IMAGE_ENCODER_PART] if own is None else [IMAGE_ENCODER_PART, UNET_PART]
    folders = {part.name: path / part.name for part in PARTS}
    parts = [part for part in PARTS if part not in needless or folders[part.name].is_dir()]
    configs = {part.name: folder_config(folders[part.name], part, _ADVICE) for part in parts}
    states = _own_unet(path, configs, dtype, own)
    for part in parts:
        if part.name not in states:
            folder = folders[part.name]
            state, _ = part.plan(folder, configs[part.name])
            with contextlib.ExitStack() as stack:
                sources = [stack.enter_context(open_safely(file)) for file in weight_files(folder, part.stem)]
                states[part.name] = read_named(sources, part, state, dtype, folder)
    return _weights(configs, states, TILE, {})


# --- refusals -----------------------------------------------------------------------------------------------


def _refuse_other_models(path: Path, shapes: Shapes) -> None:
    """Refuses a file without metadata that is not a whole SVD, saying what it looks like."""
    if UNET + "input_blocks.1.0.time_stack.in_layers.0.weight" not in shapes:
        fits = (what for pattern, what in _OTHER_MODELS.items() if any(re.search(pattern, key) for key in shapes))
        first = min(shapes, default="nothing")
        what = next(fits, f"no known model, its {len(shapes)} tensors begin with {first}")
        raise CheckpointError(f"{path}: looks like {what}, expected Stable Video Diffusion; {_ADVICE}")
    for key, lack in (
        ("decoder.conv_in.weight", "no VAE"),
        (
            "decoder.conv_out.time_mix_conv.weight",
            "a VAE whose decoder is not temporal (an 'image_decoder' file)",
        ),
        ("encoder.conv_in.weight", "a VAE without its encoder"),
    ):
        if VAE + key not in shapes:
            raise CheckpointError(f"{path}: holds {lack}, expected SVD's UNet and temporal VAE; {_ADVICE}")


def _tile(path: Path, value: object) -> tuple[int, int, int]:
    if isinstance(value, list):
        sizes = cast("list[object]", value)
        if len(sizes) == 3 and all(type(size) is int and size > 0 for size in sizes):
            height, width, frames = cast("list[int]", sizes)
            return height, width, frames
    raise CheckpointError(f"{path}: tile {value}, expected [height, width, frames] above zero; write it so")


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in state.items()}
