"""Flow on the host's device, and the alignment of a run along it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...vsr_ops.errors import SettingError
from ...vsr_ops.flow.field import Flow, check_fits, estimate_flow, latent_flow
from ...vsr_ops.flow.raft import memory
from ...vsr_ops.sampling.align import ROUNDS, SCALES, SHARE, align, check_strength
from ...vsr_ops.sampling.schedule import following
from ...vsr_ops.vae.latents import CELL
from ..session.run import KEY
from .picture import progress

#: Name of the alignment's hook, which works without the pack's others.
ALIGN_KEY = f"{KEY}_align"


def estimated_flow(frames: Tensor, estimator: str, cuts: Sequence[int]) -> Flow:
    """`estimate_flow` on the host's device, with the node's progress bar; RAFT's weights may lie in models/vsr_flow."""
    device, (height, width) = comfy.model_management.get_torch_device(), frames.shape[-2:]
    if estimator != "dis":
        comfy.model_management.free_memory(memory(height, width), device)
    folder = Path(folder_paths.models_dir) / "vsr_flow"
    return estimate_flow(frames, estimator, cuts, progress(max(1, len(frames) - 1)), folder, device)


def patch_alignment(
    model: Any, flow: Flow, strength: float, start: float, end: float, mode: str, scale: str = "bounded"
) -> Any:
    """A MODEL whose denoised estimate is aligned along `flow`, at the steps from `start` to `end` of the schedule
    (SDATC, equations 12 and 13).

    It acts on what the whole guidance answers for the whole video: tiles are merged by then, and every other patch has
    had its say, so that the order of wiring cannot matter. Strength 0 and a flow of under two frames take an earlier
    alignment off and add none. A second-order sampler's calls between two noise levels are scaled as the step that they
    belong to. Raises SettingError for a mode, strength or scale that cannot work, and in the run for a LATENT that the
    flow does not fit.
    """
    check_strength(strength, mode, scale)
    m = model.clone()
    m.remove_wrappers_with_key(WrappersMP.PREDICT_NOISE, ALIGN_KEY)
    if strength == 0 or flow.frames < 2:
        return m
    height, width = (-(-side // CELL) for side in flow.size)
    small = latent_flow(flow, height, width, CELL, SHARE)
    sampling = m.get_model_object("model_sampling")
    first, last = (sampling.percent_to_sigma(share) for share in (start, end))

    def aligned(executor: Any, x: Tensor, timestep: Tensor, model_options: dict[str, Any], seed: Any = None) -> Tensor:
        if x.ndim != 4:
            raise SettingError(
                f"flow-guided latents met a LATENT of shape {tuple(x.shape)}: expected the video's frames as a batch"
                " (frames, channels, height, width), as SVD's and SD's are; take this node off for other models"
            )
        check_fits(flow, x.shape[0], x.shape[-2], x.shape[-1], CELL)
        denoised, sigma = executor(x, timestep, model_options, seed), float(timestep.max())
        if not last <= sigma <= first:
            return denoised
        schedule = model_options["transformer_options"]["sample_sigmas"].tolist()
        v = SCALES[scale](sigma, following(schedule, sigma))
        return align(denoised, small, strength, v, mode, ROUNDS)

    m.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, ALIGN_KEY, aligned)
    return m
