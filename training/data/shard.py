"""Samples of a task drawn beforehand, in one file: training from it decodes, degrades and estimates nothing. Any
machine trains at its full speed then, and needs neither video libraries nor the data."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

from training.loop.draws import generator_at, integer
from training.loop.recipe import Recipe
from training.loop.task import Batch, Task
from vsr_ops.checkpoints.safefile import json_object, write_whole
from vsr_ops.errors import SettingError

KIND, SUFFIX = "shard", ".safetensors"


def is_shard(data: Path) -> bool:
    """Whether `--data` names a shard, not a folder."""
    return data.suffix == SUFFIX


def draw_shard(recipe: Recipe, task: Task, count: int, target: Path) -> None:
    """Draws `count` samples of a task and writes them; pictures in 8-bit levels as bytes. Raises SettingError for fewer
    than one, CheckpointError where the disk does not take them."""
    if count < 1 or not is_shard(target):
        raise SettingError(f"{count} samples into {target}: expected at least one, and a name ending in {SUFFIX}")
    task.prepare(torch.device("cpu"))
    samples = [task.sample(generator_at(recipe.seed, n)) for n in tqdm(range(count), unit="sample", desc="drawing")]
    stored = {key: _small(torch.stack([sample[key] for sample in samples])) for key in samples[0]}
    made_of = {"vsr.kind": KIND, "vsr.recipe": json.dumps(_drawn_by(recipe)), "vsr.data": task.data_summary}
    write_whole(target, {key: value.contiguous() for key, value in stored.items()}, made_of)


def _small(x: Tensor) -> Tensor:
    """Pictures as bytes, other numbers in half precision; whole numbers as they are."""
    if not x.is_floating_point():
        return x
    levels = x * 255
    whole = levels.round()
    if float(x.min()) >= 0 and float(x.max()) <= 1 and torch.allclose(levels, whole, atol=1e-3):
        return whole.to(torch.uint8)
    return x.half()


def _drawn_by(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe the samples depend on."""
    return {"task": recipe.task, "data": dict(recipe.data)}


class Sharded:
    """A task whose samples are those of a shard. Raises SettingError for a file that is none, or of another recipe."""

    def __init__(self, recipe: Recipe, task: Task, file: Path) -> None:
        self._task, self._file = task, file
        self._stored: Batch | None = None
        with safe_open(file, "pt") as source:
            metadata = dict(source.metadata() or {})
        if metadata.get("vsr.kind") != KIND:
            raise SettingError(f"{file}: no shard; expected one that --draw-shard wrote, or a folder of clips")
        own, drawn = json.loads(json.dumps(_drawn_by(recipe))), json_object(metadata.get("vsr.recipe", "")) or {}
        if own != drawn:
            raise SettingError(f"{file}: drawn for {drawn}, the recipe has {own}: expected the same; draw another")
        self._note = f"{metadata.get('vsr.data', '')}; drawn as {hashlib.sha256(file.read_bytes()).hexdigest()[:8]}"

    def __getstate__(self) -> dict[str, Any]:
        """Without the samples: processes that draw read them again."""
        return {**self.__dict__, "_stored": None}

    @property
    def data_summary(self) -> str:
        """What the samples were drawn from, and a digest of them."""
        return self._note

    def prepare(self, device: torch.device) -> None:
        """As the task's own."""
        self._task.prepare(device)

    def build(self) -> nn.Module:
        """As the task's own."""
        return self._task.build()

    def trains(self, name: str) -> bool:
        """As the task's own."""
        return self._task.trains(name)

    def sample(self, rng: torch.Generator) -> Batch:
        """One of the shard's, any as likely."""
        if self._stored is None:
            with safe_open(self._file, "pt") as source:
                self._stored = {key: source.get_tensor(key) for key in source.keys()}  # noqa: SIM118
        index = integer(rng, len(next(iter(self._stored.values()))))
        return {key: _whole(value[index]) for key, value in self._stored.items()}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """As the task's own."""
        return self._task.loss(model, batch)

    def picture(self, model: nn.Module, batch: Batch) -> Tensor:
        """As the task's own."""
        return self._task.picture(model, batch)

    def export(self, model: nn.Module, path: Path, trained_on: str) -> None:
        """As the task's own."""
        self._task.export(model, path, trained_on)


def _whole(x: Tensor) -> Tensor:
    return x.float() / 255 if x.dtype == torch.uint8 else x.float() if x.is_floating_point() else x
