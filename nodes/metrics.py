"""How near a result is to the truth."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..vsr_ops.metrics.scoring import score_pair
from ..vsr_ops.video.scenes import find_cuts
from . import host
from .common import CATEGORY, count, to_frames, to_image


class Metrics(io.ComfyNode):
    """Metrics of a result against the truth."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VSRMetrics",
            display_name="Measure Video (VSR)",
            category=f"{CATEGORY}/picture",
            description=(
                "Measures a result against the true video: a table of means, and a curve over the frames for each"
                " metric. Nothing is downloaded."
            ),
            inputs=[
                io.Image.Input("image", tooltip="The result."),
                io.Image.Input("reference", tooltip="The truth: as many frames of the same size."),
                io.String.Input(
                    "metrics",
                    default="psnr_y, ssim_y, tof, warp_error, flicker, color_drift",
                    tooltip="Names with commas. Also psnr, vmaf, vmaf_neg, gmsd, haarpsi, seam; with pyiqa installed"
                    " lpips, dists, tlp, niqe, musiq, maniqa, clipiqa.",
                ),
                count("border", 0, 0, 1024, "Pixels left out on each side; papers often leave out 4."),
                io.Model.Input(
                    "model", optional=True, tooltip="A model from Tiled Diffusion: where its tiles lie, for seam."
                ),
            ],
            outputs=[
                io.String.Output(display_name="table", tooltip="Means over the frames, and what was not measured."),
                io.Image.Output(display_name="plot", tooltip="A curve over the frames for each metric."),
            ],
        )

    @classmethod
    def execute(cls, image: Tensor, reference: Tensor, metrics: str, border: int, model: Any = None) -> io.NodeOutput:
        result, truth = to_frames(image), to_frames(reference, "reference")
        plan = None if model is None else host.preview_layout(model, result, find_cuts(iter(truth))).settled
        scores = score_pair(result, truth, metrics, plan, border, host.progress(len(result)))
        return io.NodeOutput(scores.table(), to_image(scores.plot()[None]))
