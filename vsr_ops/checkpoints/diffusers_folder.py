"""A model in diffusers' folder: its configuration and the files of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from ..errors import CheckpointError
from .safefile import PICKLE, PICKLE_SUFFIXES, json_object
from .svd_parts import Part


def folder_config(folder: Path, part: Part, advice: str) -> dict[str, Any]:
    """The configuration of a model in its folder. Raises CheckpointError, ending with `advice`, for no such
    model."""
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file, expected in a diffusers folder of SVD; {advice}")
    config = json_object(file.read_text(encoding="utf-8", errors="replace"))
    if config is None:
        raise CheckpointError(f"{file}: not a JSON object, expected the configuration of a model; copy it again")
    name: Any = config.get("_class_name") or ", ".join(config.get("architectures") or [])
    if name != part.class_name:
        raise CheckpointError(f"{file}: a '{name}', expected a '{part.class_name}'; {advice}")
    return config_kwargs(config)


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors files of a model: full precision before fp16, one file before shards. Raises
    CheckpointError."""
    for single, index in (
        (f"{stem}.safetensors", f"{stem}.safetensors.index.json"),
        (f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.fp16.json"),
    ):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            content = json_object((folder / index).read_text(encoding="utf-8", errors="replace")) or {}
            names = {str(name) for name in cast("dict[str, Any]", content.get("weight_map") or {}).values()}
            if not names or any(Path(name).name != name for name in names):
                raise CheckpointError(f"{folder / index}: no usable weight_map, expected file names; copy it again")
            return [folder / name for name in sorted(names)]
    if pickles := sorted(f.name for f in folder.iterdir() if f.suffix in PICKLE_SUFFIXES):
        raise CheckpointError(f"{folder / pickles[0]}: {PICKLE}")
    raise CheckpointError(f"{folder}: no weights, expected {stem}.safetensors (or .fp16, or shards); copy it again")


def config_kwargs(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments out of a stored configuration: bookkeeping left out, lists as tuples."""
    bookkeeping = {"architectures", "model_type", "torch_dtype", "dtype", "transformers_version"}
    kept = {k: v for k, v in config.items() if not k.startswith("_") and k not in bookkeeping}
    return {k: tuple(cast("list[Any]", v)) if isinstance(v, list) else v for k, v in kept.items()}
