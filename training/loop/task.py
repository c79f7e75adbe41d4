"""What the trainer wants of a thing to train. A new module is trained by writing one of these and naming it in TASKS.

All chance is in the samples: a sample follows from its generator, a loss from model and batch. So a run that is cut
off and goes on sees what it would have seen, and two batches of two are one batch of four.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from training.loop.recipe import Recipe

Batch = dict[str, Tensor]


class Task(Protocol):
    """One thing to train."""

    @property
    def data_summary(self) -> str:
        """One line that differs when the training data do: counts and a digest."""
        ...

    def prepare(self, device: torch.device) -> None:
        """Work before the first step whose result is kept, such as encoding clips. May do nothing."""
        ...

    def build(self) -> nn.Module:
        """The model on the CPU in float32, with its first weights; drawn from torch's global generator."""
        ...

    def trains(self, name: str) -> bool:
        """Whether the parameter called `name` learns; the others are frozen."""
        ...

    def sample(self, rng: torch.Generator) -> Batch:
        """One sample; every tensor has one shape for all samples. A batch stacks them."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """(the loss, a mean over the batch; further numbers for the CSV). Runs under autocast."""
        ...

    def picture(self, model: nn.Module, batch: Batch) -> Tensor:
        """`(3, h, w)` RGB: input, result and truth of a batch. Runs under autocast and without gradients."""
        ...

    def export(self, model: nn.Module, path: Path, trained_on: str) -> None:
        """Writes the weights as one of the pack's `.safetensors` files."""
        ...


TaskMaker = Callable[[Recipe, Path, Path], Task]
"""(recipe, folder of the data, folder of the run) -> task. Reads no data yet."""
