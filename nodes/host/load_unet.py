"""A UNet alone in diffusers' layout, as DC-VSR's was published, as the host's MODEL; VAE and CLIP vision of an SVD."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import comfy.sd
import folder_paths
import torch

from ...vsr_ops.checkpoints.keymap import UNET
from ...vsr_ops.checkpoints.safefile import UPSCALER_KEY
from ...vsr_ops.checkpoints.svd import LITE, svd_configs
from ...vsr_ops.checkpoints.unet_alone import OpenUNet, list_unets, open_unet
from ...vsr_ops.errors import CheckpointError, SettingError
from ...vsr_ops.pipeline.defaults import DEFAULTS
from ...vsr_ops.sampling.tiling import TileSize
from .context import NoClipVision
from .load import NO_FILE, lite_vae, placed, svd


def unets(folders: Sequence[str]) -> dict[str, Path]:
    """The UNets alone that lie in folders of the host's models, by the name that a list shows: from their folder, and
    with that folder's name before it where another holds the same."""
    found: dict[str, Path] = {}
    for folder in folders:
        # The pack's own folder is new to the host; artists may have named others.
        folder_paths.add_model_folder_path(folder, str(Path(folder_paths.models_dir) / folder))
        for root in map(Path, folder_paths.get_folder_paths(folder)):
            for name in list_unets(root):
                names = itertools.chain([name, f"{folder}/{name}"], (f"{root.name}/{name} {n}" for n in range(2, 99)))
                found[next(each for each in names if each not in found)] = root / name
    return found


def unet_names(folders: Sequence[str]) -> list[str]:
    """What a loader offers of them; where there is nothing `NO_FILE` alone."""
    return list(unets(folders)) or [NO_FILE]


def load_unet(unet: str, folders: Sequence[str], checkpoint: Path | None) -> tuple[Any, Any, Any]:
    """The host's MODEL of a UNet that `unet_names` offers; VAE and CLIP vision of an SVD's single file, the bundled
    one's without. Raises SettingError for an unknown name, CheckpointError for files that cannot be used or do not fit
    each other."""
    known = unets(folders)
    if unet not in known:
        places = " or ".join(f"models/{folder}" for folder in folders)
        listed = ", ".join(known) or "none, there is none yet"
        raise SettingError(
            f"unet is {unet!r}: expected one of {listed}; choose one, or put the folder with config.json and its"
            f" .safetensors into {places} and refresh"
        )
    file = checkpoint or LITE
    configs, metadata = svd_configs(file)
    with open_unet(known[unet]) as opened:
        opened.refuse_beside(file, configs)
        own = "vsr.config" in metadata
        vae, vision = (lite_vae(file), None) if own else _published(file, "image_encoder" in configs)
        tile = vae.patcher.get_attachment("vsr_tile") if own else None
        model = _model(opened, tile, False)
    model.cached_patcher_init = (unet_model, (known[unet], tile))
    return model, vae, NoClipVision(file.stem) if vision is None else vision


def unet_model(path: Path, tile: TileSize | None, disable_dynamic: bool = False) -> Any:
    """The MODEL alone, as the host asks for a second one."""
    with open_unet(path) as opened:
        return _model(opened, tile, disable_dynamic)


def _model(opened: OpenUNet, tile: TileSize | None, disable_dynamic: bool) -> Any:
    kind, make = svd({"unet": host_config(opened.path, opened.config)})
    count = sum(math.prod(shape) for shape in opened.shapes.values())
    model = placed(kind, make, lambda unet, dtype: fill(unet, opened, dtype), disable_dynamic, count)
    if tile is not None:
        model.set_attachments("vsr_tile", tile)
    trained_on = next((source.metadata.get(UPSCALER_KEY) for source in opened.owners.values()), None)
    model.set_attachments("vsr_defaults", DEFAULTS["dc_vsr"].stored(trained_on))
    return model


def fill(unet: torch.nn.Module, opened: OpenUNet, dtype: torch.dtype) -> None:
    """Puts the tensors into the host's UNet layer by layer, so that there is never a second copy of them. Raises
    CheckpointError for a layer that the host's UNet has not."""
    layers: dict[str, dict[str, str]] = {}
    for original, name in opened.names.items():
        layer, _, parameter = original.removeprefix(UNET).rpartition(".")
        layers.setdefault(layer, {})[parameter] = name
    there = dict(unet.named_modules())
    strange = sorted(layers.keys() - there.keys())
    strange += sorted(name for name in there.keys() - layers.keys() if any(True for _ in _own(there[name])))
    if strange:
        raise CheckpointError(
            f"{opened.path}: {len(strange)} layers ({', '.join(strange[:3])}) are not those of ComfyUI's SVD of this"
            " configuration, expected equal ones; use the UNet of an unmodified SVD"
        )
    for layer, names in layers.items():
        there[layer].load_state_dict({each: opened.tensor(name, dtype) for each, name in names.items()})


def _own(module: torch.nn.Module) -> Any:
    return module.parameters(recurse=False)


def host_config(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' configuration as `svd` takes it. Raises CheckpointError for one that the host's SVD cannot have: heads
    of several widths, or more than one transformer in a block."""
    widths = list(config["block_out_channels"])
    levels = len(widths)

    def each(name: str) -> list[int]:
        value = config[name]
        return [value] * levels if isinstance(value, int) else list(value)

    heads, context = each("num_attention_heads"), each("cross_attention_dim")
    one = {
        "heads of one width": {width / count for width, count in zip(widths, heads, strict=True)},
        "cross-attention of one width": set(context),
        "one transformer in a block": {1, *each("transformer_layers_per_block")},
    }
    wrong = [f"{sorted(found)}: expected {what}" for what, found in one.items() if len(found) > 1]
    if wrong:
        raise CheckpointError(f"{path}: its configuration has {wrong[0]}, as ComfyUI's SVD does; use the command line")
    return {**config, "num_attention_heads": heads, "cross_attention_dim": context[0]}


def _published(path: Path, has_encoder: bool) -> tuple[Any, Any]:
    """VAE and CLIP vision of an SVD as published, by the host's own loader. Raises CheckpointError for sizes that the
    host does not know."""
    try:
        found = comfy.sd.load_checkpoint_guess_config(
            str(path), output_vae=True, output_clip=False, output_clipvision=has_encoder, output_model=False
        )
    except RuntimeError:  # what it does not recognise at all
        found = None
    # What it takes for a UNet alone comes back as a MODEL, though none was asked for.
    if found is None or found[0] is not None:
        raise CheckpointError(
            f"{path}: ComfyUI knows no SVD of its sizes, expected svd.safetensors or svd_xt.safetensors; choose one"
        )
    return found[2], found[3]
