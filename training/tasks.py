"""What can be trained, by name."""

from __future__ import annotations

from pathlib import Path

from training.beside import BesideTask
from training.capm import CAPMTask
from training.capm_sd import CAPMSDTask
from training.capm_whole import WholeCAPM
from training.compression import CompressionTask
from training.control import ControlTask
from training.dcm import DCM
from training.recipe import Recipe
from training.refiner import RefinerTask
from training.sd import SDTask
from training.svd import SVDTask
from training.task import Task, TaskMaker
from training.vae import PictureVAE, TemporalVAE
from training.vae_refined import RefinedVAE
from training.whole import Whole
from training.whole_dcm import WholeWithDCM
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
