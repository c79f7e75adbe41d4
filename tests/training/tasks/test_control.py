"""A control trained as SDATC does: with the UNet's decoder, on clips, and with the DCM before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.support.tiny_training import descended, settings_of, train_tiny
from training.loop.draws import generator_at
from training.loop.recipe import BUNDLED, read_recipe
from training.loop.trainer import Batches, freeze
from training.tasks.control import ClipLatents, ControlDataSettings, by_frame, first_frames, learns, parts_of
from training.tasks.sd import read_start_sd, unet_of
from training.tasks.tasks import make_task
from vsr_ops.backbones.sd import load_sd
from vsr_ops.checkpoints.safefile import UPSCALER_KEY
from vsr_ops.checkpoints.sd import TELLING_BIAS, read_sd
from vsr_ops.errors import CheckpointError, SettingError
from vsr_ops.modules.control import load_control
from vsr_ops.modules.dcm import load_dcm

CLIPS = ["data.frames=3", "data.crop_frames=2", "data.bit_rate=[20000, 60000]"]


def clips_of(vaes: tuple[Path, Path]) -> list[str]:
    """What makes control.toml tiny."""
    return [*(text for text in settings_of("control", vaes) if not text.startswith("data.frames")), *CLIPS]


def task_of(name: str, sets: list[str], photos: Path, out: Path) -> Any:
    task = make_task(read_recipe(BUNDLED / f"{name}.toml", sets), photos, out)
    task.prepare(torch.device("cpu"))
    return task


def upscaler_in(path: Path) -> str:
    with safe_open(path, "pt") as file:
        return file.metadata()[UPSCALER_KEY]


def test_a_sample_is_one_place_of_frames_in_a_row(tmp_path: Path) -> None:
    """Every latent of the shard holds its own number."""
    latents = ClipLatents(tmp_path, ControlDataSettings(size=64, frames=4, clips=2, crop=4, crop_frames=3))
    numbers = torch.arange(2 * 4 * 64.0).view(2, 4, 1, 8, 8).expand(-1, -1, 4, -1, -1)
    clips = [{"clean": n, "lr": -n, "level": torch.tensor(0.0), "factor": torch.tensor(1.0)} for n in numbers]
    latents._write(0, clips)
    firsts: set[float] = set()
    for number in range(40):
        sample = latents.draw(generator_at(0, number))
        clean = sample["clean"]
        assert clean.shape == (3, 4, 4, 4) and torch.equal(clean, -sample["hint"])
        assert torch.equal(clean[1:] - clean[:-1], torch.full_like(clean[1:], 64.0))
        firsts.add(float(clean[0, 0, 0, 0]) // 64)
    assert firsts == {0, 1, 4, 5}


def test_frames_of_a_clip_share_its_timestep(photos: Path, vaes: tuple[Path, Path], tmp_path: Path) -> None:
    """The loss of clips is that of their frames, each with the clip's timestep and noise of its own."""
    task = task_of("control", clips_of(vaes), photos, tmp_path)
    batch = Batches(task, 0, 2)[0]
    frames = by_frame(batch)
    assert batch["clean"].shape == (2, 2, 4, 8, 8) and frames["clean"].shape == (4, 4, 8, 8)
    assert frames["timestep"].tolist() == [int(t) for t in batch["timestep"] for _ in range(2)]
    assert not torch.equal(batch["noise"][0, 0], batch["noise"][0, 1])
    assert torch.equal(first_frames(batch)["noise"], batch["noise"][:, 0])
    model = task.build().eval()
    with torch.no_grad():
        whole = float(task.loss(model, batch)[0])
        clips = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(2)]
        single = [
            {k: v[:, j : j + 1] if v.ndim > 1 else v for k, v in clip.items()} for clip in clips for j in range(2)
        ]
        apart = [float(task.loss(model, frame)[0]) for frame in single]
    assert whole == pytest.approx(sum(apart) / 4, rel=1e-4)


def test_the_decoder_learns_and_the_encoder_stays(photos: Path, vaes: tuple[Path, Path], tmp_path: Path) -> None:
    task = task_of("control", clips_of(vaes), photos, tmp_path)
    torch.manual_seed(0)
    model = task.build().train()
    freeze(model, task.trains)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = Batches(task, 0, 2)[0]
    found = descended(lambda: task.loss(model, batch), model, 3e-3, 8)
    assert found["loss"][-1] < 0.9 * found["loss"][0]
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    parts = {".".join(name.split(".")[:2]) for name in moved}
    assert {"unet.up_blocks", "unet.conv_out", "unet.conv_norm_out"} < parts
    assert all(part.startswith(("control.", "unet.up", "unet.conv_out", "unet.conv_norm")) for part in parts)
    with torch.no_grad():
        assert torch.isfinite(task.picture(model.eval(), batch)).all()


def test_the_frozen_way_trains_the_control_alone(photos: Path, vaes: tuple[Path, Path], tmp_path: Path) -> None:
    task = task_of("control", [*clips_of(vaes), "model.decoder=false"], photos, tmp_path)
    assert {name.split(".")[0] for name, _ in task.build().named_parameters() if task.trains(name)} == {"control"}
    task.export(task.build(), tmp_path / "c.safetensors", "nothing")
    assert not (tmp_path / "c_sd.safetensors").exists()


def test_what_tells_a_published_models_prediction_is_not_trained(tmp_path: Path) -> None:
    shape = task_shape(tmp_path)
    assert learns(shape, "unet.up_blocks.3.attentions.2.transformer_blocks.0.norm1.weight")
    assert not learns(shape, f"unet.{TELLING_BIAS}") and not learns(shape, "unet.down_blocks.0.resnets.0.conv1.weight")


def task_shape(out: Path) -> Any:
    return make_task(read_recipe(BUNDLED / "control.toml"), out, out).shape  # type: ignore[attr-defined]


def test_a_run_leaves_a_control_and_its_sd_which_go_on(photos: Path, vaes: tuple[Path, Path], tmp_path: Path) -> None:
    run = train_tiny("control", [*clips_of(vaes), "train.accumulation=1"], photos, tmp_path / "run")
    first, sd = vaes[1].parent / "sd.safetensors", run / "weights_sd.safetensors"
    before, after = load_file(first), load_file(sd)
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all(".output_blocks." in key or ".diffusion_model.out." in key for key in changed)
    assert upscaler_in(sd) == upscaler_in(run / "weights.safetensors") == "bicubic"

    cpu = torch.device("cpu")
    control = load_control(run / "weights.safetensors")
    tuned, plain = (load_sd(path, cpu, torch.float32, control) for path in (sd, first))
    x, lr = (torch.randn(2, 4, 8, 8, generator=generator_at(0, seed)) for seed in (1, 2))
    with torch.no_grad():
        outs = [model.denoise(x, 1.0, lr, model.context(None), 2) for model in (tuned, plain)]
    assert torch.isfinite(outs[0]).all() and not torch.equal(*outs)

    begun = unet_of(read_start_sd(str(run))).state_dict()
    assert all(torch.equal(begun[key], value) for key, value in read_sd(sd).unet.items())
    sets = [text for text in clips_of(vaes) if not text.startswith("model.start")]
    on = task_of("control", [*sets, f"model.start={run}", f"model.control={run}"], photos, tmp_path)
    unet, going = parts_of(on.build())
    assert all(torch.equal(unet.state_dict()[key], value) for key, value in begun.items())
    assert all(torch.equal(going.state_dict()[key], value) for key, value in control.state_dict().items())


def test_the_unets_loss_reaches_the_dcm(photos: Path, vaes: tuple[Path, Path], tmp_path: Path) -> None:
    """Without a loss of its own; and clips without a hint teach it nothing."""
    sets = [*settings_of("control_dcm", vaes), "data.frames=2", "loss.guide=0", "loss.drop=0"]
    task = task_of("control_dcm", sets, photos, tmp_path)
    torch.manual_seed(0)
    model = task.build().train()
    freeze(model, task.trains)
    _, control = parts_of(model)
    for conv in (*control.controlnet_down_blocks, control.controlnet_mid_block):
        torch.nn.init.normal_(conv.weight, std=0.1)  # type: ignore[arg-type]
    torch.nn.init.normal_(control.conv_in.weight, std=0.1)
    batch = Batches(task, 0, 1)[0]
    felt: list[float] = []
    for kept in (1.0, 0.0):
        batch["kept"][:] = kept
        model.zero_grad()
        task.loss(model, batch)[0].backward()
        parts: Any = model
        assert all(p.grad is None for p in parts["encoder"].parameters())
        felt.append(sum(float(p.grad.square().sum()) for p in parts["dcm"].parameters() if p.grad is not None))
    assert felt[0] > 0 == felt[1]


def test_a_run_with_the_dcm_leaves_three_files(photos: Path, vaes: tuple[Path, Path], tmp_path: Path) -> None:
    sets = [*settings_of("control_dcm", vaes), "data.frames=2", "train.accumulation=1", "run.workers=0"]
    run = train_tiny("control_dcm", sets, photos, tmp_path / "run")
    assert (run / "samples" / "0000002.png").is_file()
    names = {path.name for path in run.glob("*.safetensors")}
    assert names == {"weights.safetensors", "weights_sd.safetensors", "dcm.safetensors"}
    assert upscaler_in(run / "weights.safetensors") == upscaler_in(run / "weights_sd.safetensors") == "dcm.safetensors"
    frames = torch.rand(1, 3, 8, 8, generator=generator_at(0, 1))
    ours, bundled = (load_dcm(path, torch.device("cpu")) for path in (run / "dcm.safetensors", "lite"))
    assert 0 < float((ours(frames) - bundled(frames)).abs().mean()) < 0.05
    load_control(run / "weights.safetensors")
    read_sd(run / "weights_sd.safetensors")


@pytest.mark.parametrize(
    ("name", "sets", "said"),
    [
        ("control", ["data.crop_frames=6"], "data.crop_frames is 6: expected 1 to data.frames, which is 5"),
        ("control", ["data.bit_rate=[9]"], r"data.bit_rate is \[9\]: expected the lowest and the highest, above 0"),
        ("control", ["data.bit_rate=[9, 8]"], r"data.bit_rate is \[9, 8\]"),
        ("control", ["data.bit_rate=[0, 8]"], r"data.bit_rate is \[0, 8\]"),
        ("control_dcm", ["data.size=100"], "data.size is 100, data.frames 5: expected a multiple of 64"),
        ("control_dcm", ["data.degradation=rain"], "data.degradation is 'rain'"),
        ("control_dcm", ["loss.drop=-1"], "loss.drop is -1.0: expected a share"),
        ("capm_sd_lite", ["model.decoder=true"], "model.decoder is true: this task trains CAPM alone"),
    ],
)
def test_wrong_settings_are_named(name: str, sets: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=said):
        make_task(read_recipe(BUNDLED / f"{name}.toml", sets), tmp_path, tmp_path)


def test_a_foreign_dcm_is_refused_before_it_trains(vaes: tuple[Path, Path], photos: Path, tmp_path: Path) -> None:
    sets = [*settings_of("control_dcm", vaes), f"model.dcm={vaes[1].parent / 'sd.safetensors'}"]
    with pytest.raises(CheckpointError, match="expected kind 'dcm'"):
        task_of("control_dcm", sets, photos, tmp_path).build()
