"""All that touches ComfyUI's internals, as it is in 0.3.64 to 0.33.0; `contract` lists what the pack leans on there."""

from ..session.run import GuidancePatch, Tiles
from .capm import patch_capm
from .context import scene_contexts
from .control import load_host_control
from .cost import describe, latent_cuts, latent_picture, latent_scenes, preview_layout
from .device import intermediate_dtype
from .enlarging import HostVideoUpscaler, enlarged, enlarged_over_time
from .hooks import patch_perturbed, patch_tiles
from .load import load_lite, weights_file, weights_files
from .load_unet import load_unet, unet_names
from .model import defaults_of, require_svd
from .motion import estimated_flow, patch_alignment
from .picture import HostVAE, decoded, encoded, managed, progress, refined, sees_time, with_capm
from .sampling import SAMPLERS, SCHEDULERS, cfg_guider, dssag_guider, fps_key, guider, null_prompt, sample
from .sateco import patch_sateco, with_sateco

__all__ = [
    "SAMPLERS",
    "SCHEDULERS",
    "GuidancePatch",
    "HostVAE",
    "HostVideoUpscaler",
    "Tiles",
    "cfg_guider",
    "decoded",
    "defaults_of",
    "describe",
    "dssag_guider",
    "encoded",
    "enlarged",
    "enlarged_over_time",
    "estimated_flow",
    "fps_key",
    "guider",
    "intermediate_dtype",
    "latent_cuts",
    "latent_picture",
    "latent_scenes",
    "load_host_control",
    "load_lite",
    "load_unet",
    "managed",
    "null_prompt",
    "patch_alignment",
    "patch_capm",
    "patch_perturbed",
    "patch_sateco",
    "patch_tiles",
    "preview_layout",
    "progress",
    "refined",
    "require_svd",
    "sample",
    "scene_contexts",
    "sees_time",
    "unet_names",
    "weights_file",
    "weights_files",
    "with_capm",
    "with_sateco",
]
