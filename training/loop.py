"""What every recipe shares: weight averaging, a checkpoint to resume from, a CSV of the loss."""

from __future__ import annotations

import copy
import csv
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn


@dataclass
class Run:
    """One training run in `folder`: model, its average, optimiser and step number."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    folder: Path
    decay: float = 0.999
    step: int = 0
    seconds: float = 0.0
    average: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.average = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.folder.mkdir(parents=True, exist_ok=True)

    def update_average(self) -> None:
        """EMA with a warm-up, so that the first steps do not hold it back."""
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for mean, value in zip(self.average.parameters(), self.model.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)

    def save(self) -> None:
        """Writes beside and renames, so that a kill leaves the last good checkpoint."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        part = self.folder / "checkpoint.part"
        torch.save(state, part)
        part.replace(self.folder / "checkpoint.pt")

    def resume(self) -> None:
        """Continues from `folder` if a checkpoint lies there."""
        path = self.folder / "checkpoint.pt"
        if path.exists():
            state = torch.load(path, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]


class Progress:
    """Appends rows to `folder/loss.csv` and prints them."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "loss.csv"
        self.last = time.monotonic()

    def row(self, step: int, **values: float) -> None:
        fresh = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file)
            if fresh:
                writer.writerow(["step", *values])
            writer.writerow([step, *(f"{value:.6g}" for value in values.values())])
        now = time.monotonic()
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        print(f"step {step}  {text}  {now - self.last:.1f} s", flush=True)
        self.last = now


def learning_rate(spent: float, peak: float, warmup: float = 0.02) -> float:
    """Linear warm-up, then a cosine to a twentieth of the peak, over `spent` in [0, 1] of the run's budget."""
    if spent < warmup:
        return peak * (spent / warmup + 1e-3)
    phase = min((spent - warmup) / (1 - warmup), 1.0)
    return peak * (0.05 + 0.95 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * phase)).item()))
