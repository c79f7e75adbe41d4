"""A control of a Stable Diffusion in the published layouts, with a text encoder and VAE of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.sd_files import StableDiffusion, stable_diffusion
from tests.support.text_files import open_clip, open_clip_tensors
from tests.support.tiny_training import BICUBIC, train_tiny
from training.loop.recipe import BUNDLED, read_recipe
from training.tasks.control import ControlModelSettings, build_parts, context_of
from training.tasks.tasks import make_task
from vsr_ops.backbones.text import encode_texts
from vsr_ops.checkpoints.sd import LITE_SD, read_sd
from vsr_ops.checkpoints.text_encoder import read_text_encoder
from vsr_ops.checkpoints.text_file import Texts, write_texts
from vsr_ops.errors import SettingError

SMALL = ["data.size=64", "data.frames=3", "data.clips=2", "data.crop=8", "data.crop_frames=2", BICUBIC]


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    return stable_diffusion()


@pytest.fixture(scope="module")
def published(sd: StableDiffusion, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file: UNet, VAE and text encoder under their original names."""
    path = tmp_path_factory.mktemp("published") / "sd.safetensors"
    save_file(sd.tensors() | open_clip_tensors(open_clip()), path)
    return path


def test_a_run_leaves_a_file_like_its_start(published: Path, photos: Path, tmp_path: Path) -> None:
    """Its own VAE encodes; all but the UNet's decoder is the start's, bit for bit."""
    run = train_tiny("control", [*SMALL, f"model.start={published}", "train.accumulation=1"], photos, tmp_path / "run")
    before, after = load_file(published), load_file(run / "weights_sd.safetensors")
    assert before.keys() == after.keys() and any(key.startswith("cond_stage_model.") for key in before)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all(".output_blocks." in key or ".diffusion_model.out." in key for key in changed)
    kept, tuned = read_sd(published), read_sd(run / "weights_sd.safetensors")
    assert (kept.unet_config, kept.vae_config) == (tuned.unet_config, tuned.vae_config)
    assert kept.prediction == tuned.prediction


def test_it_is_told_what_its_encoder_makes_of_the_empty_text(published: Path, photos: Path, tmp_path: Path) -> None:
    encoder = read_text_encoder(published)
    assert encoder is not None
    empty = encode_texts(encoder, "", "", torch.device("cpu"))
    task: Any = make_task(read_recipe(BUNDLED / "control.toml", [*SMALL, f"model.start={published}"]), photos, tmp_path)
    model = task.build()
    assert empty.prompt.shape[1] == 77 and torch.equal(model.context, empty.prompt)
    assert "context" not in model.state_dict()

    file = tmp_path / "text.safetensors"
    write_texts(file, Texts(empty.prompt + 1, empty.negative), ("", ""), "nothing")
    width = empty.width
    assert torch.equal(context_of(ControlModelSettings(str(published), text=str(file)), width), empty.prompt + 1)
    with pytest.raises(SettingError, match=f"the text is {width} wide, the UNet of .* takes 32"):
        context_of(ControlModelSettings(str(published), text=str(file)), 32)
    assert not context_of(ControlModelSettings("lite"), 32).any()


def test_without_an_encoder_a_text_is_asked_for(sd: StableDiffusion, tmp_path: Path) -> None:
    save_file(sd.tensors(), tmp_path / "sd.safetensors")
    with pytest.raises(SettingError, match=r"has no text encoder, .* give it as model\.text"):
        build_parts(ControlModelSettings(str(tmp_path / "sd.safetensors")))


def test_starts_that_cannot_be_trained_so_are_refused_before(sd: StableDiffusion, tmp_path: Path) -> None:
    folder = sd.save(tmp_path / "folder", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    with pytest.raises(SettingError, match="zero terminal SNR"):
        build_parts(ControlModelSettings(str(folder)))
    with pytest.raises(SettingError, match=r"model\.decoder is true: expected one \.safetensors file"):
        build_parts(ControlModelSettings(str(folder), decoder=True))
    assert build_parts(ControlModelSettings(str(LITE_SD), decoder=True))[0] == "v_prediction"
