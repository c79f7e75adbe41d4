"""What training leaves alone: the files it starts from, and what lay in its folder before it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests.support.tiny_training import TINY_DCM
from tests.training.loop.test_loop import Line, line, losses
from training.__main__ import main
from training.loop.places import write_weights
from training.loop.recipe import Recipe, to_recipe
from training.loop.state import CHECKPOINT, load
from training.loop.trainer import export, train
from vsr_ops.errors import SettingError, VideoError, VSRError
from vsr_ops.system.outputs import claimed

ROOT = Path(__file__).parents[3]


def state(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def started(**model: object) -> Recipe:
    return to_recipe({"task": "line", "train": {"steps": 2, "batch": 2}, "model": model})


@pytest.mark.parametrize(
    "name",
    ["loss.csv", "loss.png", "samples/0000002.png", "weights.safetensors", "weights_refiner.safetensors"],
)
def test_files_that_lay_in_the_folder_before_the_run_stay(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(SettingError, match=f"holds {name.partition('/')[0]} but no checkpoint") as refusal:
        train(line(), Line(), tmp_path, cpu=True)
    assert "\n" not in str(refusal.value) and state(tmp_path) == {name: b"mine"}


def test_other_files_stay_beside_the_runs(tmp_path: Path) -> None:
    mine = {"notes.txt": b"1", "loss.part": b"2", "checkpoint.pt.part": b"3", ".weights.safetensors.part": b"4"}
    for name, held in mine.items():
        (tmp_path / name).write_bytes(held)
    train(line(), Line(), tmp_path, cpu=True)
    train(line(train__steps=8), Line(), tmp_path, cpu=True)
    assert state(tmp_path).items() >= mine.items()
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == {".weights.safetensors.part"}


STARTS: dict[str, Callable[[Path], tuple[Path, Path]]] = {
    "weights in the run's folder": lambda d: (d / "run" / "weights.safetensors", d / "run"),
    "the run's folder itself": lambda d: (d / "run", d / "run"),
    "a folder above": lambda d: (d / "run" / "weights.safetensors", d),
    "the folder by another way": lambda d: (d / "run" / "weights.safetensors", d / "run" / ".." / "run"),
}


@pytest.mark.parametrize("name", STARTS)
def test_a_run_does_not_write_where_it_starts_from(name: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    save_file({}, tmp_path / "run" / "weights.safetensors")
    start, out = STARTS[name](tmp_path)
    before = state(tmp_path)
    for setting in ("start", "dcm", "refiner", "control"):
        with pytest.raises(VideoError, match="input"):
            train(started(**{setting: str(start)}), Line(), out, cpu=True)
    assert state(tmp_path) == before


def test_a_run_does_not_write_into_the_data_or_above_them(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data" / "samples"
    data.mkdir(parents=True)
    for path in sorted(photos.rglob("*.*"))[:2]:
        (data / path.name).write_bytes(path.read_bytes())
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(TINY_DCM)
    before = state(tmp_path)
    for given, out in ((data, data), (data, data.parent), (data.parent, data), (data, tmp_path)):
        assert main([str(recipe), "--data", str(given), "--out", str(out), "--cpu"]) == 2
        assert "input" in capsys.readouterr().err
    assert state(tmp_path) == before


def test_exported_weights_replace_no_input_and_nothing_unasked(tmp_path: Path) -> None:
    run, own = tmp_path / "run", tmp_path / "own.safetensors"
    own.write_bytes(b"years of work")
    recipe = started(start=str(own))
    train(recipe, Line(), run, cpu=True)
    os.link(own, tmp_path / "linked.safetensors")
    (tmp_path / "other.safetensors").write_bytes(b"mine")
    before = state(tmp_path)
    cases = [("own.safetensors", True), ("linked.safetensors", True), ("other.safetensors", False), ("x.ckpt", True)]
    for name, overwrite in [*cases, ("none/x.safetensors", False)]:
        with pytest.raises(VSRError) as refusal:
            export(recipe, Line(), run, tmp_path / name, overwrite)
        assert name.partition("/")[2] in str(refusal.value) and state(tmp_path) == before
    export(recipe, Line(), run, tmp_path / "other.safetensors", overwrite=True)
    assert (tmp_path / "other.safetensors").read_bytes() == (run / "weights.safetensors").read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_what_is_exported_beside_the_weights_replaces_nothing_either(tmp_path: Path) -> None:
    def both(path: Path) -> None:
        save_file({}, path)
        save_file({}, path.with_name("dcm.safetensors"))

    (tmp_path / "dcm.safetensors").write_bytes(b"mine")
    with pytest.raises(VideoError, match=r"dcm\.safetensors' already exists"):
        write_weights(both, tmp_path / "new.safetensors", overwrite=False)
    with pytest.raises(VideoError, match="is the input itself"):
        write_weights(both, tmp_path / "new.safetensors", True, [tmp_path / "dcm.safetensors"])
    assert state(tmp_path) == {"dcm.safetensors": b"mine"}
    write_weights(both, tmp_path / "new.safetensors", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dcm.safetensors", "new.safetensors"]


def test_a_second_run_into_a_folder_is_refused(tmp_path: Path) -> None:
    train(line(), Line(), tmp_path, cpu=True)
    before = state(tmp_path)
    with claimed(tmp_path), pytest.raises(VideoError, match="another run is writing"):
        train(line(train__steps=9), Line(), tmp_path, cpu=True)
    assert state(tmp_path) == before
    train(line(train__steps=9), Line(), tmp_path, cpu=True)
    assert len(losses(tmp_path)) == 9


def test_a_run_killed_before_its_first_checkpoint_is_due_goes_on(photos: Path, tmp_path: Path) -> None:
    """The folder has one from the beginning on, so that what a killed run left is known as its own."""
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(TINY_DCM)
    arguments = [str(recipe), "--data", str(photos), "--cpu", "--out", str(tmp_path / "run")]
    arguments += ["--set", "train.steps=4", "--set", "run.save_every=100"]
    script = """
import os, signal, sys, torch
torch.set_num_threads(1)
from training.loop import state
from training.__main__ import main
add = state.LossFile.add
def dies(self, step, values):
    add(self, step, values)
    os._exit(9)
state.LossFile.add = dies
main(sys.argv[1:])
"""
    done = subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, timeout=300)
    assert done.returncode == 9, done.stderr.decode()
    saved = load(tmp_path / "run")
    assert saved is not None and saved.step == 0 and len(losses(tmp_path / "run")) == 1
    assert main(arguments) == 0
    assert len(losses(tmp_path / "run")) == 4 and (tmp_path / "run" / CHECKPOINT).exists()
