"""CAPM for an SD's UNet: it starts as nothing, learns alone, and what it leaves is what the pack loads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.tiny_training import BICUBIC, descended, train_tiny
from training.loop.draws import generator_at, integer
from training.loop.recipe import BUNDLED, read_recipe
from training.loop.trainer import Batches, freeze
from training.tasks.capm import parts_of
from training.tasks.capm_sd import CAPMSDTask
from training.tasks.control import ControlTask, by_frame, controlled
from training.tasks.sd import unet_of
from training.tasks.tasks import make_task
from vsr_ops.backbones.sd import load_sd
from vsr_ops.checkpoints.sd import read_sd
from vsr_ops.errors import CheckpointError, SettingError
from vsr_ops.modules import capm_file
from vsr_ops.modules.capm import CAPM, SD_UNET, SVD_UNET, SVD_VAE, CAPMShape, attached, decoder_widths
from vsr_ops.modules.capm_file import CAPMs, load_capms, write_capms
from vsr_ops.modules.control import Control, write_control

WIDTHS = decoder_widths([32, 32])  # of the tiny SD


@pytest.fixture(scope="module")
def start(vaes: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny SD, and of a control of it that acts."""
    folder = tmp_path_factory.mktemp("start")
    for name in ("sd", "svd"):
        shutil.copy(vaes[1].parent / f"{name}.safetensors", folder)
    torch.manual_seed(0)
    control = Control.of(unet_of(read_sd(folder / "sd.safetensors")))
    for conv in (*control.controlnet_down_blocks, control.controlnet_mid_block):
        nn.init.normal_(conv.weight, std=0.1)  # type: ignore[arg-type]
    nn.init.normal_(control.conv_in.weight, std=0.1)
    write_control(folder / "control.safetensors", control, "nothing")
    return folder


def settings(start: Path) -> list[str]:
    files = [f"model.{key}={start / name}.safetensors" for key, name in (("start", "sd"), ("control", "control"))]
    own = [f"model.vae={start / 'svd.safetensors'}", "model.capm=", "model.code=8", "model.prompt=8"]
    return [*files, *own, "data.size=64", "data.frames=2", "data.clips=2", "data.crop=8", BICUBIC]


def task_of(photos: Path, start: Path, out: Path, *sets: str) -> Any:
    task = make_task(read_recipe(BUNDLED / "capm_sd_lite.toml", [*settings(start), *sets]), photos, out)
    task.prepare(torch.device("cpu"))
    return task


def test_a_new_one_leaves_the_controls_loss_as_it_is(photos: Path, start: Path, tmp_path: Path) -> None:
    task = task_of(photos, start, tmp_path)
    model = task.build().eval()
    batch = Batches(task, 0, 1)[0]
    frames = by_frame(batch)
    hint, scaled, timestep = (frames[key] for key in ("hint", "noise", "timestep"))
    with torch.no_grad():
        plain = controlled(model, hint, scaled, timestep)
        assert not torch.equal(plain, controlled(model, 0 * hint, scaled, timestep))
        unet, capm = parts_of(model)
        for told in (frames["level"], torch.full_like(frames["level"], torch.nan)):
            with attached(capm, unet, told):
                assert torch.equal(controlled(model, hint, scaled, timestep), plain)
        alone, _ = ControlTask.loss(task, model, batch)
        _, numbers = task.loss(model, batch)
    assert numbers["found"] == pytest.approx(float(alone))


def test_only_capm_moves_and_lowers_the_loss(photos: Path, start: Path, tmp_path: Path) -> None:
    task = task_of(photos, start, tmp_path)
    torch.manual_seed(0)
    model = task.build().train()
    freeze(model, task.trains)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = Batches(task, 0, 1)[0]
    found = descended(lambda: task.loss(model, batch), model, 5e-3, 8)
    assert found["found"][-1] < 0.93 * found["found"][0] and found["agree"][-1] < 0.5 * found["agree"][0]
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all(name.startswith("capm.") for name in moved)
    with torch.no_grad():
        picture = task.picture(model.eval(), batch)
    assert picture.shape[0] == 3 and torch.isfinite(picture).all()


def test_what_a_sample_is_told_is_its_clips_level(photos: Path, start: Path, tmp_path: Path) -> None:
    """The rest of a sample is the control's own, draw for draw."""
    task = task_of(photos, start, tmp_path, "data.clips=4", "data.clean_share=0.5", "loss.drop=0.5")
    samples = [task.sample(generator_at(0, number)) for number in range(40)]
    assert {round(float(sample["level"]) * 51, 3) for sample in samples} == {
        float(task._latents.crf(generator_at(1000, number), torch.empty(0)) or 0) for number in range(4)
    }
    untold = sum(bool(sample["told"].isnan()) for sample in samples)
    assert 10 < untold < 30
    assert all(sample["told"].isnan() or torch.equal(sample["told"], sample["level"]) for sample in samples)
    for number in range(3):
        theirs = ControlTask.sample(task, generator_at(0, number))
        assert all(torch.equal(samples[number][key], value) for key, value in theirs.items())
    for number, sample in enumerate(samples):
        shard, index = task._latents._clip(integer(generator_at(0, number), 4))
        assert float(shard["level"][index]) == float(sample["level"])


def test_features_without_a_hint_are_not_asked_for_the_level(photos: Path, start: Path, tmp_path: Path) -> None:
    task = task_of(photos, start, tmp_path)
    model = task.build().eval()
    batch = Batches(task, 0, 1)[0]
    with torch.no_grad():
        assert task.loss(model, batch)[1]["agree"] > 0
        assert task.loss(model, {**batch, "hint": 0 * batch["hint"]})[1]["agree"] == 0


def test_a_run_is_what_the_pack_loads(photos: Path, start: Path, tmp_path: Path) -> None:
    run = train_tiny("capm_sd_lite", settings(start), photos, tmp_path / "run")
    assert (run / "samples" / "0000002.png").is_file()
    both = load_capms(run / "weights.safetensors")
    assert both.unet is not None and both.vae is None
    both.unet.check_fits(SD_UNET, WIDTHS)
    model = load_sd(start / "sd.safetensors", torch.device("cpu"), torch.float32)
    x = torch.randn(2, 4, 8, 8, generator=generator_at(0, 1))
    with torch.no_grad():
        plain = model.denoise(x, 1.0, x, model.context(None), 2)
        with attached(both.unet, model.unet, torch.tensor([0.2, 0.6])):
            changed = model.denoise(x, 1.0, x, model.context(None), 2)
    assert torch.isfinite(changed).all() and not torch.equal(changed, plain)

    on = task_of(photos, start, tmp_path, f"model.capm={run}")
    begun = parts_of(on.build())[1].state_dict()
    assert all(torch.equal(value, begun[name]) for name, value in both.unet.state_dict().items())


def test_the_vaes_half_of_another_file_joins(photos: Path, start: Path, tmp_path: Path) -> None:
    """Its half for an SVD's UNet does not."""
    file = tmp_path / "svd.safetensors"
    halves = [CAPM(CAPMShape(name, {"up_blocks.0": 32}, code=8)) for name in (SVD_UNET, SVD_VAE)]
    write_capms(file, CAPMs(*halves), "nothing")
    task = task_of(photos, start, tmp_path, f"model.capm={file}")
    task.export(task.build(), tmp_path / "both.safetensors", "nothing")
    both = load_capms(tmp_path / "both.safetensors")
    assert both.unet is not None and both.unet.shape.backbone == SD_UNET
    assert both.vae is not None and both.vae.shape.backbone == SVD_VAE
    kept = halves[1].half().float().state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in both.vae.state_dict().items())


def test_the_lite_one_is_small_enough() -> None:
    """Its half for the UNet stays under 0.35 MB in float16."""
    model = read_recipe(BUNDLED / "capm_sd_lite.toml").model
    chosen = {key: model[key] for key in ("components", "code", "prompt", "size")}
    with torch.device("meta"):
        capm = CAPM(CAPMShape(SD_UNET, decoder_widths([32, 64, 32]), **chosen))
    assert sum(2 * p.numel() for p in capm.parameters()) < 0.33e6


def test_the_pack_loads_its_own_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_capms(tmp_path / "own.safetensors", CAPMs(CAPM(CAPMShape(SD_UNET, WIDTHS))), "nothing")
    monkeypatch.setitem(capm_file.BUNDLED, "sd_lite", tmp_path / "own.safetensors")
    half = load_capms("sd_lite").unet
    assert half is not None and half.shape.backbone == SD_UNET
    monkeypatch.setitem(capm_file.BUNDLED, "sd_lite", tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match=r"none\.safetensors: no such file"):
        load_capms("sd_lite")


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["model.start="], "model.start is empty"),
        (["model.control="], "model.control is empty: expected the control that stays as it is"),
        (["model.code=0"], "code=0.*: expected at least 1 of each"),
        (["model.widths=1"], "unknown setting model.widths"),
        (["loss.drop=2"], "loss.drop is 2.0: expected a share from 0 to 1"),
        (["loss.untold=-1"], "loss.untold is -1.0: expected a share from 0 to 1"),
        (["loss.edm=1"], "unknown setting loss.edm"),
    ],
)
def test_wrong_settings_are_named(sets: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=said) as caught:
        CAPMSDTask(read_recipe(BUNDLED / "capm_sd_lite.toml", sets), tmp_path, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_control_of_another_sd_is_named(photos: Path, start: Path, tmp_path: Path) -> None:
    wide = unet_of(read_sd(start / "sd.safetensors")).config
    other = Control({**wide, "block_out_channels": [32, 64], "attention_head_dim": [1, 2]})
    write_control(tmp_path / "other.safetensors", other, "nothing")
    recipe = read_recipe(
        BUNDLED / "capm_sd_lite.toml", [*settings(start), f"model.control={tmp_path}/other.safetensors"]
    )
    with pytest.raises(SettingError, match=r"control is made for a UNet of widths .32, 64."):
        CAPMSDTask(recipe, photos, tmp_path).build()
