"""A Stable Diffusion and its control: what they learn from, and that what they leave is what the pack loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from tests.support.tiny_training import settings_of, train_tiny
from training.loop.draws import generator_at
from training.loop.recipe import BUNDLED, read_recipe
from training.tasks.control import ControlTask, as_velocity, by_frame, controlled, parts_of
from training.tasks.sd import FrameLatents, SDDataSettings, SDModelSettings, SDTask, noised, nothing, unet_shape
from training.tasks.tasks import make_task
from vsr_ops.backbones.sd import load_sd
from vsr_ops.checkpoints.sd import SDWeights, read_sd, write_sd
from vsr_ops.errors import CheckpointError, SettingError
from vsr_ops.modules.control import load_control


def task_of(name: str, photos: Path, vaes: tuple[Path, Path], out: Path, *sets: str) -> Any:
    task = make_task(read_recipe(BUNDLED / f"{name}_lite.toml", [*settings_of(name, vaes), *sets]), photos, out)
    task.prepare(torch.device("cpu"))
    return task


def test_a_sample_is_one_place_of_clean_latents_and_hint(tmp_path: Path) -> None:
    """Every latent of the shard holds its own number."""
    settings = SDDataSettings(size=64, frames=3, clips=2, crop=4)
    latents = FrameLatents(tmp_path, settings)
    numbers = torch.arange(2 * 3 * 64.0).view(2, 3, 1, 8, 8).expand(-1, -1, 4, -1, -1)
    clips = [
        {"clean": n.half(), "lr": -n.half(), "level": torch.tensor(i / 2), "factor": torch.tensor(2.0)}
        for i, n in enumerate(numbers)
    ]
    latents._write(0, clips)
    seen: set[tuple[float, float]] = set()
    for number in range(60):
        sample = latents.draw(generator_at(0, number))
        clean, hint = sample["clean"], sample["hint"]
        assert clean.shape == hint.shape == (4, 4, 4) and torch.equal(clean, -hint)
        first = float(clean[0, 0, 0]) / 2
        expected = first + torch.arange(4.0)[:, None] * 8 + torch.arange(4.0)
        torch.testing.assert_close(clean[2] / 2, expected)
        assert float(sample["level"]) == (0.5 if first >= 192 else 0.0)
        seen.add((first // 64, first % 64))
    assert {frame for frame, _ in seen} == set(range(6)) and len(seen) > 30


def test_noise_and_velocity_are_diffusers() -> None:
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    clean, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    timestep = torch.tensor([0, 400, 999])
    scaled, target = noised(clean, noise, timestep)
    torch.testing.assert_close(scaled, scheduler.add_noise(clean, noise, timestep), rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]
    torch.testing.assert_close(target, scheduler.get_velocity(clean, noise, timestep), rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]


def test_the_lite_stable_diffusion_is_small_enough() -> None:
    recipe = read_recipe(BUNDLED / "sd_lite.toml")
    shape = SDModelSettings(**{key: tuple(v) if isinstance(v, list) else v for key, v in recipe.model.items()})
    with torch.device("meta"):
        unet = UNet2DConditionModel(**unet_shape(shape))
    assert sum(p.numel() for p in unet.parameters()) < 0.85e6


def test_a_new_control_leaves_the_loss_as_it_is(photos: Path, vaes: tuple[Path, Path], tmp_path: Path) -> None:
    task = task_of("control", photos, vaes, tmp_path)
    model = task.build().eval()
    unet, _ = parts_of(model)
    samples = [task.sample(generator_at(0, number)) for number in range(3)]
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
    frames = by_frame(batch)
    assert frames["hint"].any()
    with torch.no_grad():
        scaled, target = noised(frames["clean"], frames["noise"], frames["timestep"])
        plain = unet(scaled, frames["timestep"], nothing(unet, scaled)).sample
        assert torch.equal(controlled(model, frames["hint"], scaled, frames["timestep"]), plain)
        loss, _ = task.loss(model, batch)
    assert float(loss) == pytest.approx(float((plain - target).square().mean()))


def test_some_samples_have_no_hint(photos: Path, vaes: tuple[Path, Path], tmp_path: Path) -> None:
    task = task_of("control", photos, vaes, tmp_path, "loss.drop=0.5")
    empty = sum(not task.sample(generator_at(0, number))["hint"].any() for number in range(40))
    assert 10 < empty < 30


def test_a_run_of_each_is_what_the_pack_loads(photos: Path, vaes: tuple[Path, Path], tmp_path: Path) -> None:
    """The control starts from the SD's run, by its folder; both share their clips."""
    shared = f"data.latents={tmp_path / 'latents'}"
    sd = train_tiny("sd_lite", [*settings_of("sd", vaes), shared], photos, tmp_path / "sd")
    sets = [text for text in settings_of("control", vaes) if not text.startswith("model.start")]
    control = train_tiny("control_lite", [*sets, f"model.start={sd}", shared], photos, tmp_path / "control")
    assert (sd / "samples" / "0000002.png").is_file() and (control / "samples" / "0000002.png").is_file()

    cpu = torch.device("cpu")
    acting = load_control(control / "weights.safetensors")
    model = load_sd(sd / "weights.safetensors", cpu, torch.float32, acting)
    plain = load_sd(sd / "weights.safetensors", cpu, torch.float32)
    assert (model.tile.height, model.tile.frames, model.prediction, model.factor) == (8, 2, "v_prediction", 2)
    x, lr = (torch.randn(2, 4, 8, 8, generator=generator_at(0, seed)) for seed in (1, 2))
    with torch.no_grad():
        outs = [found.denoise(x, 1.0, lr, found.context(None), 2) for found in (model, plain)]
    assert torch.isfinite(outs[0]).all() and not torch.equal(*outs)

    start = make_task(read_recipe(BUNDLED / "sd_lite.toml", [f"model.start={sd}"]), photos, tmp_path)
    before = read_sd(sd / "weights.safetensors").unet
    assert all(torch.equal(before[name], value) for name, value in start.build().state_dict().items())


def test_a_control_learns_noise_where_its_sd_predicts_that(
    photos: Path, vaes: tuple[Path, Path], tmp_path: Path
) -> None:
    weights = read_sd(vaes[1].parent / "sd.safetensors")
    path = tmp_path / "eps.safetensors"
    write_sd(path, SDWeights(weights.unet_config, "epsilon", weights.unet, weights.tile), "nothing")
    task = task_of("control", photos, vaes, tmp_path, f"model.start={path}")
    model = task.build().eval()
    batch = {key: value[None].expand(2, *value.shape) for key, value in task.sample(generator_at(0, 0)).items()}
    frames = by_frame(batch)
    with torch.no_grad():
        scaled, target = noised(frames["clean"], frames["noise"], frames["timestep"])
        found = controlled(model, frames["hint"], scaled, frames["timestep"])
        loss, _ = task.loss(model, batch)
    assert float(loss) == pytest.approx(float((found - frames["noise"]).square().mean()))
    torch.testing.assert_close(as_velocity(frames["noise"], scaled, frames["timestep"]), target, rtol=1e-3, atol=1e-3)


def test_a_control_may_use_its_sds_own_vae(photos: Path, vaes: tuple[Path, Path], tmp_path: Path) -> None:
    """Own files have the bundled one."""
    task = task_of("control", photos, vaes, tmp_path, "model.vae=")
    named = task_of("control", photos, vaes, tmp_path, "model.vae=lite")  # refuses latents of another VAE
    assert torch.equal(task.sample(generator_at(0, 0))["clean"], named.sample(generator_at(0, 0))["clean"])


@pytest.mark.parametrize(
    ("task", "sets", "said"),
    [
        (SDTask, ["model.block_out_channels=[64,32,32]"], "expected multiples of the first"),
        (SDTask, ["model.block_out_channels=[48,48,48]"], "itself a multiple of 32"),
        (SDTask, ["model.attends=[0,1]"], "model.attends is .0, 1.: expected one number for each of 3 levels"),
        (SDTask, ["data.crop=10"], "data.crop is 10: expected a multiple of 4 from 4 to data.size / 8, which is 24"),
        (SDTask, ["loss.drop=1"], "unknown setting loss.drop: expected none"),
        (ControlTask, ["model.start="], "model.start is empty"),
        (ControlTask, ["loss.drop=2"], "loss.drop is 2.0: expected a share from 0 to 1"),
    ],
)
def test_wrong_settings_are_named(task: Any, sets: list[str], said: str, tmp_path: Path) -> None:
    name = "sd" if task is SDTask else "control"
    with pytest.raises(SettingError, match=said):
        task(read_recipe(BUNDLED / f"{name}_lite.toml", sets), tmp_path, tmp_path)


def test_a_missing_start_is_named(tmp_path: Path) -> None:
    recipe = read_recipe(BUNDLED / "control_lite.toml", [f"model.start={tmp_path / 'none'}"])
    with pytest.raises(CheckpointError, match="none: no such file"):
        ControlTask(recipe, tmp_path, tmp_path).build()
