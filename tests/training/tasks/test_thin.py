"""Weights made faster: what is silenced stays so, and so does what may not learn; the pack leaves out what is idle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.tiny_training import settings_of, train_tiny
from training.loop.recipe import BUNDLED, read_recipe
from training.tasks.refiner import shortened, silenced
from training.tasks.svd import read_start
from vsr_ops.backbones.svd import load_svd
from vsr_ops.errors import SettingError
from vsr_ops.modules.idle import Idle
from vsr_ops.modules.refiner import Refiner, RefinerShape, load_refiner

CPU = torch.device("cpu")


def test_the_two_halves_follow_one_another(photos: Path, vaes: tuple[Path, Path], tmp_path: Path) -> None:
    start = vaes[1].parent / "svd.safetensors"
    refiner = ["model.refiner=", "model.blocks=0", "loss.taught=0"]
    thin = train_tiny("lite_7_thin", [*settings_of("refiner", vaes), *refiner], photos, tmp_path / "thin")
    sets = [text for text in settings_of("encoder", vaes) if not text.startswith("model.start")]
    last = train_tiny("lite_8_encoder", [*sets, f"model.start={thin}"], photos, tmp_path / "encoder")

    before, middle, after = (read_start(str(path)).vae for path in (start, thin, last))
    idle = [read_recipe(BUNDLED / f"{name}.toml", []).model["idle"] for name in ("lite_7_thin", "lite_8_encoder")]
    silent = {f"{layer}.{kind}" for layers in idle for layer in layers for kind in ("weight", "bias")}
    assert not any(after[name].any() for name in silent)
    learnt = {name for name in before if not torch.equal(before[name].half(), after[name].half())} - silent
    decoder = {name for name in learnt if name.startswith("decoder.")}
    assert {name.split(".")[1] for name in decoder} <= {"up_blocks", "conv_norm_out", "conv_out", "time_conv_out"}
    assert decoder and not any(name.startswith(("decoder.up_blocks.0", "decoder.up_blocks.1")) for name in decoder)
    assert learnt - decoder and all(name.startswith("encoder.") for name in learnt - decoder)
    assert all(torch.equal(middle[name], after[name]) for name in before if name.startswith("decoder."))

    model = load_svd(last / "weights.safetensors", CPU, torch.float32)
    left_out = {name for name, part in model.vae.named_modules() if isinstance(part, Idle)}
    # (With one layer a block the middle of the decoder has an attention that is never called.)
    assert left_out - {"decoder.mid_block.attentions.0"} == {
        "decoder.up_blocks.3.resnets.0.temporal_res_block",
        "decoder.up_blocks.3.resnets.1",
        "encoder.down_blocks.0.resnets.0",
        "encoder.mid_block.attentions.0",
    }
    assert load_refiner(thin / "weights_refiner.safetensors").shape == Refiner().shape


def test_a_shorter_refiner_is_the_first_blocks_of_the_longer() -> None:
    long = Refiner(RefinerShape(8, 4, 1))
    short = shortened(long, 2)
    assert short.shape == RefinerShape(8, 2, 1)
    assert all(torch.equal(value, long.state_dict()[name]) for name, value in short.state_dict().items())


@pytest.mark.parametrize("blocks", [0, 5])
def test_a_refiner_of_other_lengths_is_refused(blocks: int) -> None:
    with pytest.raises(SettingError, match=f"model.blocks is {blocks}: expected from 1"):
        shortened(Refiner(RefinerShape(8, 4, 1)), blocks)


def test_a_layer_that_is_not_there_is_refused(vaes: tuple[Path, Path]) -> None:
    weights = read_start(str(vaes[1].parent / "svd.safetensors"))
    with pytest.raises(SettingError, match=r"model.idle has decoder.conv_inn, which the VAE has not"):
        silenced(weights, ["decoder.conv_inn"])
