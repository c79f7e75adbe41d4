"""Wrong recipes and missing things are one line each."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.tiny_training import TINY_DCM, settings_of
from training.__main__ import main
from training.loop.recipe import BUNDLED, differences, read_recipe
from training.loop.trainer import train
from training.tasks.tasks import make_task
from vsr_ops.errors import SettingError


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["train.stepz=3"], "unknown setting train.stepz: expected steps, batch"),
        (["train.steps=0"], "train.steps is 0: expected at least 1"),
        (["train.steps=2.5"], "train.steps is 2.5: expected a whole number"),
        (["train.precision=bf16"], "train.precision is 'bf16': expected one of float32, bfloat16, float16"),
        (["train.ema=1.0"], "train.ema is 1.0: expected a decay below 1"),
        (["task=dmc"], "unknown task 'dmc': expected one of dcm, vae_picture"),
        (["optimizer.name=sgd"], "unknown optimiser 'sgd': expected one of adamw, adamw8bit"),
        (["train.precision=float16"], "train.precision is float16, which a CPU cannot train in"),
        (["model.depth=[2]"], "unknown setting model.depth: expected embed_dim"),
        (["nonsense"], "--set 'nonsense': expected table.key=value"),
        (["other.key=1"], "unknown setting other: expected task"),
    ],
)
def test_a_wrong_recipe_is_one_line(
    sets: list[str], said: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(TINY_DCM)
    arguments = [str(recipe), "--data", str(photos), "--out", str(tmp_path / "run"), "--cpu"]
    assert main([*arguments, *(word for text in sets for word in ("--set", text))]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0]


@pytest.mark.parametrize(
    ("recipe", "sets", "said"),
    [
        (
            "missing.toml",
            [],
            "missing.toml: no such recipe; those of the pack, in recipes/, are capm_lite.toml, ",
        ),
        ("svd_stage1.toml", [], "model.start and model.vae are empty"),
        ("svd_stage1.toml", ["model.start=no.safetensors"], "no.safetensors: no such file or folder"),
        ("svd_stage1.toml", ["model.start=lite", "model.stage=3"], "model.stage is 3: expected 1"),
        ("vae_temporal_lite.toml", [], "model.picture is '': expected the run of a picture VAE"),
        ("vae_temporal_lite.toml", ["model.picture=nowhere"], "nowhere: no such file"),
        ("dcm_lite.toml", ["data.size=0"], "data.size is 0"),
        (
            "dcm_lite.toml",
            ["model.architecture=esrgan"],
            "model.architecture is 'esrgan': expected one of swinir, compact",
        ),
        ("dcm_lite.toml", ["model.depths=[2]"], "unknown setting model.depths: expected num_feat, num_conv"),
        ("dcm_lite.toml", ["model.start=lite", "model.num_conv=3"], "lite"),
        ("dcm_swinir_lite.toml", ["model.start=nowhere"], "nowhere: no such file"),
        ("lite_3_refined.toml", ["data.patch=9"], "data.patch is 9: expected an even number"),
        ("lite_3_refined.toml", ["model.dcm=nowhere"], "nowhere: no such file"),
        ("lite_5_refiner.toml", [], "model.start is empty: expected the SVD to sample with"),
        ("lite_5_refiner.toml", ["model.start=lite", "data.crop=200"], "data.crop is 200"),
        ("lite_5_refiner.toml", ["model.start=lite", "data.steps=[0]"], "data.steps is [0]"),
    ],
)
def test_what_a_task_lacks_is_one_line(
    recipe: str, sets: list[str], said: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [*sets, "train.precision=float32"] if recipe != "missing.toml" else sets
    arguments = [str(BUNDLED / recipe), "--data", str(photos), "--out", str(tmp_path / "run"), "--cpu"]
    assert main([*arguments, *(word for text in sets for word in ("--set", text))]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0]


def test_no_data_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(BUNDLED / "dcm_lite.toml")
    assert main([recipe, "--data", str(tmp_path / "none"), "--out", str(tmp_path / "run"), "--cpu"]) == 2
    assert f"{tmp_path / 'none'}: no such folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "recipe", "sets", "said"),
    [
        ("peft", "lite_4_svd.toml", ["model.lora_rank=4"], "needs peft: pip install peft"),
        ("bitsandbytes", "dcm_lite.toml", ["optimizer.name=adamw8bit"], "needs bitsandbytes: pip install bitsandbytes"),
    ],
)
def test_a_missing_library_is_named(
    module: str,
    recipe: str,
    sets: list[str],
    said: str,
    photos: Path,
    vaes: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    task = "dcm" if recipe.startswith("dcm") else "svd"
    read = read_recipe(BUNDLED / recipe, [*settings_of(task, vaes), *sets, "train.precision=float32"])
    with pytest.raises(SettingError, match=said):
        train(read, make_task(read, photos, tmp_path), tmp_path, cpu=True)


def test_differences_are_by_name() -> None:
    now = read_recipe(BUNDLED / "dcm_lite.toml").flat()
    assert differences(now, now) == {}
    assert differences(now, {**now, "train.steps": 10**6, "run.workers": 3}) == {}
    assert list(differences(now, {**now, "seed": 9, "model.extra": 1})) == ["seed", "model.extra"]
