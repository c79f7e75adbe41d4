"""CAPM's halves trained together, through the sampler: both feel the video, and nothing else moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tiny_training import settings_of
from training.loop.recipe import BUNDLED, read_recipe
from training.loop.trainer import Batches, freeze
from training.tasks.capm_joint import JointCAPM
from vsr_ops.errors import SettingError
from vsr_ops.modules.capm_file import CAPMs, load_capms, write_capms


def task_of(photos: Path, vaes: tuple[Path, Path], out: Path, *sets: str) -> JointCAPM:
    recipe = read_recipe(BUNDLED / "capm_whole_lite.toml", [*settings_of("capm_whole", vaes), *sets])
    return JointCAPM(recipe, photos, out)


def test_the_video_teaches_both_halves(photos: Path, vaes: tuple[Path, Path], tmp_path: Path) -> None:
    task = task_of(photos, vaes, tmp_path, "loss.edm=0", "loss.agree=0", "data.steps=[3]")
    task.prepare(torch.device("cpu"))
    torch.manual_seed(0)
    model: Any = task.build().train()
    freeze(model, task.trains)
    torch.nn.init.normal_(model["refiner"].leave.weight, std=0.1)
    task.loss(model, Batches(task, 0, 1)[0])[0].backward()
    felt = {name for name, value in model.named_parameters() if value.grad is not None and value.grad.any()}
    assert all(name.startswith("capms.") for name in felt)
    for half in ("unet", "vae"):
        last = [name for name in felt if name.startswith(f"capms.{half}.levels.") and ".leave." in name]
        assert len(last) == 2 * len(model["capms"][half].shape.widths), (
            "the other layers wait for this one to leave zero"
        )
    task.export(model, tmp_path / "both.safetensors", "nothing")
    assert set(load_capms(tmp_path / "both.safetensors").halves()) == {"unet", "vae"}


def test_a_sample_says_how_it_was_compressed(photos: Path, vaes: tuple[Path, Path], tmp_path: Path) -> None:
    task = task_of(photos, vaes, tmp_path)
    batch = Batches(task, 0, 30)[0]
    crfs = 51 * batch["level"]
    assert bool(((crfs == 0) | ((crfs > 14.99) & (crfs < 35.01))).all()) and len(set(crfs.tolist())) > 8
    told = ~batch["hint"].isnan()
    assert 5 < int(told.sum()) < 25 and torch.equal(batch["hint"][told], batch["level"][told])


def test_half_a_capm_is_refused(photos: Path, vaes: tuple[Path, Path], tmp_path: Path) -> None:
    half = load_capms(vaes[1].parent / "capm.safetensors").vae
    write_capms(tmp_path / "half.safetensors", CAPMs(vae=half), "nothing")
    with pytest.raises(SettingError, match=r"half\.safetensors, which has vae: expected unet and vae"):
        task_of(photos, vaes, tmp_path, f"model.capm={tmp_path / 'half.safetensors'}").build()
    with pytest.raises(SettingError, match=r"model\.capm is empty"):
        task_of(photos, vaes, tmp_path, "model.capm=")
    with pytest.raises(SettingError, match=r"data\.finest is 40"):
        task_of(photos, vaes, tmp_path, "data.finest=40")
