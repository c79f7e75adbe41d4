"""Safetensors files, opened with suspicion and written whole: the floor under this pack's weights.

Pickles are refused, but for what was published as nothing else: of those, tensors alone are read.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor

from ..errors import CheckpointError
from ..system.outputs import whole

Shapes = Mapping[str, tuple[int, ...]]

PICKLE_SUFFIXES = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}
PICKLE = "a pickle, which can run code, expected safetensors; use the .safetensors file of the same model"
#: Where a file says which upscaler's pictures its model was trained on: "bicubic", "dcm" (the bundled DCM), or the
#: name of a file.
UPSCALER_KEY = "vsr.upscaler"
#: What trainers leave in their pickles beside the weights; nothing stands in for it.
_LEFT_BEHIND = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "_codecs.encode",
)
# What reading a pickle raises for one that would run something, and for a damaged one.
_UNREADABLE = (
    *(pickle.UnpicklingError, RuntimeError, OSError, EOFError),
    *(ValueError, KeyError, IndexError, TypeError, AttributeError),
)
# First bytes that people meet under a .safetensors name.
_CONTENT = {
    b"version https://git-lfs": "a git-lfs pointer",
    b"GGUF": "a GGUF file",
    b"<": "a web page",
}


@dataclass(frozen=True)
class Source:
    """One open safetensors file: its metadata, the shape of each tensor, and a way to read one."""

    path: Path
    metadata: dict[str, str]
    shapes: Shapes
    get: Callable[[str], Tensor]

    def tensor(self, key: str, dtype: torch.dtype) -> Tensor:
        """One tensor as `dtype`, in memory of its own. Raises CheckpointError unless all of it is finite."""
        stored = self.get(key)
        if not stored.is_floating_point():
            what = f"{self.path}: {key} is {stored.dtype}, expected floating point"
            raise CheckpointError(f"{what}; use a file that is not quantised")
        tensor = stored.to(dtype, copy=True)
        refuse_not_finite(self.path, key, tensor, stored)
        return tensor


@contextlib.contextmanager
def open_safely(path: Path) -> Generator[Source, None, None]:
    """Opens a safetensors file on the CPU, mapped rather than read.

    Raises CheckpointError for a file that cannot be opened, is a pickle by suffix or content, or is damaged.
    """
    refuse_foreign_content(path)
    try:
        opening: Any = safetensors.safe_open(path, framework="pt", device="cpu")
    except (safetensors.SafetensorError, OSError) as error:
        what = f"{path}: truncated or damaged, safetensors cannot read its {path.stat().st_size} bytes"
        advice = "expected a whole .safetensors file, copy or download it again"
        raise CheckpointError(f"{what} ({first_line(error)}); {advice}") from error
    with opening as opened:
        keys: list[str] = list(opened.keys())
        shapes: Shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in keys}
        yield Source(path, dict(opened.metadata() or {}), shapes, opened.get_tensor)


def stored(path: Path, key: str) -> str | None:
    """What a safetensors file's metadata says under `key`; None for other files, and where there is none: whoever loads
    it says what is wrong."""
    try:
        with open_safely(path) as source:
            return source.metadata.get(key)
    except CheckpointError:
        return None


class _Nothing:
    """Takes whatever a pickle gives it and keeps none of it."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


def _stand_ins() -> list[Any]:
    """A class of nothing under each name that may be left behind."""
    named = (name.rpartition(".") for name in _LEFT_BEHIND)
    return [type(name, (_Nothing,), {"__module__": module}) for module, _, name in named]


def read_pickle(path: Path, wanted: re.Pattern[str], under: Sequence[str] = ("state_dict",)) -> dict[str, Tensor]:
    """Those tensors of a pickled state dict on the CPU in whose keys `wanted` is found; floating ones in float32.

    The state dict may be the file's whole content, or stand there `under` a name: the first of these that there is. It
    is read with weights_only=True, always: nothing in it can run. Raises CheckpointError for a file that would need to
    run something, is damaged, holds no state dict, or whose wanted tensors are not finite.
    """
    tensors: dict[str, Tensor] = {}
    for key, value in _unpickled(path, under).items():
        if wanted.search(key):
            tensors[key] = value.float() if value.is_floating_point() else value
            refuse_not_finite(path, key, tensors[key], value)
    return tensors


@contextlib.contextmanager
def open_pickled(path: Path, under: Sequence[str] = ("state_dict",)) -> Generator[Source, None, None]:
    """A pickled state dict opened as `open_safely` opens a safetensors file, mapped where its format can be.

    It is read with weights_only=True, always: nothing in it can run. Raises CheckpointError for a file that would need
    to run something, is damaged, or holds no state dict.
    """
    # What older PyTorch wrote is no zip archive, and cannot be mapped.
    tensors = _unpickled(path, under, mapped=zipfile.is_zipfile(path))
    yield Source(path, {}, {key: tuple(value.shape) for key, value in tensors.items()}, tensors.__getitem__)


def open_weights(path: Path) -> contextlib.AbstractContextManager[Source]:
    """A safetensors file or, by its suffix, a pickle of tensors alone. Raises CheckpointError as the two do."""
    return open_pickled(path) if path.suffix.lower() in PICKLE_SUFFIXES else open_safely(path)


def _unpickled(path: Path, under: Sequence[str], mapped: bool = False) -> dict[str, Tensor]:
    try:
        with torch.serialization.safe_globals(_stand_ins()):
            stored: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except _UNREADABLE as error:
        what = f"{path}: not a pickle of tensors alone: {first_line(error)}"
        raise CheckpointError(f"{what}; expected a state dict, get the file again, or as .safetensors") from error
    if isinstance(stored, dict):
        names = cast("dict[str, Any]", stored)
        stored = next((names[name] for name in under if name in names), names)
    if not isinstance(stored, dict):
        what = f"{path}: a pickled {type(stored).__name__}, expected a state dict"
        raise CheckpointError(f"{what}; give the file of the module")
    found = cast("dict[Any, Any]", stored)
    return {key: value for key, value in found.items() if isinstance(key, str) and isinstance(value, Tensor)}


def write_whole(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes beside `path` and renames when whole, over what is there: what may be replaced is the caller's to ask.

    Raises CheckpointError if that cannot be done.
    """
    try:
        with whole(path, overwrite=True) as part:
            cast("Any", safetensors.torch).save_file(tensors, part, metadata=metadata)
    except (safetensors.SafetensorError, OSError) as error:
        what = f"{path}: cannot be written ({first_line(error)})"
        raise CheckpointError(f"{what}; expected an existing folder with room and write permission") from error


def refuse_foreign_content(path: Path) -> None:
    """Raises CheckpointError for what its suffix or first bytes show to be no safetensors, before parsing."""
    try:
        with path.open("rb") as file:
            head = file.read(32)
    except OSError as error:
        what = f"{path}: cannot be opened ({first_line(error)})"
        raise CheckpointError(f"{what}, expected a readable .safetensors file; check the path") from error
    # A safetensors file is a length in 8 bytes, then JSON; that length may begin like a pickle.
    pickled = head[8:9] != b"{" and re.match(rb"PK\x03\x04|\x80[\x02-\x05]", head)
    if path.suffix.lower() in PICKLE_SUFFIXES or pickled:
        raise CheckpointError(f"{path}: {PICKLE}")
    for magic, what in _CONTENT.items():
        if head.startswith(magic) and head[8:9] != b"{":
            raise CheckpointError(f"{path}: {what}, expected the .safetensors file itself; download that")


def refuse_not_finite(path: Path, key: str, tensor: Tensor, source: Tensor) -> None:
    """Raises CheckpointError if `tensor`, made from `source` by a change of dtype, holds NaN or infinity."""
    if torch.isfinite(tensor).all():
        return
    count = int((~torch.isfinite(source.to(torch.float64))).sum())
    what = f"{count} values of NaN or infinity" if count else f"values too large for {tensor.dtype}"
    advice = "use an undamaged file" if count else "choose a wider dtype"
    raise CheckpointError(f"{path}: {key} holds {what}, expected finite numbers; {advice}")


def refuse_differences(path: Path, name: str, expected: Shapes, found: Shapes) -> None:
    """Raises CheckpointError for tensors missing, unexpected or of another shape: counts and first names.

    A matrix may stand for a 1x1 convolution.
    """
    wrong = {
        f"{key} {found[key]} for {shape}"
        for key, shape in expected.items()
        if key in found and shape not in (found[key], (*found[key], 1, 1))
    }
    problems = [
        f"{len(keys)} {what} ({', '.join(sorted(keys)[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in (
            ("missing", expected.keys() - found.keys()),
            ("unexpected", found.keys() - expected.keys()),
            ("of the wrong shape", wrong),
        )
        if keys
    ]
    if problems:
        what = f"{path}: {name} tensors {', '.join(problems)}"
        raise CheckpointError(f"{what}; expected the {len(expected)} of its configuration, use an unmodified file")


def json_object(text: str) -> dict[str, Any] | None:
    """A JSON object, or None for anything else."""
    try:
        value: object = json.loads(text)
    except ValueError:
        return None
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


def first_line(error: Exception) -> str:
    """The first line of another library's message, for use inside one of ours."""
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
