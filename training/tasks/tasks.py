"""What can be trained, by name."""

from __future__ import annotations

from pathlib import Path

from training.loop.recipe import Recipe
from training.loop.task import Task, TaskMaker
from training.tasks.capm import CAPMTask
from training.tasks.capm_joint import JointCAPM
from training.tasks.capm_sd import CAPMSDTask
from training.tasks.compression import CompressionTask
from training.tasks.control import ControlTask
from training.tasks.control_dcm import ControlWithDCM
from training.tasks.dcm import DCM
from training.tasks.decoder_modules import DecoderModuleTask
from training.tasks.encoder import EncoderTask
from training.tasks.joint import Joint
from training.tasks.joint_dcm import JointWithDCM
from training.tasks.refiner import RefinerTask
from training.tasks.sateco import SATeCoTask
from training.tasks.sd import SDTask
from training.tasks.svd import SVDTask
from training.tasks.thin_unet import ThinUNet
from training.tasks.vae import PictureVAE, TemporalVAE
from training.tasks.vae_refined import RefinedVAE
from training.tasks.video_upscaler import VideoUpscalerTask
from vsr_ops.errors import SettingError

TASKS: dict[str, TaskMaker] = {
    "dcm": DCM,
    "vae_picture": PictureVAE,
    "vae_temporal": TemporalVAE,
    "vae_refined": RefinedVAE,
    "svd": SVDTask,
    "refiner": RefinerTask,
    "video_upscaler": VideoUpscalerTask,
    "encoder": EncoderTask,
    "thin_unet": ThinUNet,
    "whole": Joint,
    "whole_dcm": JointWithDCM,
    "capm_whole": JointCAPM,
    "compression": CompressionTask,
    "capm": CAPMTask,
    "decoder": DecoderModuleTask,
    "sd": SDTask,
    "control": ControlTask,
    "control_dcm": ControlWithDCM,
    "capm_sd": CAPMSDTask,
    "sateco": SATeCoTask,
}
"""Tasks by name; a module of its own is one more entry."""


def make_task(recipe: Recipe, data: Path, out: Path) -> Task:
    """The task a recipe names. Raises SettingError."""
    if recipe.task not in TASKS:
        raise SettingError(f"unknown task '{recipe.task}': expected one of {', '.join(TASKS)}")
    return TASKS[recipe.task](recipe, data, out)
