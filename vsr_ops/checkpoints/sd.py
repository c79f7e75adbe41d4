"""Stable Diffusion weights on disk: published single files and diffusers folders of 1.x and 2.x, and this pack's own.

Own files keep the original names of the UNet and add to the safetensors metadata `vsr.kind` ("sd"), `vsr.version`,
`vsr.trained_on` and `vsr.config`, a JSON object `{"unet": {...}, "prediction": "v_prediction" | "epsilon", "tile":
[h, w, t]}` with the keyword arguments of diffusers' UNet2DConditionModel. Their VAE is that of the bundled SVD. A
pickle can run code: of one, as DiffBIR published its base (`sd2.1-base-zsnr-laionaes5.ckpt`), tensors alone are read.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, SettingError
from ..names import PREDICTIONS
from ..weights import bundled
from . import keymap
from .diffusers_folder import folder_config, read_named, weight_files, with_current_names
from .keymap import UNET, VAE
from .safefile import (
    Shapes,
    Source,
    json_object,
    open_safely,
    open_weights,
    refuse_differences,
    refuse_not_finite,
    write_whole,
)
from .sd_keymap import infer_sd_unet, picture_vae_map, sd_unet_map
from .svd import SCALING_FACTOR
from .svd_parts import Part, infer_vae

#: The weights that come with the pack.
LITE_SD = bundled("sd_lite")

KIND = "sd"
VERSION = "1"
TILE = (64, 64, 14)
#: Above it the host takes a UNet of 2.x for one that predicts v.
V_DEVIATION = 0.09
#: Whose deviation that is: training leaves it as it is, so that the host goes on telling the two apart.
TELLING_BIAS = "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"
#: The noise that Stable Diffusion learned: betas linear in their square root, between these, over so many timesteps.
BETAS, TIMESTEPS = (0.00085, 0.012), 1000

_ADVICE = "give lite, Stable Diffusion 1.5 or 2.1 as one file or as a diffusers folder, or a file of this pack"
#: Below it, of the variance at the last timestep, a schedule ends in noise alone; Stable Diffusion's ends at 0.0047.
LEAST_SIGNAL = 1e-6
#: Marks that the host leaves in files.
_SAYS_V, _SAYS_ZERO = "v_pred", "ztsnr"
#: What some files keep beside the weights.
_UNUSED = {VAE + "model_ema.decay", VAE + "model_ema.num_updates"}


@dataclass(frozen=True)
class SDWeights:
    """A Stable Diffusion as plain data: keyword arguments and tensors of diffusers' UNet2DConditionModel, what it
    predicts (a name in PREDICTIONS), and the default tile (height, width, frames) in latents. `vae_config` and `vae`
    are those of diffusers' AutoencoderKL; None: the VAE is the bundled SVD's. `zero_snr`: the last timestep of its
    schedule is noise alone (Lin et al., arXiv 2305.08891)."""

    unet_config: dict[str, Any]
    prediction: str
    unet: dict[str, Tensor]
    tile: tuple[int, int, int]
    vae_config: dict[str, Any] | None = None
    vae: dict[str, Tensor] | None = None
    zero_snr: bool = False

    def told(self, prediction: str | None = None, zero_snr: bool | None = None) -> SDWeights:
        """With another prediction or schedule than the file seems to have; None leaves it. Where nothing is left of the
        signal, its noise says nothing of it: of a zero-SNR schedule v is predicted. Raises SettingError."""
        if prediction not in (None, *PREDICTIONS):
            raise SettingError(f"prediction is {prediction!r}: expected one of {', '.join(PREDICTIONS)}")
        zero = self.zero_snr if zero_snr is None else zero_snr
        if zero and prediction == "epsilon":
            raise SettingError(
                "prediction is 'epsilon' with a zero terminal SNR: expected v_prediction, for at its last timestep the"
                " noise tells nothing; leave prediction out, or set zsnr to off"
            )
        found = "v_prediction" if zero else self.prediction
        return replace(self, prediction=prediction or found, zero_snr=zero)


def read_sd(path: Path, dtype: torch.dtype = torch.float32) -> SDWeights:
    """Reads a Stable Diffusion onto the CPU as `dtype`: UNet and VAE; a text encoder is passed over.

    Raises CheckpointError when the file or folder is missing, unsafe, damaged, of another kind, or does not fit its
    configuration.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, dtype)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file or folder; {_ADVICE}")
    with open_weights(path) as source:
        if "vsr.kind" not in source.metadata:
            return _published(source, dtype)
        config = _stored(path, source.metadata)
        kwargs = _kwargs(config["unet"])
        unet = _read_part(source, SD_UNET_PART, kwargs, dtype)
        return SDWeights(kwargs, config["prediction"], unet, _tile(path, config.get("tile")))


def is_own(path: Path) -> bool:
    """Whether a file is one of this pack's, which learnt from a prompt of zeros. Raises CheckpointError."""
    if not path.is_file():
        return False
    with open_weights(path) as source:
        return "vsr.kind" in source.metadata


def _read_folder(path: Path, dtype: torch.dtype) -> SDWeights:
    kwargs, states = dict[str, dict[str, Any]](), dict[str, dict[str, Tensor]]()
    for part in (SD_UNET_PART, PICTURE_VAE_PART):
        folder = path / part.name
        kwargs[part.name] = folder_config(folder, part, _ADVICE)
        state, _ = part.plan(folder, kwargs[part.name])
        with contextlib.ExitStack() as stack:
            files = weight_files(folder, part.stem)
            sources = [with_current_names(stack.enter_context(open_safely(file))) for file in files]
            states[part.name] = read_named(sources, part, state, dtype, folder)
    unet = kwargs["unet"]
    if (channels := unet.get("in_channels", 4)) != 4:
        what = f"{path / 'unet'}: a UNet that takes {channels} channels, expected 4"
        raise CheckpointError(f"{what}: not an inpainting, depth or upscaling model; {_ADVICE}")
    # Of 2.x the logits overflow float16, which not every configuration says.
    unet["upcast_attention"] = bool(unet.get("use_linear_projection"))
    prediction, zero = _scheduled(path / "scheduler" / "scheduler_config.json")
    found = SDWeights(
        unet, _prediction(states["unet"], unet), states["unet"], TILE, kwargs["vae"], states["vae"], zero_snr=zero
    )
    return found.told(prediction)


def _scheduled(file: Path) -> tuple[str | None, bool]:
    """What the scheduler of a diffusers folder says: the prediction (None: there is no such file), and whether the
    terminal SNR is zero. Raises CheckpointError for a schedule that is not Stable Diffusion's."""
    if not file.is_file():
        return None, False
    config = json_object(file.read_text(encoding="utf-8", errors="replace"))
    if config is None:
        raise CheckpointError(f"{file}: not a JSON object, expected a scheduler's configuration; copy it again")
    ours = {"beta_start": BETAS[0], "beta_end": BETAS[1], "beta_schedule": "scaled_linear"}
    ours["num_train_timesteps"] = TIMESTEPS
    found = {name: config[name] for name in ours if name in config}
    if found != {name: ours[name] for name in found}:
        raise CheckpointError(f"{file}: its noise is {found}, expected {ours}; {_ADVICE}")
    # diffusers' own default, which old configurations leave out
    prediction: str = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise CheckpointError(f"{file}: prediction_type {prediction!r}, expected one of {', '.join(PREDICTIONS)}")
    return prediction, bool(config.get("rescale_betas_zero_snr", False))


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
    found = SDWeights(configs["unet"], _prediction(unet, configs["unet"]), unet, TILE, configs["vae"], vae)
    return found.told("v_prediction" if _SAYS_V in source.shapes else None, _ends_in_noise(source))


def _ends_in_noise(source: Source) -> bool:
    """Whether a file says that its terminal SNR is zero: by the host's mark, or by the schedule that LDM keeps."""
    if _SAYS_ZERO in source.shapes:
        return True
    kept = "alphas_cumprod"
    return kept in source.shapes and float(source.get(kept).flatten()[-1]) < LEAST_SIGNAL


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
