"""Samples drawn beforehand: the very ones that the task draws, in levels, and training from them without the data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.tiny_training import settings_of
from training.__main__ import main
from training.data.shard import Sharded
from training.loop.draws import generator_at
from training.loop.recipe import BUNDLED, read_recipe
from training.loop.trainer import Batches
from training.tasks.tasks import make_task
from vsr_ops.errors import SettingError
from vsr_ops.modules.video_upscaler import load_video_upscaler

RECIPE = BUNDLED / "video_upscaler_lite.toml"


@pytest.fixture
def sets(vaes: tuple[Path, Path]) -> list[str]:
    return settings_of("video_upscaler", vaes)


@pytest.fixture
def shard(sets: list[str], photos: Path, tmp_path: Path) -> Path:
    file = tmp_path / "clips.safetensors"
    given = [str(RECIPE), "--data", str(photos), "--draw-shard", str(file), "--samples", "3"]
    assert main([*given, *(word for each in sets for word in ("--set", each))]) == 0
    return file


def test_its_samples_are_those_of_the_task(sets: list[str], photos: Path, shard: Path, tmp_path: Path) -> None:
    recipe = read_recipe(RECIPE, sets)
    task = make_task(recipe, photos, tmp_path)
    task.prepare(torch.device("cpu"))
    drawn = [task.sample(generator_at(recipe.seed, number)) for number in range(3)]
    sharded = Sharded(recipe, make_task(recipe, shard, tmp_path), shard)
    for number in range(20):
        sample = sharded.sample(generator_at(1, number))
        best = min(drawn, key=lambda each: float((each["lr"] - sample["lr"]).abs().max()))
        assert (best["lr"] - sample["lr"]).abs().max() < 1e-6, "in levels, whole"
        assert (best["truth"] - sample["truth"]).abs().max() < 1e-3
        assert (best["forward"] - sample["forward"]).abs().max() < 1e-2
    assert Batches(sharded, 0, 2)[0]["lr"].shape[0] == 2


def test_training_needs_nothing_else(sets: list[str], shard: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    given = [str(RECIPE), "--data", str(shard), "--out", str(out), "--cpu"]
    quick = ["train.steps=2", "train.batch=1", "train.precision=float32", "run.sample_every=2", "run.workers=0"]
    assert main([*given, *(word for each in [*sets, *quick] for word in ("--set", each))]) == 0
    assert load_video_upscaler(out / "weights.safetensors").shape.width == 8


def test_what_is_refused(sets: list[str], shard: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = read_recipe(RECIPE, [*sets, "data.frames=4"])
    with pytest.raises(SettingError, match="expected the same; draw another"):
        Sharded(other, make_task(other, shard, tmp_path), shard)
    given = [str(RECIPE), "--data", str(shard), "--draw-shard", str(shard)]
    assert main([*given, *(word for each in sets for word in ("--set", each))]) == 2
    assert "error" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(RECIPE), "--data", str(shard)])
