"""Files and the host's own objects made of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.sd
import comfy.supported_models
import comfy.utils
import folder_paths
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL, AutoencodingEngine
from comfy.ldm.modules.diffusionmodules.openaimodel import Timestep
from comfy.model_base import ModelType
from torch import Tensor

from ...vsr_ops.checkpoints.keymap import UNET, VAE
from ...vsr_ops.errors import SettingError
from ...vsr_ops.pipeline.defaults import DEFAULTS
from ...vsr_ops.sampling.tiling import TileSize
from .device import make_patcher

#: What a loader's list shows while its folder is empty.
NO_FILE = "no file found"


def load_lite(path: Path, vae_path: Path) -> tuple[Any, Any]:
    """Bundled weights as the host's own MODEL and VAE: its memory management, precision and LoRA apply. `path` holds an
    SVD, or a Stable Diffusion, whose VAE is that of the SVD in `vae_path`. Raises SettingError for a missing file."""
    weights, config = _read(path)
    model = _model(path, weights, config)
    return model, _lite_vae(*((weights, config) if "vae" in config else _read(vae_path)))


def lite_model(path: Path, disable_dynamic: bool = False) -> Any:
    """The bundled MODEL alone. The host calls this itself where it wants a second one, of other devices or for
    torch.compile, and may ask for one without dynamic VRAM."""
    return _model(path, *_read(path), disable_dynamic)


def _model(path: Path, weights: Mapping[str, Tensor], config: dict[str, Any], disable_dynamic: bool = False) -> Any:
    build = svd if "vae" in config else _stable_diffusion
    model = placed(*build(config), lambda unet, _: unet.load_state_dict(_below(weights, UNET)), disable_dynamic)
    model.set_attachments("vsr_tile", TileSize(*config["tile"]))
    model.set_attachments("vsr_defaults", DEFAULTS["svd_lite" if "vae" in config else "sd_lite"])
    model.cached_patcher_init = (lite_model, (path,))
    return model


def lite_vae(path: Path) -> Any:
    """The host's VAE of an SVD in a file of the pack."""
    return _lite_vae(*_read(path))


def _lite_vae(weights: Mapping[str, Tensor], config: dict[str, Any]) -> Any:
    vae = _build_vae(weights, config["vae"])
    vae.patcher.set_attachments("vsr_tile", TileSize(*config["tile"]))
    return vae


def _read(path: Path) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise SettingError(
            f"{path.stem}: {path} is missing: expected it in the pack's folder; install the pack again, or choose"
            " another in which"
        )
    weights, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    return weights, json.loads(metadata["vsr.config"])


#: A model's configuration, and what makes it of that on a device.
Architecture = tuple[Any, Callable[[Any], Any]]


def placed(
    kind: Any,
    make: Callable[[Any], Any],
    fill: Callable[[Any, torch.dtype], object],
    disable_dynamic: bool,
    parameters: int = 0,
) -> Any:
    """The host's MODEL of a configuration, in the precision and on the device that the host chooses for a UNet of so
    many parameters; `fill` puts the weights into it, in that precision."""
    manage = comfy.model_management
    device, offload = manage.get_torch_device(), manage.unet_offload_device()
    dtype = manage.unet_dtype(model_params=parameters, supported_dtypes=kind.supported_inference_dtypes)
    kind.set_inference_dtype(dtype, manage.unet_manual_cast(dtype, device, kind.supported_inference_dtypes))
    base = make(offload)
    fill(base.diffusion_model, dtype)
    return make_patcher(base, device, offload, disable_dynamic)


def _below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _levels(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the host's UNet is told of diffusers' levels."""
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    each = [layers] * len(widths) if isinstance(layers, int) else list(layers)
    depths = [int("CrossAttn" in name) for name in config["down_block_types"]]
    return {
        "image_size": 32,
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "num_res_blocks": each,
        "transformer_depth": [depth for depth, count in zip(depths, each, strict=True) for _ in range(count)],
        "transformer_depth_output": [
            depth for depth, count in zip(depths, each, strict=True) for _ in range(count + 1)
        ],
        "transformer_depth_middle": 1,
        "context_dim": config["cross_attention_dim"],
        "legacy": False,
        "use_spatial_transformer": True,
    }


def svd(stored: Mapping[str, Any]) -> Architecture:
    """The host's SVD of the configuration that stands as "unet" in a file of the pack."""
    config = stored["unet"]
    kind = comfy.supported_models.SVD_img2vid(
        {
            **_levels(config),
            "num_classes": "sequential",
            "adm_in_channels": config["projection_class_embeddings_input_dim"],
            "use_linear_in_transformer": True,
            "use_temporal_attention": True,
            "use_temporal_resblock": True,
            "use_spatial_context": True,
            "extra_ff_mix_layer": True,
            "merge_strategy": "learned_with_images",
            "merge_factor": 0.0,
            "video_kernel_size": [3, 1, 1],
        }
    )
    kind.unet_config["num_head_channels"] = config["block_out_channels"][0] // config["num_attention_heads"][0]

    def make(device: Any) -> Any:
        base = kind.get_model({}, device=device)
        base.embedder = Timestep(config["addition_time_embed_dim"])
        return base

    return kind, make


#: The host's names of what a Stable Diffusion predicts.
PREDICTIONS = {"v_prediction": ModelType.V_PREDICTION, "epsilon": ModelType.EPS}


def _stable_diffusion(stored: Mapping[str, Any]) -> Architecture:
    config = stored["unet"]
    widths = config["block_out_channels"]
    # diffusers calls the number of heads so, for all levels or each
    heads = config.get("attention_head_dim", 8)
    each = heads if isinstance(heads, list) else [heads] * len(widths)
    sizes = {width // count for width, count in zip(widths, each, strict=True)}
    if len(set(each)) > 1 and len(sizes) > 1:
        raise SettingError(f"attention_head_dim is {heads}: expected heads of one number or one width; get it again")
    sd = comfy.supported_models.SD20(
        {
            **_levels(config),
            "adm_in_channels": None,
            "use_linear_in_transformer": config.get("use_linear_projection", False),
            "use_temporal_attention": False,
        }
    )
    sd.unet_config |= (
        {"num_heads": each[0], "num_head_channels": -1}
        if len(set(each)) == 1
        else {"num_heads": -1, "num_head_channels": sizes.pop()}
    )
    predicts = PREDICTIONS[stored["prediction"]]
    return sd, lambda device: comfy.model_base.BaseModel(sd, model_type=predicts, device=device)


def _build_vae(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> Any:
    widths = config["block_out_channels"]
    encoder: dict[str, Any] = {
        "double_z": True,
        "z_channels": config["latent_channels"],
        "resolution": 256,
        "in_channels": config["in_channels"],
        "out_ch": config["out_channels"],
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    decoder = {**encoder, "video_kernel_size": [3, 1, 1], "alpha": 0.0}
    ldm = "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"
    engine = AutoencodingEngine(
        regularizer_config={"target": ldm},
        encoder_config={"target": "comfy.ldm.modules.diffusionmodules.model.Encoder", "params": encoder},
        decoder_config={"target": "comfy.ldm.modules.temporal_ae.VideoDecoder", "params": decoder},
    )
    engine.load_state_dict(_below(weights, VAE))
    # The host's VAE knows the published widths alone: it is made with a picture VAE of these, which then makes way.
    stand_in = {"ddconfig": {**encoder, "ch": 32, "ch_mult": [1]}, "embed_dim": config["latent_channels"]}
    vae = comfy.sd.VAE(sd=AutoencoderKL(**stand_in).state_dict(), config={"params": stand_in})
    vae.first_stage_model = engine.eval().to(vae.vae_dtype)
    vae.patcher = make_patcher(engine, vae.device, comfy.model_management.vae_offload_device())
    return vae


def weights_files(
    folder: str, suffixes: tuple[str, ...] = (".safetensors",), bundled: tuple[str, ...] = ("lite",)
) -> list[str]:
    """What a loader offers: what is bundled, and the files of these kinds in a folder of the host's models. Where there
    is nothing, `NO_FILE` alone, since the host cannot say what an empty list lacks."""
    # The pack's own folders are new to the host; saying it again changes nothing, and artists may have named others.
    folder_paths.add_model_folder_path(folder, str(Path(folder_paths.models_dir) / folder))
    found = [*bundled, *(name for name in folder_paths.get_filename_list(folder) if name.endswith(suffixes))]
    return found or [NO_FILE]


def weights_file(
    folder: str, which: str, suffixes: tuple[str, ...] = (".safetensors",), bundled: tuple[str, ...] = ("lite",)
) -> str:
    """The path of a file that `weights_files` offers; what is bundled itself. Raises SettingError for any other."""
    known = weights_files(folder, suffixes, bundled)
    if known == [NO_FILE]:
        raise SettingError(
            f"which is {which!r}, and models/{folder} holds no file of this kind: expected one ending in"
            f" {', '.join(suffixes)}; put it there and refresh"
        )
    if which not in known:
        raise SettingError(
            f"which is {which!r}: expected one of {', '.join(known)}; choose one from the list, or put the file into"
            f" models/{folder} and refresh"
        )
    return which if which in bundled else folder_paths.get_full_path_or_raise(folder, which)
