"""The training of the whole lite model: what it draws, what its UNet is shown, what it writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.tensors import generator
from training.loop.recipe import Recipe, Train
from training.tasks.joint import Joint
from training.tasks.refiner import decoder_of, decoder_state
from training.tasks.svd import read_start
from vsr_ops.checkpoints.svd import read_svd
from vsr_ops.modules.refiner import load_refiner
from vsr_ops.video.pictures import save_png8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    slow = torch.rand(1, 3, 20, 20, generator=generator(1))
    save_png8(folder / "a.png", torch.nn.functional.interpolate(slow, (160, 160), mode="bilinear")[0], None)
    return folder


def task(data: Path, drop: float) -> Joint:
    model = {"start": "lite", "refiner": "lite", "blocks": 8, "mixes": 4, "follows": True}
    small = {"size": 64, "frames": 2, "steps": [2]}
    recipe = Recipe("whole", Train(1), model=model, data=small, loss={"drop": drop})
    return Joint(recipe, data, data / "out")


def test_some_clips_are_kept_from_the_unet_and_nothing_else_is_drawn_differently(data: Path) -> None:
    all_shown, none_shown = (task(data, drop) for drop in (0.0, 1.0))
    seen, hidden = (each.sample(generator(3)) for each in (all_shown, none_shown))
    assert float(seen.pop("kept")) == 1 and float(hidden.pop("kept")) == 0
    assert all(torch.equal(value, hidden[key]) for key, value in seen.items())


def test_the_share_that_is_kept_from_the_unet_is_the_recipes(data: Path) -> None:
    """Within twice the deviation of 100 draws, and what is shown at one share is shown at every smaller one."""
    most, half = (
        {seed for seed in range(100) if each.sample(generator(seed))["kept"]}
        for each in (task(data, drop) for drop in (0.2, 0.5))
    )
    assert abs(len(most) - 80) < 8 and abs(len(half) - 50) < 10 and half < most


def test_the_unets_own_loss_does_not_see_what_is_kept_from_it(data: Path) -> None:
    whole = task(data, 0.0)
    whole.prepare(torch.device("cpu"))
    model = whole.build().eval()
    sample = whole.sample(generator(3))

    @torch.no_grad()
    def edm(lr: Tensor, kept: float) -> float:
        changed = {**sample, "lr": lr, "kept": torch.tensor(kept)}
        return whole.loss(model, {key: value[None] for key, value in changed.items()})[1]["edm"]

    lr = sample["lr"]
    assert edm(lr, 0.0) == edm(1 - lr, 0.0) and edm(lr, 1.0) != edm(1 - lr, 1.0)


def test_what_has_not_learnt_is_written_as_it_was(data: Path, tmp_path: Path) -> None:
    whole, before = task(data, 0.0), read_start("lite")
    assert whole.sample(generator(0))["truth"].shape == (2, 3, 64, 64)
    path = tmp_path / "svd.safetensors"
    whole.export(whole.build(), path, "nothing")
    after = read_svd(path)
    for old, new in ((before.unet, after.unet), (before.vae, after.vae)):
        assert old.keys() == new.keys()
        for key, value in old.items():
            torch.testing.assert_close(new[key], value, rtol=1e-3, atol=1e-6)
    (refiner,) = (file for file in tmp_path.iterdir() if file != path)
    assert load_refiner(refiner).shape.follows


def test_a_decoder_for_latents_of_deviation_1_goes_back_to_that_of_the_file() -> None:
    weights = read_start("lite")
    state = decoder_state(decoder_of(weights), weights)
    assert state.keys() == {key for key in weights.vae if key.startswith("decoder.")}
    assert not torch.equal(decoder_of(weights).state_dict()["conv_in.weight"], weights.vae["decoder.conv_in.weight"])
    for key, value in state.items():
        torch.testing.assert_close(value, weights.vae[key], rtol=1e-6, atol=0)
