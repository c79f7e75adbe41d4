"""Modules beside a VAE's decoder: a new one changes nothing, what is trained is what the decode node runs, and each
learns without a frozen weight moving."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.support.small_vaes import stream
from tests.support.tiny_training import BICUBIC, descended
from training.loop.draws import generator_at
from training.loop.recipe import BUNDLED, read_recipe
from training.loop.trainer import Batches, freeze
from training.tasks.decoder_module_kinds import CFWSettings
from training.tasks.decoder_modules import DecoderModuleTask
from training.tasks.sampled import CompressedLatents, CompressedSettings
from training.tasks.tasks import make_task
from vsr_ops.backbones.svd import load_svd
from vsr_ops.errors import SettingError
from vsr_ops.modules.capm_file import CAPMs, load_capms, write_capms
from vsr_ops.modules.cfw import load_cfw
from vsr_ops.modules.stam import load_stam

RECIPES = {"cfw": "cfw_lite", "stam": "stam_lite", "capm": "capm_vae_lite"}
LARGEST = {"cfw": 500_000, "stam": 300_000, "capm": 300_000}
"""Bytes of the lite files."""
FALLS = {"cfw": 0.92, "stam": 0.96, "capm": 0.985}
"""What six steps leave of a loss at most: they do half as much again."""


def task_of(kind: str, photos: Path, start: Path | str, out: Path, *more: str) -> DecoderModuleTask:
    tiny = ["data.size=64", "data.frames=3", "data.clips=2", "data.crop=32", "data.crop_frames=2", "data.steps=[1]"]
    sets = [*tiny, BICUBIC, f"model.start={start}", "train.precision=float32", *more]
    task = make_task(read_recipe(BUNDLED / f"{RECIPES[kind]}.toml", sets), photos, out)
    assert isinstance(task, DecoderModuleTask)
    return task


@pytest.fixture(scope="module")
def start(vaes: tuple[Path, Path]) -> Path:
    return vaes[1].parent / "svd.safetensors"


def clip_of(w: float, hint: float) -> dict[str, Tensor]:
    """Three frames of latents of deviation 1, their guide and what the modules are told."""
    rng = generator_at(0, 1)
    return {
        "z": torch.randn(3, 4, 4, 4, generator=rng),
        "guide": torch.rand(3, 3, 32, 32, generator=rng),
        "level": torch.tensor(0.5),
        "w": torch.tensor(w),
        "hint": torch.tensor(hint),
    }


def stirred(module: nn.Module) -> nn.Module:
    """As if trained: nothing of it is zero."""
    rng = generator_at(0, 2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=rng)
    return module


@pytest.mark.parametrize("kind", sorted(RECIPES))
def test_a_new_module_changes_nothing(kind: str, photos: Path, start: Path, tmp_path: Path) -> None:
    task = task_of(kind, photos, start, tmp_path)
    model = task.build().eval()
    with torch.no_grad():
        for hint in (0.5, float("nan")):
            clip = clip_of(1.0, hint)
            plain, plain_refined, _ = task.decoded(model, clip, module=False)
            decoded, refined, _ = task.decoded(model, clip)
            assert torch.equal(decoded, plain) and torch.equal(refined, plain_refined)


def test_without_a_refiner_the_decoded_clip_is_the_result(photos: Path, start: Path, tmp_path: Path) -> None:
    task = task_of("cfw", photos, start, tmp_path, 'model.refiner=""')
    model: Any = task.build().eval()
    with torch.no_grad():
        decoded, refined, _ = task.decoded(model, clip_of(0.5, 0.5))
    torch.testing.assert_close(refined, decoded, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("hint", [0.4, float("nan")])
@pytest.mark.parametrize("kind", sorted(RECIPES))
def test_what_is_trained_is_what_the_streaming_decoder_runs(
    kind: str, hint: float, photos: Path, start: Path, tmp_path: Path
) -> None:
    task, clip = task_of(kind, photos, start, tmp_path), clip_of(0.6, hint)
    model: Any = task.build().eval()
    stirred(model.beside)
    svd = load_svd(start, torch.device("cpu"), torch.float32)
    told = {
        "cfw": {"cfw": model.beside, "w": float(clip["w"]), "reference": clip["guide"]},
        "stam": {"stam": model.beside},
        "capm": {"capm": model.beside, "levels": clip["hint"].expand(3)},
    }[kind]
    with torch.no_grad():
        ours = task.decoded(model, clip)[0]
        plain = task.decoded(model, clip, module=False)[0]
        theirs = torch.stack(list(stream(svd.vae, clip["z"] / svd.scaling_factor, **told)))
    assert float((ours - plain).abs().max()) > 1e-2
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", sorted(RECIPES))
def test_a_module_learns_and_all_else_stays(kind: str, photos: Path, start: Path, tmp_path: Path) -> None:
    task = task_of(kind, photos, start, tmp_path, "loss.adm=0", "loss.vif=0")
    task.prepare(torch.device("cpu"))
    torch.manual_seed(0)
    model: Any = task.build().train()
    freeze(model, task.trains)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = Batches(task, 0, 2)[0]
    losses = descended(lambda: task.loss(model, batch), model, 5e-3, 6)["loss"]
    assert losses[-1] < FALLS[kind] * losses[0]
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all(name.startswith("beside.") for name in moved)
    with torch.no_grad():
        picture = task.picture(model.eval(), batch)
    assert 0 <= float(picture.min()) < float(picture.max()) <= 1


@pytest.mark.parametrize("kind", sorted(RECIPES))
def test_the_lite_files_are_small_and_hold_what_was_trained(kind: str, photos: Path, tmp_path: Path) -> None:
    task, path = task_of(kind, photos, "lite", tmp_path), tmp_path / "module.safetensors"
    model: Any = task.build()
    stirred(model.beside)
    task.export(model, path, "noise")
    assert path.stat().st_size <= LARGEST[kind]
    again = {"cfw": load_cfw, "stam": load_stam, "capm": lambda p: load_capms(p).vae}[kind](path)
    assert asdict(again.shape) == asdict(model.beside.shape)  # type: ignore[union-attr]
    for name, value in again.state_dict().items():  # type: ignore[union-attr]
        torch.testing.assert_close(value, model.beside.state_dict()[name], atol=1e-3, rtol=1e-3)


def test_the_unets_half_joins_the_file(photos: Path, start: Path, tmp_path: Path) -> None:
    from training.tasks.capm import CAPMTask

    sets = [f"model.start={start}", "data.size=64", "data.frames=2", "data.clips=2", BICUBIC]
    unet = make_task(read_recipe(BUNDLED / "capm_lite.toml", sets), photos, tmp_path)
    assert isinstance(unet, CAPMTask)
    half = unet.build()["capm"]  # type: ignore[index]
    write_capms(tmp_path / "unet.safetensors", CAPMs(unet=half), "nothing")
    task = task_of("capm", photos, start, tmp_path, f"model.capm={tmp_path / 'unet.safetensors'}")
    task.export(task.build(), tmp_path / "both.safetensors", "nothing")
    both, first = (load_file(tmp_path / f"{name}.safetensors") for name in ("both", "unet"))
    assert all(torch.equal(both[name], value) for name, value in first.items()) and len(both) > len(first)
    found = load_capms(tmp_path / "both.safetensors")
    assert found.unet is not None and found.vae is not None


def test_a_new_half_is_settled_and_one_that_goes_on_stays(photos: Path, start: Path, tmp_path: Path) -> None:
    """Its features come to it at a deviation near 1; another sees the ones it learnt with."""
    task = task_of("capm", photos, start, tmp_path)
    task.prepare(torch.device("cpu"))
    model: Any = task.build()
    scales = {level: float(model.beside.part(level).scale) for level in model.beside.shape.widths}
    assert all(scale != 1 for scale in scales.values())
    stirred(model.beside)
    task.export(model, tmp_path / "begun.safetensors", "nothing")
    on = task_of("capm", photos, start, tmp_path / "on", f"model.capm={tmp_path / 'begun.safetensors'}", "data.seed=5")
    on.prepare(torch.device("cpu"))
    again: Any = on.build()
    for name, value in again.beside.state_dict().items():
        torch.testing.assert_close(value, model.beside.state_dict()[name], atol=1e-3, rtol=1e-3)


def test_levels_come_with_their_clips(photos: Path, start: Path, tmp_path: Path) -> None:
    """A sample's level is its clip's, and that is the CRF its picture went through: a coarser one costs more."""
    task = task_of("cfw", photos, start, tmp_path, "data.clean_share=0.5", "data.finest=45", "data.coarsest=45")
    task.prepare(torch.device("cpu"))
    errors: dict[float, list[float]] = {}
    for number in range(24):
        sample = task.sample(generator_at(0, number))
        error = float((sample["guide"] - sample["truth"]).square().mean())
        errors.setdefault(round(float(sample["level"]) * 51), []).append(error)
    levels = [task._latents.crf(generator_at(1000, number), torch.empty(0)) or 0 for number in range(2)]
    assert set(errors) == set(levels)


def test_held_out_clips_are_those_of_validation(photos: Path, start: Path, tmp_path: Path) -> None:
    """They are made once, of the folder's held-out photographs, at each CRF; other folders have none."""
    from PIL import Image

    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("oak", "budgie-branch"):
        Image.open(photos / "oak.png").resize((800, 600)).save(folder / f"{name}.png")
    settings = CompressedSettings(size=64, frames=3, clips=2, crop=32, crop_frames=2, upscaler="bicubic")
    latents = CompressedLatents(tmp_path, settings, "float32")
    svd = load_svd(start, torch.device("cpu"), torch.float32)
    found = latents.held_out(folder, svd)
    assert sorted(found) == ["budgie-branch, CRF 15", "budgie-branch, CRF 35"]
    fine, coarse = (found[f"budgie-branch, CRF {crf}"] for crf in (15, 35))
    assert fine["z"].shape == (5, 4, 8, 8) and torch.equal(fine["truth"], coarse["truth"])
    apart = [float((clip["guide"] - clip["truth"]).square().mean()) for clip in (fine, coarse)]
    assert apart[0] < apart[1] and float(coarse["level"]) == pytest.approx(35 / 51)
    again = latents.held_out(tmp_path / "nowhere", svd)
    assert torch.equal(again["budgie-branch, CRF 15"]["z"], fine["z"])


@pytest.mark.parametrize(
    ("kind", "setting", "named"),
    [
        ("cfw", 'model.module="carpet"', "model.module is 'carpet': expected one of cfw, stam, capm"),
        ("cfw", "loss.w=[0.5]", r"loss.w is \[0.5\]"),
        ("cfw", "loss.w=[0.8, 1.2]", "at most 1"),
        ("stam", "model.blocks=2", "unknown setting model.blocks"),
        ("stam", "data.crop_frames=1", "data.crop_frames is 1"),
        ("capm", "data.degradation='sdatc'", "known CRF"),
        ("capm", "model.start=''", "model.start is empty"),
    ],
)
def test_a_wrong_recipe_is_one_line(kind: str, setting: str, named: str, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=named) as refusal:
        task_of(kind, photos, "lite", tmp_path, setting)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("kind", "known"), [("cfw", r"\[0, 1, 2\]"), ("stam", r"\[0, 1, 2, 3\]")])
def test_levels_that_are_not_there_are_named(kind: str, known: str, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=rf"model.levels names \[7\]: expected some of {known}"):
        task_of(kind, photos, "lite", tmp_path, "model.levels=[1, 7]").build()


def test_stablesrs_shape_is_the_default() -> None:
    assert CFWSettings().levels == (1, 2) and CFWSettings().blocks == 2
