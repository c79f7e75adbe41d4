"""CAPM's training beside a frozen UNet."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import TINY_UNET, TINY_VAE
from tests.support.tiny_capm import VAE_SHAPE, filled
from tests.support.tiny_training import descended
from training.loop.draws import generator_at
from training.loop.recipe import to_recipe
from training.loop.trainer import freeze
from training.tasks.capm import CAPMDataSettings, CAPMLatents, CAPMTask, one_batch, parts_of, watched
from vsr_ops.backbones.svd import SVD
from vsr_ops.checkpoints.svd import SVDWeights, write_svd
from vsr_ops.errors import SettingError
from vsr_ops.modules.capm import SVD_UNET, decoder_widths
from vsr_ops.modules.capm_file import CAPMs, load_capms, write_capms

RECIPE: dict[str, object] = {
    "task": "capm",
    "train": {"steps": 1},
    "data": {"size": 64, "frames": 2, "clips": 4, "upscaler": "bicubic", "clean_share": 0.3},
}


@pytest.fixture
def task(tiny: SVD, tmp_path: Path) -> CAPMTask:
    """The trainer's task on a tiny SVD and one photograph; its clips are encoded."""
    folder = tmp_path
    unet, vae = tiny.unet.state_dict(), tiny.vae.state_dict()
    weights = SVDWeights(TINY_UNET, TINY_VAE, None, unet, vae, None, (8, 8, 4), {})
    write_svd(folder / "svd.safetensors", weights, "nothing")
    pixels = np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((100, 100), Image.Resampling.BICUBIC).save(folder / "oak.png")
    recipe = to_recipe({**RECIPE, "model": {"start": str(folder / "svd.safetensors"), "code": 8}})
    made = CAPMTask(recipe, folder, folder)
    made.prepare(torch.device("cpu"))
    return made


def test_the_trainer_s_task_learns_with_a_frozen_unet(task: CAPMTask, tmp_path: Path) -> None:
    samples = [task.sample(generator_at(0, number)) for number in range(3)]
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
    assert bool((batch["hint"].isnan() | (batch["hint"] == batch["level"])).all())
    torch.manual_seed(0)
    model = task.build().train()
    freeze(model, task.trains)
    unet, _ = parts_of(model)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    found = descended(lambda: task.loss(model, batch), model, 5e-3, 8)
    assert set(found) == {"loss", "edm", "agree", "rank"}
    assert found["edm"][-1] < 0.8 * found["edm"][0] and found["agree"][-1] < 0.5 * found["agree"][0]
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    with torch.no_grad():
        assert task.picture(model.eval(), batch).shape[0] == 3
    task.export(model, tmp_path / "capm.safetensors", "nothing")
    written = load_capms(tmp_path / "capm.safetensors")
    assert written.unet is not None and written.vae is None
    written.unet.check_fits(SVD_UNET, decoder_widths(TINY_UNET["block_out_channels"]))


def test_a_new_one_is_settled_on_the_features_it_will_see(task: CAPMTask) -> None:
    unet, capm = parts_of(task.build())
    batch = one_batch(task.sample)
    with torch.no_grad(), watched(capm, unet) as features:
        task.loss(torch.nn.ModuleDict({"unet": unet, "capm": capm}), batch)
    for level, value in features.items():
        assert float(capm.get_buffer(f"levels.{level.replace('.', '_')}.scale")) == pytest.approx(float(value.std()))


def test_a_run_that_goes_on_keeps_the_other_half(task: CAPMTask, tmp_path: Path) -> None:
    file, half = tmp_path / "begun.safetensors", filled(VAE_SHAPE)
    write_capms(file, CAPMs(vae=half), "nothing")
    start = {"start": task.shape.start, "capm": str(file), "code": 8}
    on = CAPMTask(to_recipe({**RECIPE, "model": start}), Path(task.shape.start).parent, tmp_path)
    model = on.build()
    on.export(model, tmp_path / "both.safetensors", "nothing")
    both = load_capms(tmp_path / "both.safetensors")
    assert both.vae is not None and both.unet is not None
    kept = half.half().float().state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in both.vae.state_dict().items())


def test_the_level_of_a_clip_is_what_it_went_through(task: CAPMTask) -> None:
    levels = {round(float(task.sample(generator_at(0, number))["level"]) * 51, 3) for number in range(20)}
    drawn = {float(task._latents.crf(generator_at(1000, number), torch.empty(0)) or 0) for number in range(4)}
    assert levels == drawn and all(crf == 0 or 15 <= crf <= 35 for crf in drawn)


def test_clips_of_lower_bit_rates_are_worse_and_told_coarser(task: CAPMTask, tmp_path: Path) -> None:
    """What is told is the factor that met the rate; the same seed gives the same clips; some stay clean."""
    found: list[tuple[float, float]] = []
    base = CAPMDataSettings(size=64, frames=3, clips=2, upscaler="bicubic", clean_share=0.0)
    for rate in (2_000_000, 200_000, 20_000):
        latents = CAPMLatents(tmp_path, replace(base, bit_rate=(rate, rate)))
        made = [latents._pair(task._folder, None, generator_at(5, 1)) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(made[0][:2], made[1][:2], strict=True))
        found.append((float(made[0][2]["level"]), float((made[0][1] - made[0][0]).square().mean())))
    assert sorted(found) == found and len(set(found)) == 3
    mixed = CAPMLatents(tmp_path, replace(base, clean_share=0.5, bit_rate=(10_000, 100_000)))
    levels = [float(mixed._pair(task._folder, None, generator_at(5, seed))[2]["level"]) for seed in range(20)]
    assert 4 < levels.count(0.0) < 16


def test_shards_from_before_there_were_bit_rates_go_on(task: CAPMTask, tmp_path: Path) -> None:
    coder = task.coder(torch.device("cpu"))
    settings = CAPMDataSettings(size=64, frames=2, clips=4)
    made = [CAPMLatents(tmp_path, each)._made_from(coder) for each in (settings, replace(settings, bit_rate=(1, 2)))]
    assert "bit_rate" not in made[0]["settings"] and made[1]["settings"]["bit_rate"] == (1, 2)


@pytest.mark.parametrize("weighing", ["softmax", "even"])
def test_rows_of_the_papers_ablation_train_and_load(task: CAPMTask, weighing: str, tmp_path: Path) -> None:
    task.shape = replace(task.shape, weighing=weighing)
    task.export(task.build(), tmp_path / "capm.safetensors", "nothing")
    written = load_capms(tmp_path / "capm.safetensors").unet
    assert written is not None and written.shape.weighing == weighing


@pytest.mark.parametrize(
    ("table", "values", "said"),
    [
        ("model", {"start": ""}, "model.start is empty"),
        ("model", {"components": 0}, "components=0"),
        ("data", {"finest": 40}, "data.finest is 40"),
        ("data", {"degradation": "sdatc"}, "data.degradation is 'sdatc'"),
    ],
)
def test_a_wrong_recipe_is_refused(table: str, values: dict[str, object], said: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError) as caught:
        CAPMTask(to_recipe({**RECIPE, table: values}), tmp_path, tmp_path)
    assert said in str(caught.value) and "\n" not in str(caught.value)
