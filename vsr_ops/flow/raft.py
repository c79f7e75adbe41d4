"""RAFT (Teed and Deng, ECCV 2020), the papers' optical flow, by torchvision and from a file of its weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoints.module_file import fill
from ..checkpoints.safefile import PICKLE_SUFFIXES, first_line, open_safely, read_pickle
from ..errors import CheckpointError, SettingError
from ..system.memory import ran_out

SMALLEST = 128
"""Fewest pixels a side that RAFT's pyramid can work on."""

CLASSES = {"raft_large": "Raft_Large_Weights", "raft_small": "Raft_Small_Weights"}
"""torchvision's functions that make one, and its own names of their weights."""

Estimator = Callable[[Tensor, Tensor], Tensor]
"""Flow (k, 2, h, w) in pixels from each of k frames (k, 3, h, w) to the one of the second clip, on their device."""


def load_raft(file: Path, device: torch.device, name: str | None = None) -> Estimator:
    """RAFT in float32 on `device`, of torchvision's file (.pth) or the same tensors as .safetensors; `name` is that of
    one of CLASSES, by default the one that the tensors are of.

    Only tensors are ever read. Raises CheckpointError for weights that are not there or not that RAFT's, SettingError
    without torchvision.
    """
    library = _library(name or "raft")
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; expected {' or '.join(files())}, torchvision's own")
    state, found = _read(file, name), name
    if found is None:
        # Only the large one learns how to enlarge its flow.
        found = "raft_large" if any(key.startswith("mask_predictor.") for key in state) else "raft_small"
    model: torch.nn.Module = getattr(library, found)(weights=None, progress=False)
    try:
        fill(file, model, found, state)
    except CheckpointError as error:
        raise _refused(file, found, error) from error
    return _estimator(model.to(device).eval().requires_grad_(False), found, device)


def files() -> list[str]:
    """The names of torchvision's files. Raises SettingError without torchvision."""
    return [url_of(name).rsplit("/", 1)[-1] for name in CLASSES]


def url_of(name: str) -> str:
    """Where torchvision has the weights of one of CLASSES. Raises SettingError without torchvision."""
    return str(getattr(_library(name), CLASSES[name]).DEFAULT.url)


def fetched(name: str, folder: Path | None) -> Path:
    """The file of torchvision's weights of one of CLASSES: in `folder`, in torch.hub's, or downloaded into the latter.
    Raises CheckpointError where it is in neither and cannot be had."""
    url, hub = url_of(name), Path(torch.hub.get_dir()) / "checkpoints"
    file = url.rsplit("/", 1)[-1]
    for place in (folder, hub):
        if place is not None and (place / file).is_file():
            return place / file
    check = re.search(r"-([0-9a-f]+)[.]", file)
    try:
        hub.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(hub / file), check.group(1) if check else None, progress=False)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{name}'s weights are not there and could not be downloaded ({first_line(error)}): expected {file} in"
            f" {folder or hub}; put the file from {url} there, or choose the estimator dis"
        ) from error
    return hub / file


def memory(height: int, width: int) -> float:
    """Bytes that RAFT takes for a pair of frames, about: every cell of 8 pixels is compared with every other, on four
    levels, beside its features."""
    return 4 * 4 / 3 * (height * width / 64) ** 2 + 2000 * height * width


def _library(name: str) -> Any:
    try:
        from torchvision.models import optical_flow  # pyright: ignore[reportMissingTypeStubs]
    except ImportError as error:
        raise SettingError(
            f"{name} needs torchvision ({first_line(error)}): expected the one that fits this torch; install it, or"
            " choose the estimator dis"
        ) from error
    return optical_flow


def _read(file: Path, name: str | None) -> dict[str, Tensor]:
    """The tensors of a file, floating ones in float32. Raises CheckpointError."""
    try:
        if file.suffix.lower() in PICKLE_SUFFIXES:
            return read_pickle(file, re.compile(""))
        with open_safely(file) as source:
            stored = {key: source.get(key) for key in source.shapes}
            # Batch norms count their batches in whole numbers.
            whole = {key: value for key, value in stored.items() if not value.is_floating_point()}
            return whole | {key: source.tensor(key, torch.float32) for key in stored.keys() - whole.keys()}
    except CheckpointError as error:
        raise _refused(file, name or "RAFT", error) from error


def _refused(file: Path, name: str, error: Exception) -> CheckpointError:
    urls = " or ".join(url_of(known) for known in CLASSES if name in (known, "RAFT"))
    why = first_line(error).removeprefix(f"{file}: ")
    return CheckpointError(
        f"{file}: cannot be read as {name}'s weights ({why}); expected torchvision's own file, get it again from {urls}"
    )


def _estimator(model: torch.nn.Module, name: str, device: torch.device) -> Estimator:
    """One pair at a time: RAFT's memory grows with the area squared."""

    @torch.no_grad()
    def estimate(first: Tensor, second: Tensor) -> Tensor:
        pairs = ((a[None].to(device), b[None].to(device)) for a, b in zip(first, second, strict=True))
        return torch.cat([_pair(model, name, a, b).to(first.device) for a, b in pairs])

    return estimate


def _pair(model: torch.nn.Module, name: str, first: Tensor, second: Tensor) -> Tensor:
    """Flow (1, 2, h, w) of a pair (1, 3, h, w); sides grow to multiples of 8 at the bottom and right, by their edge."""
    height, width = first.shape[-2:]
    if min(height, width) < SMALLEST:
        raise SettingError(
            f"{name} got frames of {width}x{height} pixels: expected at least {SMALLEST} a side; estimate the flow"
            " on the enlarged video, or choose the estimator dis"
        )
    grow = (0, -width % 8, 0, -height % 8)
    scaled = [F.pad(x.float(), grow, mode="replicate") * 2 - 1 for x in (first, second)]
    try:
        return model(*scaled)[-1][..., :height, :width]
    except Exception as error:
        if not ran_out(error):
            raise
        raise SettingError(
            f"{name} ran out of memory on frames of {width}x{height} pixels: expected about"
            f" {memory(height, width) / 2**30:.0f} GiB to be free; choose the estimator dis"
        ) from error
