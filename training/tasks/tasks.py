"""What can be trained, by name."""

from __future__ import annotations

from pathlib import Path

from training.loop.recipe import Recipe
from training.loop.task import Task, TaskMaker
from training.tasks.beside import BesideTask
from training.tasks.capm import CAPMTask
from training.tasks.capm_sd import CAPMSDTask
from training.tasks.capm_whole import WholeCAPM
from training.tasks.compression import CompressionTask
from training.tasks.control import ControlTask
from training.tasks.dcm import DCM
from training.tasks.refiner import RefinerTask
from training.tasks.sd import SDTask
from training.tasks.svd import SVDTask
from training.tasks.vae import PictureVAE, TemporalVAE
from training.tasks.vae_refined import RefinedVAE
from training.tasks.whole import Whole
from training.tasks.whole_dcm import WholeWithDCM
from vsr_ops.errors import SettingError

TASKS: dict[str, TaskMaker] = {
    "dcm": DCM,
    "vae_picture": PictureVAE,
    "vae_temporal": TemporalVAE,
    "vae_refined": RefinedVAE,
    "svd": SVDTask,
    "refiner": RefinerTask,
    "whole": Whole,
    "whole_dcm": WholeWithDCM,
    "capm_whole": WholeCAPM,
    "compression": CompressionTask,
    "capm": CAPMTask,
    "decoder": BesideTask,
    "sd": SDTask,
    "control": ControlTask,
    "capm_sd": CAPMSDTask,
}
"""Tasks by name; a module of its own is one more entry."""


def make_task(recipe: Recipe, data: Path, out: Path) -> Task:
    """The task a recipe names. Raises SettingError."""
    if recipe.task not in TASKS:
        raise SettingError(f"unknown task '{recipe.task}': expected one of {', '.join(TASKS)}")
    return TASKS[recipe.task](recipe, data, out)
