"""Every task learns on one batch: its loss falls far, what may not train stays, its picture shows what it learnt."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests.support.tiny_training import descended, settings_of
from training.loop.recipe import BUNDLED, read_recipe
from training.loop.task import Batch, Task
from training.loop.trainer import Batches, freeze
from training.tasks.tasks import TASKS, make_task


class Learns(NamedTuple):
    """A task's recipe, and what some steps on one batch make of its loss, as a share of the first: what they did make
    of it, and half of that fall again."""

    recipe: str
    share: float
    lr: float = 2e-3
    steps: int = 6


LEARNS = {
    "dcm": Learns("dcm_lite", 0.94),
    "video_upscaler": Learns("video_upscaler_lite", 0.99),
    "refiner": Learns("lite_5_refiner", 0.82),
    "encoder": Learns("lite_8_encoder", 0.85, 3e-4),
    "thin_unet": Learns("lite_9_unet", 0.76, 5e-5),
    "svd": Learns("lite_4_svd", 0.5),
    "vae_picture": Learns("lite_2_picture", 0.72),
    "vae_refined": Learns("lite_3_refined", 0.77),
    "vae_temporal": Learns("vae_temporal_lite", 0.7),
    "whole": Learns("lite_6_whole", 0.87, steps=4),
    "whole_dcm": Learns("whole_dcm_lite", 0.9, 5e-4, steps=4),
    "capm_whole": Learns("capm_whole_lite", 0.97, steps=4),
    "compression": Learns("compression_lite", 0.65),
    "capm": Learns("capm_lite", 0.94, 5e-3),
    "decoder": Learns("cfw_lite", 0.88),
    "sd": Learns("sd_lite", 0.35),
    "control": Learns("control_lite", 0.8, 5e-3),
    "control_dcm": Learns("control_dcm", 0.85, 5e-4, steps=4),
    "sateco": Learns("sateco_unet_lite", 0.95, 5e-3),
    "capm_sd": Learns("capm_sd_lite", 0.91, 5e-3),
}


@pytest.mark.parametrize("name", sorted(LEARNS))
def test_every_task_learns_on_one_batch(name: str, photos: Path, vaes: tuple[Path, Path], tmp_path: Path) -> None:
    """What it may train alone, and its picture shows what it learnt."""
    recipe, share, lr, steps = LEARNS[name]
    task = make_task(read_recipe(BUNDLED / f"{recipe}.toml", settings_of(name, vaes)), photos, tmp_path)
    task.prepare(torch.device("cpu"))
    torch.manual_seed(0)
    model = task.build()
    freeze(model, task.trains)
    batch = Batches(pickle.loads(pickle.dumps(task)), 0, 1)[0]  # as a process that draws samples gets it
    first, before = picture_of(task, model, batch), {key: value.clone() for key, value in model.named_parameters()}
    losses = descended(lambda: task.loss(model.train(), batch), model, lr, steps)["loss"]
    assert losses[-1] < share * losses[0]
    moved = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    assert moved and all(task.trains(key) for key in moved)
    last = picture_of(task, model, batch)
    assert 0 <= float(last.min()) < float(last.max()) <= 1
    changed = float((last != first).any(0).float().mean())
    assert 0.01 < changed < 0.9, "the model's answer is another; what it was given and the truth are not"


def picture_of(task: Task, model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        picture = task.picture(model.eval(), batch)
    assert picture.shape[0] == 3
    return picture


def test_every_task_is_tried() -> None:
    assert set(LEARNS) == set(TASKS)
