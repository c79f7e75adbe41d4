"""The training loop of every recipe: accelerate's devices, precision and accumulation around one Task.

Nothing here depends on what happened before a step: the learning rate, the samples and torch's generators are functions
of (seed, step), so a checkpoint needs weights, their mean, the optimiser and the step, and a run that goes on from it
follows the very curve it would have followed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from training.loop.convolutions import safe_convolutions
from training.loop.curve import draw_losses, save_picture
from training.loop.draws import generator_at
from training.loop.places import check_target, held_run, inputs_of, write_weights
from training.loop.recipe import PRECISIONS, Optimizer, Recipe, differences, learning_rate
from training.loop.state import CHECKPOINT, WEIGHTS, LossFile, Saved, load, refuse_another, save, writing
from training.loop.task import Batch, Task
from vsr_ops.errors import CheckpointError, SamplingError, SettingError


class Objective(nn.Module):
    """A task's loss as a module: what accelerate wraps, so that precision and averaging treat every task alike."""

    def __init__(self, task: Task, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._task = task

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        return self._task.loss(self.model, batch)


class Batches(Dataset[Batch]):
    """Batch k of a run, drawn from (seed, number of the sample): whoever asks for it, and when, gets the same."""

    def __init__(self, task: Task, seed: int, size: int) -> None:
        self._task, self._seed, self._size = task, seed, size

    def __getitem__(self, index: int) -> Batch:
        numbers = range(index * self._size, (index + 1) * self._size)
        samples = [self._task.sample(generator_at(self._seed, number)) for number in numbers]
        return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


def seed_torch(seed: int, number: int) -> None:
    """Sets torch's own generators, for what is drawn inside models; samples draw from others."""
    torch.manual_seed(generator_at(-1 - seed, number).initial_seed())


def train(recipe: Recipe, task: Task, folder: Path, *, cpu: bool = False, say: Callable[[str], None] = print) -> None:
    """Runs `recipe` to its last step, going on from the checkpoint in `folder` where there is one, and exports.

    Leaves `checkpoint.pt`, `loss.csv`, `loss.png`, `samples/` and `weights.safetensors` in `folder`. Raises
    SettingError for a checkpoint of another recipe or files of no run there, VideoError for a folder that another run
    writes in or that holds an input, DiskError when the disk is full, SamplingError when the loss is
    not finite.
    """
    with writing(folder, "nothing is lost"):
        folder.mkdir(parents=True, exist_ok=True)
    with held_run(folder, recipe):
        run = start(recipe, task, folder, cpu=cpu, say=say)
        run.fit()
        if run.accelerator.is_main_process:
            weights = folder / WEIGHTS
            export(recipe, task, folder, weights, overwrite=True)
            say(f"{weights}: {weights.stat().st_size:,} bytes")


def export(recipe: Recipe, task: Task, folder: Path, target: Path, overwrite: bool = False) -> None:
    """Writes the weights of the checkpoint in `folder` (their mean, where it has one) to `target`. Frozen weights are
    those the task builds. Raises SettingError, VideoError where `target` is an input of the recipe, or is there and
    not to be overwritten."""
    inputs = inputs_of(recipe)
    check_target(target, overwrite, inputs)
    saved = load(folder)
    if saved is None:
        raise SettingError(f"{folder}: no checkpoint to export; train first")
    refuse_another(folder, differences(saved.recipe, recipe.flat()))
    model = built(recipe, task, saved)
    if saved.ema is not None:
        for parameter, mean in zip(trained(model), saved.ema["shadow_params"], strict=True):
            parameter.data.copy_(mean)
    write_weights(lambda path: task.export(model, path, recipe.run.trained_on), target, overwrite, inputs)


def built(recipe: Recipe, task: Task, saved: Saved | None) -> nn.Module:
    """The task's model, frozen as it wants, with the checkpoint's weights or its first ones."""
    seed_torch(recipe.seed, -1)
    model = task.build()
    freeze(model, task.trains)
    if saved is not None:
        unknown = model.load_state_dict(saved.model, strict=False).unexpected_keys
        if unknown:
            raise CheckpointError(f"a checkpoint with weights of another model ({unknown[0]}, ...); give another --out")
    return model


def start(recipe: Recipe, task: Task, folder: Path, *, cpu: bool, say: Callable[[str], None]) -> Run:
    """A run ready for its next step. Raises as `train`."""
    accelerator = Accelerator(
        mixed_precision=PRECISIONS[recipe.train.precision],
        gradient_accumulation_steps=recipe.train.accumulation,
        cpu=cpu,
        # One token of context: the queries of its attention take part in nothing.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    device = accelerator.device
    if device.type == "cpu" and recipe.train.precision == "float16":
        raise SettingError("train.precision is float16, which a CPU cannot train in: expected float32 or bfloat16")
    saved = load(folder)
    if saved is not None:
        now = {**recipe.flat(), "data": task.data_summary, "processes": accelerator.num_processes}
        before = {**saved.recipe, "data": saved.data, "processes": saved.processes}
        refuse_another(folder, differences(before, now))
        if saved.recipe["train.steps"] < recipe.train.steps:
            say(
                f"train.steps grows from {saved.recipe['train.steps']} to {recipe.train.steps}: the learning rate"
                f" follows the longer schedule from step {saved.step} on"
            )
    with accelerator.main_process_first():
        task.prepare(device)
    model = built(recipe, task, saved)
    if recipe.train.precision == "bfloat16" and device.type == "cpu":
        safe_convolutions(model)
    if device.type == "cuda":
        shrink_frozen(model, accelerator.mixed_precision)
    optimizer = make_optimizer(recipe.optimizer, trained(model))
    objective, optimizer = accelerator.prepare(Objective(task, model), optimizer)
    ema = EMAModel(trained(model), decay=recipe.train.ema) if recipe.train.ema else None
    if saved is not None:
        optimizer.load_state_dict(saved.optimizer)
        if ema is not None and saved.ema is not None:
            ema.load_state_dict(saved.ema)
            ema.to(device)
        if accelerator.scaler is not None and saved.scaler is not None:
            accelerator.scaler.load_state_dict(saved.scaler)
    count, total = sum(p.numel() for p in trained(model)), sum(p.numel() for p in model.parameters())
    step = saved.step if saved else 0
    say(
        f"{recipe.task}: {count:,} of {total:,} weights train on {device}, {recipe.train.precision};"
        f" {task.data_summary}; step {step} of {recipe.train.steps}"
    )
    return Run(recipe, task, folder, accelerator, model, objective, optimizer, ema, step)


@dataclass
class Run:
    """A run between two steps."""

    recipe: Recipe
    task: Task
    folder: Path
    accelerator: Accelerator
    model: nn.Module
    objective: nn.Module
    optimizer: Any
    ema: EMAModel | None
    step: int

    def fit(self) -> None:
        """Every step that is left."""
        steps, main = self.recipe.train.steps, self.accelerator.is_main_process
        if main and not (self.folder / CHECKPOINT).exists():
            # Before any other file, so that what a run writes is known as its own whenever it stops.
            save(self.folder, self.snapshot())
        log = LossFile(self.folder, self.step) if main else None
        # In a log file a line now and then is enough.
        every = 0.5 if sys.stderr.isatty() else 60
        bar = tqdm(total=steps, initial=self.step, unit="step", disable=not main, mininterval=every)
        batches = iter(self._batches())
        with bar:
            while self.step < steps:
                numbers = self._step(batches)
                self.step += 1
                if log is not None:
                    log.add(self.step, numbers)
                bar.set_postfix_str("  ".join(f"{name} {value:.4g}" for name, value in numbers.items()), refresh=False)
                bar.update()
                self._keep(self.step == steps)

    def _batches(self) -> Iterable[Batch]:
        """Every micro batch that is left for this process, in order."""
        train, run, processes = self.recipe.train, self.recipe.run, self.accelerator.num_processes
        first = self.step * train.accumulation
        mine = range(first * processes + self.accelerator.process_index, train.steps * train.accumulation * processes)
        return DataLoader(
            Batches(self.task, self.recipe.seed, train.batch),
            batch_size=None,
            sampler=mine[::processes],
            num_workers=run.workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def _step(self, batches: Iterator[Batch]) -> dict[str, float]:
        """One step of the optimiser; the numbers of its CSV row, means over its batches."""
        train = self.recipe.train
        seed_torch(self.recipe.seed, self.step * self.accelerator.num_processes + self.accelerator.process_index)
        rate = learning_rate(self.step, train.steps, self.recipe.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.objective.train()
        totals: dict[str, float] = {}
        for _ in range(train.accumulation):
            batch = {key: value.to(self.accelerator.device) for key, value in next(batches).items()}
            with self.accelerator.accumulate(self.objective):
                loss, numbers = self.objective(batch)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients and train.clip:
                    self.accelerator.clip_grad_norm_(trained(self.model), train.clip)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
            mean = cast(Tensor, self.accelerator.reduce(loss.detach().float(), "mean"))
            for name, value in {"loss": float(mean), **numbers}.items():
                totals[name] = totals.get(name, 0.0) + value / train.accumulation
        if not math.isfinite(totals["loss"]):
            raise SamplingError(
                f"the loss of step {self.step + 1} is {totals['loss']}: expected a finite number; go on from the last"
                " checkpoint with a lower optimizer.lr in a new folder, or in bfloat16 or float32"
            )
        if self.ema is not None:
            self.ema.step(trained(self.model))
        return {**totals, "lr": rate}

    def _keep(self, last: bool) -> None:
        """Checkpoint, curve and samples, where they are due."""
        if not self.accelerator.is_main_process:
            return
        if last or self.step % self.recipe.run.save_every == 0:
            save(self.folder, self.snapshot())
            curve = self.folder / "loss.png"
            with writing(curve, "the checkpoint is kept"):
                draw_losses(self.folder / "loss.csv", curve, f"{self.recipe.task}, step {self.step}")
        if last or self.step % self.recipe.run.sample_every == 0:
            picture, path = self.picture(), self.folder / "samples" / f"{self.step:07d}.png"
            with writing(path, "the last checkpoint is kept"):
                save_picture(path, picture)

    def picture(self) -> Tensor:
        """Samples that the training does not see (of the same sources), by the mean of the weights."""
        samples = [self.task.sample(generator_at(self.recipe.seed, -1 - number)) for number in range(4)]
        batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
        batch = {key: value.to(self.accelerator.device) for key, value in batch.items()}
        with self.averaged(), torch.no_grad(), self.accelerator.autocast():
            return self.task.picture(self.model.eval(), batch)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with the mean of its weights; outside, with those that train."""
        if self.ema is None:
            yield
            return
        self.ema.store(trained(self.model))
        self.ema.copy_to(trained(self.model))
        try:
            yield
        finally:
            self.ema.restore(trained(self.model))

    def snapshot(self) -> Saved:
        """What a checkpoint holds; frozen weights are not in it, they come from where they came from."""
        frozen = {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}
        scaler = self.accelerator.scaler
        return Saved(
            step=self.step,
            recipe=self.recipe.flat(),
            data=self.task.data_summary,
            processes=self.accelerator.num_processes,
            model={name: value for name, value in self.model.state_dict().items() if name not in frozen},
            ema=None if self.ema is None else self.ema.state_dict(),
            optimizer=self.optimizer.state_dict(),
            scaler=None if scaler is None else scaler.state_dict(),
        )


def freeze(model: nn.Module, trains: Callable[[str], bool]) -> None:
    """Lets the parameters learn that `trains` says do. Raises SettingError when none does."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains(name))
    if not trained(model):
        raise SettingError("no weight would train: check [model] of the recipe")


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def shrink_frozen(model: nn.Module, precision: str) -> None:
    """Holds frozen weights in autocast's precision; the exported file takes them from where they came from."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def adamw(settings: Optimizer, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, settings.lr, tuple(settings.betas), weight_decay=settings.weight_decay)  # type: ignore[arg-type]


def adamw8bit(settings: Optimizer, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Moments in 8 bits: 2 bytes a weight instead of 8."""
    try:
        import bitsandbytes  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise SettingError(
            "optimizer.name is adamw8bit, which needs bitsandbytes: pip install bitsandbytes, or set optimizer.name to"
            " adamw"
        ) from error
    return bitsandbytes.optim.AdamW8bit(
        parameters, settings.lr, tuple(settings.betas), weight_decay=settings.weight_decay
    )


OPTIMIZERS = {"adamw": adamw, "adamw8bit": adamw8bit}


def make_optimizer(settings: Optimizer, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser called `settings.name`. Raises SettingError."""
    if settings.name not in OPTIMIZERS:
        raise SettingError(f"unknown optimiser '{settings.name}': expected one of {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[settings.name](settings, parameters)
