"""A Stable Diffusion's file with a part of its UNet replaced."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vsr_ops.checkpoints.sd import LITE_SD, read_sd
from vsr_ops.checkpoints.sd_tuned import write_tuned_sd
from vsr_ops.errors import CheckpointError

NOTES = {"vsr.trained_on": "noise", "vsr.upscaler": "bicubic"}


def tuned(shift: float = 0.25) -> dict[str, Tensor]:
    """The bundled SD's up blocks, all moved."""
    return {name: value + shift for name, value in read_sd(LITE_SD).unet.items() if name.startswith("up_blocks.")}


def test_only_what_was_tuned_is_another(tmp_path: Path) -> None:
    path, before = tmp_path / "sd.safetensors", read_sd(LITE_SD)
    write_tuned_sd(path, LITE_SD, before.unet_config, tuned(), NOTES)
    after = read_sd(path)
    assert (after.unet_config, after.prediction, after.tile) == (before.unet_config, before.prediction, before.tile)
    for name, value in after.unet.items():
        moved = name.startswith("up_blocks.")
        torch.testing.assert_close(value, before.unet[name] + 0.25 * moved, rtol=1e-3, atol=1e-3)
        assert moved or torch.equal(value, before.unet[name])
    with safe_open(path, "pt") as file:
        assert file.metadata().items() >= NOTES.items() and file.metadata()["vsr.kind"] == "sd"


def test_what_else_a_checkpoint_holds_stays_bit_for_bit(tmp_path: Path) -> None:
    """A published file: no metadata of this pack, a text encoder and a VAE beside the UNet, matrices for convolutions,
    precisions of its own."""
    stored = load_file(LITE_SD)
    square = next(key for key in stored if key.endswith("proj_in.weight") and "output_blocks" in key)
    stored[square] = stored[square].reshape(*stored[square].shape[:2], 1, 1).float()
    more = {"cond_stage_model.model.a": torch.arange(3), "first_stage_model.b": torch.full((2, 2), 0.1)}
    start, path = tmp_path / "start.safetensors", tmp_path / "sd.safetensors"
    save_file(stored | more, start, {"modelspec.title": "a model"})
    write_tuned_sd(path, start, read_sd(LITE_SD).unet_config, tuned(), NOTES)
    found = load_file(path)
    assert found.keys() == (stored | more).keys()
    for key, value in (stored | more).items():
        assert (found[key].dtype, found[key].shape) == (value.dtype, value.shape)
        assert torch.equal(found[key], value) != (".output_blocks." in key)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "modelspec.title": "a model", **NOTES}


def test_what_does_not_fit_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    config, path = read_sd(LITE_SD).unet_config, tmp_path / "sd.safetensors"
    less = {key: value for key, value in load_file(LITE_SD).items() if "output_blocks.0." not in key}
    save_file(less, tmp_path / "less.safetensors")
    for start, given, said in (
        (LITE_SD, {"up_blocks.9.x": torch.zeros(1)}, "its UNet has no up_blocks.9.x"),
        (LITE_SD, tuned(float("nan")), "holds .* values of NaN or infinity"),
        (LITE_SD, tuned(1e6), "too large for torch.float16"),
        (tmp_path / "less.safetensors", tuned(), "is nothing, expected the .* that was trained"),
        (tmp_path / "none.safetensors", tuned(), "cannot be opened"),
    ):
        with pytest.raises(CheckpointError, match=said):
            write_tuned_sd(path, start, config, given, NOTES)
    with pytest.raises(CheckpointError, match=r"suffix '\.ckpt'"):
        write_tuned_sd(tmp_path / "sd.ckpt", LITE_SD, config, tuned(), NOTES)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["less.safetensors"]
