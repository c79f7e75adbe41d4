"""Stable Diffusion weights on disk: published single files of 1.x and 2.x, and this pack's own.

Own files keep the original names of the UNet and add to the safetensors metadata `vsr.kind` ("sd"), `vsr.version`,
`vsr.trained_on` and `vsr.config`, a JSON object `{"unet": {...}, "prediction": "v_prediction" | "epsilon", "tile":
[h, w, t]}` with the keyword arguments of diffusers' UNet2DConditionModel. Their VAE is that of the bundled SVD. Only
safetensors are read: a pickle can run code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..weights import bundled
from . import keymap
from .keymap import UNET, VAE
from .safefile import Shapes, Source, json_object, open_safely, refuse_differences, refuse_not_finite, write_whole
from .sd_keymap import infer_sd_unet, picture_vae_map, sd_unet_map
from .svd import SCALING_FACTOR
from .svd_parts import Part, infer_vae

#: The weights that come with the pack.
LITE_SD = bundled("sd_lite")

KIND = "sd"
VERSION = "1"
PREDICTIONS = ("v_prediction", "epsilon")
TILE = (64, 64, 14)
#: Above it the host takes a UNet of 2.x for one that predicts v.
V_DEVIATION = 0.09
#: Whose deviation that is: training leaves it as it is, so that the host goes on telling the two apart.
TELLING_BIAS = "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"

_ADVICE = "give lite, a .safetensors of Stable Diffusion 1.5 or 2.1, or a file of this pack"
#: What some files keep beside the weights.
_UNUSED = {VAE + "model_ema.decay", VAE + "model_ema.num_updates"}


@dataclass(frozen=True)
class SDWeights:
    """A Stable Diffusion as plain data: keyword arguments and tensors of diffusers' UNet2DConditionModel, what it
    predicts (a name in PREDICTIONS), and the default tile (height, width, frames) in latents. `vae_config` and `vae`
    are those of diffusers' AutoencoderKL; None: the VAE is the bundled SVD's."""

    unet_config: dict[str, Any]
    prediction: str
    unet: dict[str, Tensor]
    tile: tuple[int, int, int]
    vae_config: dict[str, Any] | None = None
    vae: dict[str, Tensor] | None = None


def read_sd(path: Path, dtype: torch.dtype = torch.float32) -> SDWeights:
    """Reads a Stable Diffusion onto the CPU as `dtype`: UNet and VAE; a text encoder is passed over.

    Raises CheckpointError when the file is missing, unsafe, damaged, of another kind, or does not fit its
    configuration.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; {_ADVICE}")
    with open_safely(path) as source:
        if "vsr.kind" not in source.metadata:
            return _published(source, dtype)
        config = _stored(path, source.metadata)
        kwargs = _kwargs(config["unet"])
        unet = _read_part(source, SD_UNET_PART, kwargs, dtype)
        return SDWeights(kwargs, config["prediction"], unet, _tile(path, config.get("tile")))


def _published(source: Source, dtype: torch.dtype) -> SDWeights:
    configs: dict[str, dict[str, Any]] = {}
    for part in (SD_UNET_PART, PICTURE_VAE_PART):
        try:
            configs[part.name] = part.infer(source.shapes)
        except (KeyError, ValueError, IndexError) as error:
            reason = f"no tensor {error.args[0]}" if isinstance(error, KeyError) else str(error)
            what = f"{source.path}: not a {part.name} of Stable Diffusion's layout ({reason})"
            raise CheckpointError(f"{what}; {_ADVICE}") from error
    unet = _read_part(source, SD_UNET_PART, configs["unet"], dtype)
    vae = _read_part(source, PICTURE_VAE_PART, configs["vae"], dtype)
    return SDWeights(configs["unet"], _prediction(unet, configs["unet"]), unet, TILE, configs["vae"], vae)


def _prediction(unet: Mapping[str, Tensor], config: Mapping[str, Any]) -> str:
    """What a published UNet predicts: 1.x the noise. Of 2.x nothing in a file says so; the 768-pixel ones, which
    predict v, are told as the host tells them, by how widely the biases of a last normalisation vary."""
    bias = unet.get(TELLING_BIAS)
    wide = bias is not None and float(bias.float().std(unbiased=False)) > V_DEVIATION
    return "v_prediction" if config["use_linear_projection"] and wide else "epsilon"


def _read_part(source: Source, part: Part, kwargs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    state, names = part.plan(source.path, kwargs)
    meta = {original: keymap.to_original(original, name, state) for original, name in names.items()}
    found = {key: shape for key, shape in source.shapes.items() if key.startswith(part.prefix) and key not in _UNUSED}
    refuse_differences(source.path, part.name, _shapes(meta), found)
    weights: dict[str, Tensor] = {}
    for original, name in names.items():
        weights |= keymap.to_diffusers(name, source.tensor(original, dtype))
    return weights


def write_sd(
    path: Path,
    weights: SDWeights,
    trained_on: str,
    dtype: torch.dtype = torch.float16,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Writes one of the pack's own files; `notes` join its metadata. Raises CheckpointError when the weights do not fit
    their configuration, are not finite as `dtype`, or the file cannot be written."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: suffix '{path.suffix}', expected '.safetensors'; rename the output")
    kwargs = _kwargs(weights.unet_config)
    state, names = SD_UNET_PART.plan(path, kwargs)
    refuse_differences(path, "unet", _shapes(state), _shapes(weights.unet))
    if weights.prediction not in PREDICTIONS:
        raise CheckpointError(f"{path}: prediction {weights.prediction!r}, expected one of {', '.join(PREDICTIONS)}")
    if weights.vae is not None:
        raise CheckpointError(f"{path}: a VAE of its own, expected none: own files use the bundled SVD's; leave it out")
    tensors: dict[str, Tensor] = {}
    for original, name in names.items():
        tensors[original] = weights.unet[name].detach().to("cpu", dtype, copy=True).contiguous()
        refuse_not_finite(path, original, tensors[original], weights.unet[name])
    config = {"unet": kwargs, "prediction": weights.prediction, "tile": list(weights.tile)}
    metadata = {"format": "pt", "vsr.kind": KIND, "vsr.version": VERSION, "vsr.trained_on": trained_on}
    metadata |= notes or {}
    write_whole(path, tensors, {**metadata, "vsr.config": json.dumps(config, sort_keys=True)})


def _stored(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if (kind := metadata.get("vsr.kind")) != KIND:
        raise CheckpointError(f"{path}: weights of kind {kind!r}, expected kind {KIND!r}; {_ADVICE}")
    if (version := metadata.get("vsr.version")) != VERSION:
        raise CheckpointError(f"{path}: vsr.version {version!r}, expected {VERSION!r}; update this pack")
    config = json_object(metadata.get("vsr.config", ""))
    if config is None or not isinstance(config.get("unet"), dict) or config.get("prediction") not in PREDICTIONS:
        what = f"expected a JSON object with 'unet' and 'prediction' (one of {', '.join(PREDICTIONS)})"
        raise CheckpointError(f"{path}: its vsr.config metadata cannot be used, {what}; get the file again")
    return config


def _tile(path: Path, value: object) -> tuple[int, int, int]:
    sizes = cast("list[object]", value) if isinstance(value, list) else []
    if len(sizes) == 3 and all(type(size) is int and size > 0 for size in sizes):
        height, width, frames = cast("list[int]", sizes)
        return height, width, frames
    raise CheckpointError(f"{path}: tile {value}, expected [height, width, frames] above zero; write it so")


def _kwargs(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments out of a stored configuration: lists as tuples."""
    return {k: tuple(cast("list[Any]", v)) if isinstance(v, list) else v for k, v in config.items()}


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def _build_unet(kwargs: Mapping[str, Any]) -> tuple[nn.Module, Mapping[str, Any]]:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    model = UNet2DConditionModel(**kwargs)
    return cast(nn.Module, model), cast("Mapping[str, Any]", model.config)


def _build_picture_vae(kwargs: Mapping[str, Any]) -> tuple[nn.Module, Mapping[str, Any]]:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    model = AutoencoderKL(**kwargs)
    return cast(nn.Module, model), cast("Mapping[str, Any]", model.config)


def _infer_picture_vae(shapes: Shapes) -> dict[str, Any]:
    levels = len(infer_vae(shapes)["block_out_channels"])
    return {
        **infer_vae(shapes),
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "scaling_factor": SCALING_FACTOR,
    }


_STEM = "diffusion_pytorch_model"
SD_UNET_PART = Part("unet", UNET, "UNet2DConditionModel", _STEM, _build_unet, sd_unet_map, infer_sd_unet)
PICTURE_VAE_PART = Part("vae", VAE, "AutoencoderKL", _STEM, _build_picture_vae, picture_vae_map, _infer_picture_vae)
