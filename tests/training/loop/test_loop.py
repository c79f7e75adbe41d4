"""The trainer: a killed run follows the curve it would have followed, and nothing it keeps is lost."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.support.tiny_training import TINY_DCM
from training.__main__ import main
from training.loop.recipe import Optimizer, Recipe, learning_rate, read_recipe, to_recipe
from training.loop.state import CHECKPOINT, LossFile, load
from training.loop.trainer import Batches, Run, export, start, train, trained
from training.tasks.tasks import make_task
from vsr_ops.errors import CheckpointError, SamplingError, SettingError

ROOT = Path(__file__).parents[3]


class Line:
    """The smallest task: y = 3x + 1. Whoever adds a module writes one of these."""

    data_summary = "a line"

    def __init__(self, broken_from: int = 10**9) -> None:
        self.broken_from, self.losses = broken_from, 0

    def prepare(self, device: torch.device) -> None:
        pass

    def build(self) -> nn.Module:
        return nn.ModuleDict({"a": nn.Linear(1, 1), "frozen": nn.Linear(1, 1)})

    def trains(self, name: str) -> bool:
        return name.startswith("a.")

    def sample(self, rng: torch.Generator) -> dict[str, Tensor]:
        x = torch.randn(1, generator=rng)
        return {"x": x, "y": 3 * x + 1}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        self.losses += 1
        error = model["a"](batch["x"]) - batch["y"]  # type: ignore[index]
        scale = float("nan") if self.losses > self.broken_from else 1.0
        return error.square().mean() * scale, {"error": float(error.detach().abs().max())}

    def picture(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return torch.full((3, 8, 8), 0.5)

    def export(self, model: nn.Module, path: Path, trained_on: str) -> None:
        save_file(model.state_dict(), path)


def line(**settings: object) -> Recipe:
    """A recipe of `Line`; settings under their dotted names, a dot written as two underscores."""
    tables: dict[str, dict[str, object]] = {"train": {"steps": 6, "batch": 2}, "optimizer": {"lr": 0.05}, "run": {}}
    for key, value in settings.items():
        table, _, name = key.partition("__")
        tables[table][name] = value
    return to_recipe({"task": "line", **tables})


def begin(recipe: Recipe, folder: Path, task: Line | None = None) -> Run:
    folder.mkdir(exist_ok=True)
    return start(recipe, task or Line(), folder, cpu=True, say=lambda _: None)


def losses(folder: Path) -> list[float]:
    with (folder / "loss.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    return [float(row["loss"]) for row in rows]


# --- Going on after a kill ------------------------------------------------------------------------------------------


def test_a_killed_run_ends_as_the_one_that_was_not(photos: Path, tmp_path: Path) -> None:
    """The process dies at once in step 13, with rows in the CSV that its checkpoint of step 8 does not know."""
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(TINY_DCM)
    arguments = [str(recipe), "--data", str(photos), "--cpu", "--out"]
    kill = getattr(signal, "SIGKILL", signal.SIGTERM)
    script = f"""
import os, sys, torch
torch.set_num_threads(1)
from training.loop import state
from training.__main__ import main
add = state.LossFile.add
def dies(self, step, values):
    add(self, step, values)
    if step == 13:
        os.kill(os.getpid(), {int(kill)})
state.LossFile.add = dies
main(sys.argv[1:])
"""
    command = [sys.executable, "-c", script, *arguments, str(tmp_path / "killed")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, timeout=300)
    assert done.returncode not in (0, 1, 2), done.stderr.decode()
    assert len(losses(tmp_path / "killed")) == 13
    saved = load(tmp_path / "killed")
    assert saved is not None and saved.step == 8
    assert main([*arguments, str(tmp_path / "killed")]) == 0
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    ours, whole = losses(tmp_path / "killed"), losses(tmp_path / "whole")
    assert len(ours) == 24 and ours == pytest.approx(whole, abs=1e-6)
    weights = [load_file(tmp_path / name / "weights.safetensors") for name in ("killed", "whole")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_a_run_leaves_its_pictures(photos: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(TINY_DCM)
    arguments = [str(recipe), "--data", str(photos), "--cpu", "--out", str(tmp_path / "run"), "--set", "train.steps=3"]
    assert main(arguments) == 0
    assert Image.open(tmp_path / "run" / "loss.png").size == (960, 480)
    width, height = Image.open(tmp_path / "run" / "samples" / "0000003.png").size
    assert height == 4 * 32 and width > 3 * 32  # four rows of bicubic | DCM | truth


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"train__batch": 4, "optimizer__lr": 0.1}, ["train.batch (2 -> 4)", "optimizer.lr (0.05 -> 0.1)"]),
        ({"train__steps": 5}, ["train.steps (6 -> 5)"]),
        ({"train__precision": "bfloat16"}, ["train.precision (float32 -> bfloat16)"]),
    ],
)
def test_another_recipe_is_refused(settings: dict[str, object], named: list[str], tmp_path: Path) -> None:
    train(line(), Line(), tmp_path, cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    before = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(SettingError) as refusal:
        train(line(**settings), Line(), tmp_path, cpu=True)
    assert all(name in str(refusal.value) for name in named) and "\n" not in str(refusal.value)
    assert str(refusal.value).count("->") == len(named)
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_other_data_are_refused(tmp_path: Path) -> None:
    train(line(), Line(), tmp_path, cpu=True)
    other = Line()
    other.data_summary = "a parabola"
    with pytest.raises(SettingError, match=r"data .a line -> a parabola"):
        train(line(), other, tmp_path, cpu=True)


def test_a_run_may_grow_and_says_so(tmp_path: Path) -> None:
    train(line(), Line(), tmp_path, cpu=True)
    said: list[str] = []
    train(line(train__steps=9, run__save_every=2), Line(), tmp_path, cpu=True, say=said.append)
    assert len(losses(tmp_path)) == 9 and any("grows from 6 to 9" in text for text in said)


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / CHECKPOINT).write_bytes(b"PK no zip")
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt"):
        train(line(), Line(), tmp_path, cpu=True)


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    """A real limit on the size of files: the system refuses the write half way."""
    resource = pytest.importorskip("resource")
    train(line(run__save_every=3), Line(), tmp_path, cpu=True)
    before = (tmp_path / CHECKPOINT).read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(Exception, match="bytes free") as failure:
            train(line(train__steps=9, run__save_every=3), Line(), tmp_path, cpu=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    text = str(failure.value)
    assert type(failure.value).__name__ == "DiskError" and "\n" not in text
    assert str(tmp_path / CHECKPOINT) in text and "step 9 is not saved, the checkpoint before it is kept" in text
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert not list(tmp_path.glob("*.part"))
    train(line(train__steps=9, run__save_every=3), Line(), tmp_path, cpu=True)
    assert len(losses(tmp_path)) == 9


def test_an_out_that_cannot_be_is_one_line(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(TINY_DCM)
    assert main([str(recipe), "--data", str(photos), "--out", str(tmp_path / "file" / "run"), "--cpu"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "cannot be written" in lines[0] and "bytes free" in lines[0]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(SamplingError, match="loss of step 5 is nan"):
        train(line(run__save_every=2), Line(broken_from=4), tmp_path, cpu=True)
    saved = load(tmp_path)
    assert saved is not None and saved.step == 4


def test_rows_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    log = LossFile(tmp_path, 0)
    for step in range(1, 6):
        log.add(step, {"loss": step / 3, "lr": 0.1})
    LossFile(tmp_path, 3).add(4, {"loss": 9.0, "lr": 0.1})
    assert losses(tmp_path) == pytest.approx([1 / 3, 2 / 3, 1, 9])


# --- Steps ----------------------------------------------------------------------------------------------------------


def gradients(recipe: Recipe, task: object, folder: Path) -> list[Tensor]:
    """Of the first step, as the optimiser sees them."""
    folder.mkdir()
    run = start(recipe, task, folder, cpu=True, say=lambda _: None)  # type: ignore[arg-type]
    seen: list[Tensor] = []
    parameters = trained(run.model)
    run.optimizer.optimizer.register_step_pre_hook(lambda *_: seen.extend(p.grad.clone() for p in parameters))  # type: ignore[union-attr]
    run._step(iter(run._batches()))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return seen


def test_two_batches_of_two_are_one_of_four(photos: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(TINY_DCM)
    found: list[list[Tensor]] = []
    for batch, accumulation in ((4, 1), (2, 2)):
        sets = [f"train.batch={batch}", f"train.accumulation={accumulation}", "train.clip=0"]
        read = read_recipe(recipe, sets)
        found.append(gradients(read, make_task(read, photos, tmp_path), tmp_path / str(batch)))
    assert len(found[0]) > 20
    for whole, halves in zip(*found, strict=True):
        assert (whole - halves).norm() <= 1e-5 * whole.norm() + 1e-9


def test_the_mean_of_the_weights_is_the_recursion(tmp_path: Path) -> None:
    """mean <- d mean + (1 - d) weight, d = min(decay, (1 + k) / (10 + k)) at step k = 1, 2 ... and 0 at the first."""
    recipe = line(train__ema=0.25)
    run = begin(recipe, tmp_path)
    batches = iter(run._batches())
    mean = torch.zeros(())
    for step in range(6):
        run._step(batches)
        weight = run.model["a"].weight.detach().clone()  # type: ignore[index]
        decay = 0.0 if step == 0 else min(0.25, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * weight
        run.step += 1
    assert run.ema is not None
    torch.testing.assert_close(run.ema.shadow_params[0], mean)
    with run.averaged():
        torch.testing.assert_close(run.model["a"].weight.detach(), mean)  # type: ignore[index]
    assert torch.equal(run.model["a"].weight.detach(), weight)  # type: ignore[index]


def test_the_mean_is_what_is_exported_and_frozen_weights_stay(tmp_path: Path) -> None:
    task, recipe = Line(), line()
    train(recipe, task, tmp_path, cpu=True)
    saved = load(tmp_path)
    assert saved is not None and saved.ema is not None
    exported = load_file(tmp_path / "weights.safetensors")
    torch.testing.assert_close(exported["a.weight"], saved.ema["shadow_params"][0])
    assert not torch.equal(exported["a.weight"], saved.model["a.weight"])
    assert set(saved.model) == {"a.weight", "a.bias"}
    run = begin(line(), tmp_path / "anew")
    assert torch.equal(exported["frozen.weight"], run.model["frozen"].weight)  # type: ignore[index]
    export(recipe, task, tmp_path, tmp_path / "again.safetensors")
    assert torch.equal(load_file(tmp_path / "again.safetensors")["a.weight"], exported["a.weight"])


def test_workers_draw_the_same_batches(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("other systems start workers anew, which a class of this file does not survive")
    alone = [batch["x"] for batch in begin(line(), tmp_path / "a")._batches()]
    helped = [batch["x"] for batch in begin(line(run__workers=2), tmp_path / "b")._batches()]
    assert len(alone) == 6
    assert all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True))


def test_samples_differ_from_each_other_and_from_another_seeds() -> None:
    first = [Batches(Line(), 0, 4)[k]["x"] for k in range(3)]  # type: ignore[arg-type]
    values = torch.cat([*first, Batches(Line(), 1, 4)[0]["x"]]).flatten()  # type: ignore[arg-type]
    assert len(values.unique()) == len(values) == 16


def test_the_rate_warms_up_and_falls() -> None:
    settings = Optimizer(lr=1e-3, warmup=10, floor=0.05)
    rates = [learning_rate(step, 101, settings) for step in range(101)]
    assert rates[0] == pytest.approx(1e-4) and rates[9] == pytest.approx(1e-3) == max(rates)
    assert rates[-1] == pytest.approx(5e-5) and rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(77, 100, Optimizer(lr=2.0)) == 2.0
