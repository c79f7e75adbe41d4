"""What lies in a run's folder: the checkpoint to go on from and the CSV of the loss."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vsr_ops.checkpoints.safefile import UPSCALER_KEY
from vsr_ops.errors import CheckpointError, SettingError, VSRError
from vsr_ops.system.outputs import whole

CHECKPOINT, WEIGHTS = "checkpoint.pt", "weights.safetensors"
REFINER = "weights_refiner.safetensors"
"""Beside the weights of a run that trains a refiner as well."""
DCM_WEIGHTS = "dcm.safetensors"
"""Beside those of a run that trains the DCM with a diffusion model."""
SD_WEIGHTS = "weights_sd.safetensors"
"""Beside the control of a run that fine-tunes the Stable Diffusion's decoder as well: the whole Stable Diffusion."""


class DiskError(VSRError):
    """A file of the run cannot be written; the last good checkpoint is still there."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint: `recipe` as `Recipe.flat` gives it, the task's `data_summary`, and tensors."""

    step: int
    recipe: dict[str, Any]
    data: str
    processes: int
    model: dict[str, Any]
    ema: dict[str, Any] | None
    optimizer: dict[str, Any]
    scaler: dict[str, Any] | None


@contextmanager
def writing(path: Path, kept: str) -> Iterator[None]:
    """Turns a failure to write `path` into one line that says what is `kept`. Raises DiskError."""
    try:
        yield
    # torch's writer raises RuntimeError where the system refuses a part of a file.
    except (OSError, RuntimeError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise DiskError(
            f"{path}: cannot be written, {free(path.parent)} ({why}); {kept}. Free some space and run the same command"
            " again"
        ) from error


def write_beside(path: Path, content: Mapping[str, Any], kept: str) -> None:
    """Writes with torch.save beside `path` and renames, so that a kill or a full disk leaves what is there.

    Raises DiskError.
    """
    with writing(path, kept), whole(path, overwrite=True) as part, part.open("wb") as file:
        torch.save(dict(content), file)


def save(folder: Path, saved: Saved) -> None:
    """Writes the checkpoint. Raises DiskError, and leaves the last good one."""
    path = folder / CHECKPOINT
    before = "the checkpoint before it is kept" if path.exists() else "there was no checkpoint yet"
    write_beside(path, vars(saved), f"step {saved.step} is not saved, {before}")


def load(folder: Path) -> Saved | None:
    """The checkpoint in `folder`, None where there is none. Raises CheckpointError when it is damaged."""
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        return Saved(**torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except (OSError, RuntimeError, TypeError, ValueError, EOFError, KeyError) as error:
        what = f"{path}: not a checkpoint of this trainer, or damaged ({str(error).splitlines()[0][:120]})"
        raise CheckpointError(f"{what}; give another --out, or remove the file to begin anew") from error


def weights_of(name: str | Path, kept_as: str = WEIGHTS) -> str:
    """The weights that the run in the folder `name` left; `name` itself where it is no run's folder."""
    file = Path(name) / kept_as
    return str(file) if file.is_file() else str(name)


def upscaler_note(setting: str) -> dict[str, str]:
    """What a model's file says of the upscaler that its recipe names: "bicubic", "dcm" for the bundled DCM, or the name
    of the DCM's file."""
    known = {"bicubic": "bicubic", "lite": "dcm"}
    return {UPSCALER_KEY: known.get(setting) or Path(weights_of(setting)).name}


def refuse_another(folder: Path, changed: Mapping[str, str]) -> None:
    """Raises SettingError when settings differ from those the run began with."""
    if changed:
        what = ", ".join(f"{key} ({values})" for key, values in changed.items())
        raise SettingError(
            f"{folder}: the run there began with another recipe: {what}; give that recipe, or another --out"
        )


def free(folder: Path) -> str:
    there = next((path for path in (folder, *folder.absolute().parents) if path.exists()), Path())
    return f"{shutil.disk_usage(there).free:,} bytes free"


class LossFile:
    """`loss.csv`: one row a step. Rows after the checkpoint that a run goes on from are dropped."""

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / "loss.csv"
        self._columns: list[str] | None = None
        if not self.path.exists():
            return
        with self.path.open(newline="") as file:
            rows = list(csv.reader(file))
        kept = [row for row in rows[1:] if len(row) == len(rows[0]) and row[0].isdigit() and int(row[0]) <= step]
        if not kept:
            self.path.unlink()
            return
        self._columns = rows[0]
        kept_so_far = writing(self.path, "the last checkpoint is kept")
        with kept_so_far, whole(self.path, overwrite=True) as part, part.open("w", newline="") as file:
            csv.writer(file).writerows([rows[0], *kept])

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Raises DiskError."""
        new = self._columns is None
        self._columns = self._columns or ["step", *values]
        with writing(self.path, "the last checkpoint is kept"), self.path.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(self._columns)
            writer.writerow([step, *(f"{values.get(name, float('nan')):.9g}" for name in self._columns[1:])])
