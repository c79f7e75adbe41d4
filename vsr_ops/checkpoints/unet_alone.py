"""An SVD's UNet alone in diffusers' layout, as DC-VSR's was published: listed, found, checked, read.

It lies in a folder with `config.json` and one safetensors file, or shards with an index; `save_pretrained` writes it
so. The file or the index may be named itself, its `config.json` beside it, and so may the folder above, where it holds
one such folder. A file without `config.json` has its configuration read off its tensors, where heads are 64 wide, as
SVD's are. The VAE and the image encoder are those of an SVD beside it.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import CheckpointError
from .diffusers_folder import config_kwargs, folder_config, named_tensors, shards, weight_files
from .safefile import PICKLE, PICKLE_SUFFIXES, Shapes, Source, first_line, json_object, open_safely
from .svd_parts import UNET_PART, infer_unet_alone

CONFIG = "config.json"
#: Channels that the UNet takes, the noisy latent's and the LR video's, and gives.
CHANNELS = (8, 4)
#: What the UNet and the SVD beside it must agree on, and what it is called.
_MUST_AGREE = {"block_out_channels": "widths", "cross_attention_dim": "cross-attention"}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_ADVICE = "give the folder of an SVD's UNet (config.json and diffusion_pytorch_model.safetensors), or that file"
_SUFFIX = ".safetensors"
_INDEX = re.compile(r"\.safetensors\.index(\.fp16)?\.json$")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
_FIRST = "down_blocks.0.resnets.0.spatial_res_block.conv1.weight"
# What else a file without SVD's blocks looks like, by a pattern over its names; the first that fits is named.
_OTHERS = {
    r"\.lora_|^lora_|\.hada_w": "a LoRA",
    r"^model\.diffusion_model\.": "a whole checkpoint under original names",
    r"\.motion_modules\.": "an AnimateDiff UNet or motion module",
    r"^controlnet_": "a ControlNet",
    r"^down_blocks\.\d+\.resnets\.\d+\.conv1\.": "an image UNet (UNet2DConditionModel)",
    r"^input_blocks\.": "a UNet under original names",
    r"^(encoder|decoder)\.conv_in\.": "a VAE",
    r"^(double_blocks|joint_blocks|transformer_blocks|blocks)\.": "a transformer",
}


@dataclass(frozen=True)
class UNetPlace:
    """Where a UNet alone lies: its folder or file, its configuration's file (None: there is none), its tensors'."""

    path: Path
    config: Path | None
    weights: tuple[Path, ...]

    def files(self) -> list[Path]:
        """Every file that is read."""
        return [self.path, *self.weights, *([] if self.config is None else [self.config])]


@dataclass(frozen=True)
class OpenUNet:
    """A UNet alone, opened and checked: `config` holds diffusers' keyword arguments, whole, `names` the original names
    (with their prefix) to diffusers'."""

    path: Path
    config: dict[str, Any]
    names: Mapping[str, str]
    owners: Mapping[str, Source]
    shapes: Shapes

    def read(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Its tensors under diffusers' names, on the CPU as `dtype`. Raises CheckpointError as `tensor` does."""
        return {name: self.tensor(name, dtype) for name in self.shapes}

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        """One tensor, in memory of its own. Raises CheckpointError for one that is not finite, or quantised."""
        source = self.owners[name]
        stored = source.get(name).dtype
        if stored not in DTYPES:
            known = ", ".join(str(each) for each in DTYPES)
            raise CheckpointError(
                f"{source.path}: {name} is {stored}, expected {known}; use a file that is not quantised"
            )
        return source.tensor(name, dtype).reshape(self.shapes[name])

    def refuse_beside(self, svd: Path, configs: Mapping[str, Mapping[str, Any]]) -> None:
        """Raises CheckpointError where the SVD at `svd`, whose models have these configurations, is not one that the
        UNet can have come from: another width of levels or of cross-attention."""
        theirs = configs.get("unet", {})
        own = {key: _levels(self.config, key) for key in _MUST_AGREE}
        its = {key: _levels(theirs, key) for key in _MUST_AGREE if key in theirs}
        differ = [key for key in its if its[key] != own[key]]
        ours, other = (
            " and ".join(f"{_MUST_AGREE[key]} {_said(values[key])}" for key in differ) for values in (own, its)
        )
        clip, context = configs.get("image_encoder", {}).get("projection_dim"), own["cross_attention_dim"]
        if not differ and clip is not None and {clip} != set(context):
            ours, other = f"cross-attention {_said(context)}", f"an image encoder that gives {clip}"
        if ours:
            raise CheckpointError(
                f"{self.path}: a UNet of {ours}, {svd} has {other}, expected equal ones; give the SVD that the UNet was"
                " tuned from"
            )


def _levels(config: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """A setting of each level; one number may stand for all."""
    value = config[key]
    if isinstance(value, int):
        return (value,) * len(config["block_out_channels"])
    return tuple(cast("list[int]", value))


def _said(levels: tuple[int, ...]) -> str:
    return "-".join(str(each) for each in (levels[:1] if len(set(levels)) == 1 else levels))


def find_unet(path: Path) -> UNetPlace:
    """Where the UNet alone is that `path` names. Raises CheckpointError where there is none, or more than one."""
    path = Path(path)
    try:
        if path.is_dir():
            folder = path if (path / CONFIG).is_file() else _only_folder(path)
            return UNetPlace(folder, folder / CONFIG, tuple(_present(folder, weight_files(folder, _stem(folder)))))
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file or folder, expected a UNet; {_ADVICE}")
        return _place_of_file(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({first_line(error)}), expected a UNet; {_ADVICE}") from error


def _place_of_file(path: Path) -> UNetPlace:
    config = path.parent / CONFIG
    weights = [path]
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise CheckpointError(f"{path}: {PICKLE}")
    if path.suffix == ".json":
        if not _INDEX.search(path.name):
            raise CheckpointError(f"{path}: expected the index of shards (….safetensors.index.json); {_ADVICE}")
        weights = _present(path, shards(path))
    elif _SHARD.search(path.name):
        raise CheckpointError(f"{path}: one shard of several, expected all of them; give their folder, or the index")
    return UNetPlace(path, config if config.is_file() else None, tuple(weights))


def _only_folder(above: Path) -> Path:
    """The one folder in `above` with an SVD's UNet."""
    classes: dict[Path, Any] = {}
    for folder in sorted(child for child in above.iterdir() if (child / CONFIG).is_file()):
        text = (folder / CONFIG).read_text(encoding="utf-8", errors="replace")
        classes[folder] = (json_object(text) or {}).get("_class_name")
    fitting = [folder for folder, name in classes.items() if name == UNET_PART.class_name]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(folder.name for folder in fitting)
        raise CheckpointError(f"{above}: holds {len(fitting)} UNets ({names}), expected one; give the one to use")
    others = ", ".join(f"'{name}' in {folder.name}" for folder, name in classes.items()) or f"no {CONFIG}"
    raise CheckpointError(f"{above}: {others}, expected {CONFIG} of a '{UNET_PART.class_name}'; {_ADVICE}")


def _stem(folder: Path) -> str:
    """What the names of its weights begin with: diffusers' own, or whatever a single file or index is called."""
    names = _weights_listed(sorted(file.name for file in folder.iterdir()))
    if len(names) == 1:
        return _INDEX.sub("", names[0]).removesuffix(_SUFFIX)
    return UNET_PART.stem


def _weights_listed(names: list[str]) -> list[str]:
    """Of file names, the indices and the safetensors files that are no shards."""
    return [name for name in names if _INDEX.search(name) or (name.endswith(_SUFFIX) and not _SHARD.search(name))]


def _present(path: Path, files: list[Path]) -> list[Path]:
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of its {len(files)} files missing ({', '.join(missing[:3])}), expected all that"
            " the index names; copy or download them again"
        )
    return files


def list_unets(root: Path) -> list[str]:
    """What may be a UNet below a folder, by name from there: single files, indices of shards, and folders with a
    configuration and one set of weights, whose files are not named again. Nothing is opened, so that a damaged file
    hides no other; hidden folders are passed over, and what cannot be listed."""
    found, seen = list[str](), set[str]()
    for here, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:  # links in a circle
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = Path(here).relative_to(root)
        weights = _weights_listed(sorted(files))
        whole = len(weights) == 1 or any(name.startswith(UNET_PART.stem + ".") for name in weights)
        if CONFIG in files and whole and below.parts:
            found.append(below.as_posix())
        else:
            found += [(below / name).as_posix() for name in weights]
    return sorted(found)


@contextlib.contextmanager
def open_unet(path: Path) -> Generator[OpenUNet, None, None]:
    """Opens the UNet alone that `path` names: its configuration and every tensor's name and shape are checked, none is
    read. Raises CheckpointError for what is missing, unsafe, damaged, of another kind, or does not fit its own
    configuration."""
    place = find_unet(path)
    with contextlib.ExitStack() as stack:
        sources = [stack.enter_context(open_safely(file)) for file in place.weights]
        shapes = {key: shape for source in sources for key, shape in source.shapes.items()}
        kwargs = _config(place, shapes)
        _refuse_other_models(place.path, shapes)
        state, names, whole = UNET_PART.whole_plan(place.config or place.path, kwargs)
        config = config_kwargs(whole)
        channels = (config["in_channels"], config["out_channels"])
        if channels != CHANNELS:
            raise CheckpointError(
                f"{place.path}: a UNet that takes {channels[0]} channels and gives {channels[1]}, expected"
                f" {CHANNELS[0]} (noisy and LR latent) and {CHANNELS[1]}; give an image-to-video SVD's"
            )
        owners = named_tensors(sources, UNET_PART, state, place.path)
        yield OpenUNet(place.path, config, names, owners, {key: tuple(t.shape) for key, t in state.items()})


def _config(place: UNetPlace, shapes: Shapes) -> dict[str, Any]:
    if place.config is not None:
        try:
            return folder_config(place.config.parent, UNET_PART, _ADVICE)
        except OSError as error:
            what = f"{place.config}: cannot be read ({first_line(error)})"
            raise CheckpointError(f"{what}, expected the configuration of a UNet; check its permissions") from error
    _refuse_other_models(place.path, shapes)
    try:
        return infer_unet_alone(shapes)
    except KeyError as error:
        reason = f"no tensor {error.args[0]}"
    except (ValueError, IndexError) as error:
        reason = str(error)
    what = f"{place.path}: no config.json beside it, and none to be read off its tensors ({reason})"
    raise CheckpointError(f"{what}; expected the {CONFIG} that it was published with, put it there")


def _refuse_other_models(path: Path, shapes: Shapes) -> None:
    if _FIRST in shapes:
        return
    fits: Iterator[str] = (what for pattern, what in _OTHERS.items() if any(re.search(pattern, key) for key in shapes))
    first = min(shapes, default="nothing")
    what = next(fits, f"no known model, its {len(shapes)} tensors begin with {first}")
    raise CheckpointError(f"{path}: looks like {what}, expected an SVD's UNet under diffusers' names; {_ADVICE}")
