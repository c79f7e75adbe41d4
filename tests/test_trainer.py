"""The trainer: a killed run follows the curve it would have followed, and nothing it keeps is lost."""

from __future__ import annotations

import csv
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import AutoencoderKLTemporalDecoder
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.__main__ import main
from training.dcm import DCM
from training.draws import generator_at
from training.recipe import BUNDLED, Optimizer, Recipe, differences, learning_rate, read_recipe, to_recipe
from training.refiner import decode_refined
from training.sampled import SampledLatents, SampledSettings
from training.state import CHECKPOINT, LossFile, load
from training.tasks import TASKS, make_task
from training.trainer import Batches, Run, export, start, train, trained
from training.upscalers import ARCHITECTURES, upscaler_of
from training.vae import TEMPORAL, encoded, read_vae
from vsr_ops.dcm import load_dcm
from vsr_ops.errors import CheckpointError, SamplingError, SettingError
from vsr_ops.refiner import load_refiner, refine
from vsr_ops.svd import load_svd

ROOT = Path(__file__).parents[1]

TINY_DCM = """
task = "dcm"
[model]
embed_dim = 8
depths = [2]
num_heads = [2]
upsampler = "pixelshuffledirect"
[data]
size = 64
frames = 2
patch = 8
crops = 2
clean_share = 1.0
[train]
steps = 24
[optimizer]
lr = 2e-3
floor = 0.1
[run]
save_every = 8
sample_every = 100
"""


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps one precision for the whole process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.latents.SHARD", 2)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name in ("oak", "brick", "water"):  # numbered, they would be a video
        small = Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8))
        small.resize((200, 200), Image.Resampling.BICUBIC).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def vaes(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Runs of one step of a tiny picture VAE, and of the temporal VAE on top; beside them an untrained SVD on that."""
    folder = tmp_path_factory.mktemp("vaes")
    for recipe, sets in (
        ("lite_2_picture", []),
        ("vae_temporal_lite", ["data.frames=2", f"model.picture={folder / 'lite_2_picture'}"]),
    ):
        sets += ["train.steps=1", "train.precision=float32", "data.size=32", "model.block_out_channels=[32,32,32,32]"]
        sets += ["run.sample_every=100"]
        arguments = [
            str(BUNDLED / f"{recipe}.toml"),
            "--data",
            str(photos),
            "--out",
            str(folder / recipe),
            "--cpu",
        ]
        assert main([*arguments, *(word for text in sets for word in ("--set", text))]) == 0
    both = folder / "lite_2_picture", folder / "vae_temporal_lite"
    svd = make_task(read_recipe(BUNDLED / "lite_4_svd.toml", settings_of("svd", both)), photos, folder)
    svd.export(svd.build(), folder / "svd.safetensors", "nothing")
    return both


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
from training import state
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


# --- Tasks ----------------------------------------------------------------------------------------------------------


BICUBIC = "data.upscaler=bicubic"


def settings_of(name: str, vaes: tuple[Path, Path]) -> list[str]:
    """What makes a bundled recipe tiny."""
    if name == "dcm":
        return ["model.num_feat=8", "model.num_conv=2", "data.size=64", "data.frames=2", "data.patch=8"]
    if name.startswith("vae"):
        tiny = ["model.block_out_channels=[32,32,32,32]", "data.size=32"]
        if name == "vae_refined":
            return [
                *tiny,
                f"model.picture={vaes[0]}",
                "model.width=8",
                "model.blocks=2",
                "data.frames=2",
                "data.patch=8",
            ]
        return tiny + ([f"model.picture={vaes[0]}", "data.frames=2"] if name == "vae_temporal" else [])
    if name == "refiner":
        clips = ["data.size=64", "data.frames=2", "data.clips=2", "data.crop=32", "data.crop_frames=2"]
        return [f"model.start={vaes[1].parent / 'svd.safetensors'}", *clips, BICUBIC, "data.steps=[1,2]"]
    unet = ["model.block_out_channels=[32,32,32,32]", "model.num_attention_heads=[1,1,1,1]"]
    return [*unet, f"model.vae={vaes[1]}", "data.size=64", "data.frames=2", "data.clips=2", BICUBIC]


RECIPE_OF = {
    "dcm": "dcm_lite",
    "refiner": "lite_5_refiner",
    "svd": "lite_4_svd",
    "vae_picture": "lite_2_picture",
    "vae_refined": "lite_3_refined",
    "vae_temporal": "vae_temporal_lite",
}


@pytest.mark.parametrize("name", sorted(RECIPE_OF))
def test_every_task_learns_on_one_batch(name: str, photos: Path, vaes: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = read_recipe(BUNDLED / f"{RECIPE_OF[name]}.toml", settings_of(name, vaes))
    task = make_task(recipe, photos, tmp_path)
    task.prepare(torch.device("cpu"))
    torch.manual_seed(0)
    model = task.build().train()
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(task.trains(key))
    batch = Batches(pickle.loads(pickle.dumps(task)), 0, 1)[0]  # as a process that draws samples gets it
    optimizer = torch.optim.AdamW(trained(model), lr=2e-3)
    values: list[float] = []
    for _ in range(6):
        loss, numbers = task.loss(model, batch)
        assert all(np.isfinite(value) for value in numbers.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(float(loss.detach()))
    assert np.isfinite(values).all() and min(values[-2:]) < 0.97 * values[0]
    with torch.no_grad():
        picture = task.picture(model.eval(), batch)
    assert picture.shape[0] == 3 and torch.isfinite(picture).all()


def test_every_task_is_tried() -> None:
    assert set(RECIPE_OF) == set(TASKS)


@pytest.mark.parametrize("path", sorted(BUNDLED.glob("*.toml")), ids=lambda path: path.stem)
def test_bundled_recipes_fit_their_tasks(path: Path, tmp_path: Path) -> None:
    wants = {"vae_temporal": ["model.picture=x"], "svd": ["model.start=x"], "refiner": ["model.start=x"]}
    name = read_recipe(path).task
    recipe = read_recipe(path, wants.get(name, []))
    make_task(recipe, tmp_path, tmp_path)
    assert recipe.flat()["train.steps"] >= 1000
    assert recipe.run.trained_on or "lite" not in path.stem


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_an_exported_dcm_is_what_spandrel_loads(architecture: str, photos: Path, tmp_path: Path) -> None:
    from spandrel import ModelLoader

    recipe = tmp_path / "tiny.toml"
    recipe.write_text(TINY_DCM)
    read = read_recipe(recipe if architecture == "swinir" else BUNDLED / "dcm_lite.toml")
    task = make_task(read, photos, tmp_path)
    torch.manual_seed(0)
    model = task.build().eval()
    name = "dcm.safetensors"
    task.export(model, tmp_path / name, "nothing")
    loaded = ModelLoader().load_from_file(tmp_path / name)
    x = torch.rand(1, 3, 24, 40, generator=generator_at(0, 3))
    with torch.no_grad():
        ours, theirs = model(x).clamp(0, 1), loaded(x)  # type: ignore[operator]
        again = read_recipe(
            recipe if architecture == "swinir" else BUNDLED / "dcm_lite.toml", [f"model.start={tmp_path / name}"]
        )
        goes_on = make_task(again, photos, tmp_path).build().eval()(x).clamp(0, 1)
    assert (goes_on - theirs).norm() / ours.norm() < 1e-3
    assert loaded.scale == 4 and ours.shape == (1, 3, 96, 160)
    assert (ours - theirs).norm() / ours.norm() < 1e-3


def test_compact_starts_near_the_nearest_neighbour_and_sees_the_picture() -> None:
    """torch's own start leaves no signal after eighteen layers (1e-7), and such a network stays where it is."""
    torch.manual_seed(0)
    model = upscaler_of({"architecture": "compact"})[0].build(16)
    x = torch.rand(2, 3, 16, 16, generator=generator_at(0, 3))
    with torch.no_grad():
        added = model(x) - torch.nn.functional.interpolate(x, scale_factor=4)
    assert float(added.square().mean().sqrt()) < 0.1
    assert float((added[0] - added[1]).std()) > 1e-3


def train_tiny(recipe: str, sets: list[str], photos: Path, out: Path) -> Path:
    sets = [*sets, "train.steps=2", "train.precision=float32", "run.sample_every=2"]
    arguments = [str(BUNDLED / f"{recipe}.toml"), "--data", str(photos), "--out", str(out), "--cpu"]
    assert main([*arguments, *(word for text in sets for word in ("--set", text))]) == 0
    return out


def test_the_chain_of_lite_weights_fits_together(photos: Path, vaes: tuple[Path, Path], tmp_path: Path) -> None:
    """Each run starts from those before it by their folders, and what the last one leaves is what the pack loads."""
    dcm = train_tiny("dcm_lite", settings_of("dcm", vaes), photos, tmp_path / "dcm")
    guide = [f"data.upscaler={dcm}"]
    refined = train_tiny(
        "lite_3_refined", [*settings_of("vae_refined", vaes), f"model.dcm={dcm}"], photos, tmp_path / "r"
    )
    svd_sets = [text for text in settings_of("svd", vaes) if text != BICUBIC] + [f"model.vae={refined}"]
    svd = train_tiny("lite_4_svd", [*svd_sets, *guide], photos, tmp_path / "svd")
    clips = [text for text in settings_of("refiner", vaes) if text.startswith("data.") and text != BICUBIC]
    starts = [f"model.start={svd}", f"model.refiner={refined}"]
    last = train_tiny("lite_5_refiner", [*starts, *clips, *guide], photos, tmp_path / "last")

    low = torch.rand(2, 3, 16, 16, generator=generator_at(0, 6))
    upscaled = load_dcm(dcm / "weights.safetensors", "cpu")(low)
    model = load_svd(last / "weights.safetensors", torch.device("cpu"), torch.float32)
    refiner = load_refiner(last / "weights_refiner.safetensors")
    assert upscaled.shape == (2, 3, 64, 64) and refiner.shape.width == 8
    decoded = model.decode(model.encode(upscaled)).clamp(0, 1)
    assert torch.isfinite(refine(refiner, decoded, upscaled)).all()
    before, after = (load_file(run / "weights.safetensors") for run in (svd, last))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("first_stage_model.decoder.") for name in changed)
    assert not torch.equal(*(load_file(run / "weights_refiner.safetensors")["leave.weight"] for run in (refined, last)))


def test_a_refined_vae_becomes_a_temporal_one_that_gives_the_same_pictures(
    photos: Path, vaes: tuple[Path, Path], tmp_path: Path
) -> None:
    """Its latents have deviation 1 after SVD's factor; nothing else changes, frame by frame."""
    task = make_task(read_recipe(BUNDLED / "lite_3_refined.toml", settings_of("vae_refined", vaes)), photos, tmp_path)
    model: Any = task.build().eval()
    task.export(model, tmp_path / "vae.safetensors", "nothing")
    config, state = read_vae(tmp_path / "vae.safetensors", TEMPORAL)
    temporal = AutoencoderKLTemporalDecoder(**config)
    temporal.load_state_dict(state)
    x = 2 * torch.rand(2, 3, 32, 32, generator=generator_at(0, 7)) - 1
    with torch.no_grad():
        theirs = model["vae"].decoder(encoded(model["vae"], x))
        ours = temporal.decoder(temporal.quant_conv(temporal.encoder(x))[:, :4], torch.zeros(1, 2), num_frames=2)
        truth = torch.cat([task.sample(generator_at(0, n))["truth"] for n in range(16)])
        z = encoded(temporal, 2 * truth - 1) * config["scaling_factor"]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    assert 0.7 < float(z.square().mean().sqrt()) < 1.4


def test_the_refiners_decoder_starts_and_ends_as_the_svds(
    photos: Path, vaes: tuple[Path, Path], tmp_path: Path
) -> None:
    task = make_task(read_recipe(BUNDLED / "lite_5_refiner.toml", settings_of("refiner", vaes)), photos, tmp_path)
    model: Any = task.build().eval()
    start = vaes[1].parent / "svd.safetensors"
    svd = load_svd(start, torch.device("cpu"), torch.float32)
    z = torch.randn(1, 2, 4, 4, 4, generator=generator_at(0, 8))
    guide = torch.rand(1, 2, 3, 32, 32, generator=generator_at(0, 9))
    with torch.no_grad():
        decoded, refined = decode_refined(model, z, guide)
        theirs = svd.decode(z[0] / svd.scaling_factor)
    torch.testing.assert_close(decoded, theirs, atol=1e-4, rtol=1e-3)
    assert torch.equal(refined, guide)  # a new refiner adds nothing
    task.export(model, tmp_path / "again.safetensors", "nothing")
    before, after = load_file(start), load_file(tmp_path / "again.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(after[name], before[name], atol=1e-6, rtol=1e-3)


def test_a_refiners_sample_is_one_place_of_latents_guide_and_truth(tmp_path: Path) -> None:
    """Every latent of the shard holds its own number, and so do the pixels it stands for."""
    settings = SampledSettings(size=64, frames=4, clips=2, crop=32, crop_frames=2, sampled_share=0.5, latent_noise=0.0)
    latents = SampledLatents(tmp_path, settings, "float32")
    numbers = torch.arange(256.0).view(4, 1, 8, 8)
    cells = numbers.expand(-1, 4, -1, -1).half()
    pixels = numbers.repeat_interleave(8, 2).repeat_interleave(8, 3).expand(-1, 3, -1, -1).byte()
    clip = {"sampled": cells, "clean": cells / 2, "guide": pixels, "truth": 255 - pixels, "factor": torch.tensor(2.0)}
    latents._write(0, [clip, clip])
    seen: set[float] = set()
    for number in range(40):
        sample = latents.draw(generator_at(0, number))
        z, guide, truth = (sample[key] for key in ("z", "guide", "truth"))
        assert z.shape == (2, 4, 4, 4) and guide.shape == truth.shape == (2, 3, 32, 32)
        torch.testing.assert_close(255 * guide[:, :1, ::8, ::8], z[:, :1])
        torch.testing.assert_close(255 * guide[:, :1, 7::8, 7::8], z[:, :1])
        torch.testing.assert_close(guide + truth, torch.ones_like(guide))
        assert abs(float(z[1, 0, 0, 0] - z[0, 0, 0, 0])) == 64  # neighbours in time, forwards or backwards
        seen.add(float(z[0, 0, 0, 0]))
    assert len(seen) > 20


def test_a_share_of_the_refiners_latents_is_sampled(photos: Path, vaes: tuple[Path, Path], tmp_path: Path) -> None:
    sets = [*settings_of("refiner", vaes), "data.crop=64"]
    make_task(read_recipe(BUNDLED / "lite_5_refiner.toml", sets), photos, tmp_path).prepare(torch.device("cpu"))
    shard = torch.load(tmp_path / "latents" / "shard_0000.pt", weights_only=True)
    found = {"sampled": shard["sampled"].float(), "clean": shard["clean"].float() * shard["factor"]}
    for share, name in ((1.0, "sampled"), (0.0, "clean")):
        chosen = read_recipe(BUNDLED / "lite_5_refiner.toml", [*sets, f"data.sampled_share={share}"])
        z = make_task(chosen, photos, tmp_path).sample(generator_at(0, 1))["z"]
        known = [clip for both in (found[name], found[name].flip(1)) for clip in both]
        noise = min(float((z - clip).std()) for clip in known)
        assert noise == 0 if name == "sampled" else 0.12 < noise < 0.18


def test_an_exported_svd_runs_in_the_pipeline_and_starts_stage_two(
    photos: Path, vaes: tuple[Path, Path], tmp_path: Path
) -> None:
    sets = [*settings_of("svd", vaes), "train.steps=2", "train.precision=float32", "run.sample_every=100"]
    first = [str(BUNDLED / "lite_4_svd.toml"), "--data", str(photos), "--out", str(tmp_path / "one"), "--cpu"]
    assert main([*first, *(word for text in sets for word in ("--set", text))]) == 0
    model = load_svd(tmp_path / "one" / "weights.safetensors", torch.device("cpu"), torch.float32)
    assert (model.tile.height, model.tile.frames) == (8, 2)
    frames = torch.rand(2, 3, 64, 64, generator=generator_at(0, 4))
    z = model.encode(frames) * model.scaling_factor
    assert 0.3 < float(z.std()) < 3  # scaled to SVD's deviation
    out = model.denoise(
        z + torch.randn(z.shape, generator=generator_at(0, 5)), 1.0, model.encode(frames), model.context(None), 2
    )
    assert torch.isfinite(out).all()

    shared = f"data.latents={tmp_path / 'one' / 'latents'}"
    two = ["data.size=64", "data.frames=2", "data.clips=2", BICUBIC, "train.steps=1", "train.precision=float32"]
    two += [f"model.start={tmp_path / 'one'}", shared, "run.sample_every=100"]
    second = [str(BUNDLED / "svd_lite_stage2.toml"), "--data", str(photos), "--out", str(tmp_path / "two"), "--cpu"]
    assert main([*second, *(word for text in two for word in ("--set", text))]) == 0
    a, b = (load_file(tmp_path / name / "weights.safetensors") for name in ("one", "two"))
    same = {key for key in a if torch.equal(a[key], b[key])}
    unet = [key for key in a if key.startswith("model.diffusion_model.")]
    temporal = [key for key in unet if ".time_stack." in key or "time_pos_embed" in key]
    assert temporal and same.issuperset(temporal)
    assert len(same & set(unet)) < len(unet) and "model.diffusion_model.out.2.weight" not in same


def test_latents_of_another_recipe_are_refused(photos: Path, vaes: tuple[Path, Path], tmp_path: Path) -> None:
    sets = settings_of("svd", vaes)
    make_task(read_recipe(BUNDLED / "lite_4_svd.toml", sets), photos, tmp_path).prepare(torch.device("cpu"))
    other = make_task(read_recipe(BUNDLED / "lite_4_svd.toml", [*sets, "data.clean_share=0.9"]), photos, tmp_path)
    with pytest.raises(SettingError, match=r"latents of another recipe .settings differ"):
        other.prepare(torch.device("cpu"))


# --- Wrong input ----------------------------------------------------------------------------------------------------


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
            "missing.toml: no such recipe; those of the pack, in recipes/, are dcm.toml, dcm_lite.toml",
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


def test_dcm_crops_input_and_truth_at_one_place(photos: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(TINY_DCM)
    task = make_task(read_recipe(recipe), photos, tmp_path)
    assert isinstance(task, DCM)
    sample = task.sample(generator_at(0, 1))
    small = torch.nn.functional.avg_pool2d(sample["truth"], 4)
    assert sample["lr"].shape == (2, 3, 8, 8) and sample["truth"].shape == (2, 3, 32, 32)
    right = (small - sample["lr"]).abs().mean()
    assert right < 0.5 * (small.rot90(1, (2, 3)) - sample["lr"]).abs().mean()
    assert right < 0.5 * (small.flip(-1) - sample["lr"]).abs().mean()
