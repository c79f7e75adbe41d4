"""Guiders to swap for each other in SamplerCustomAdvanced: DSSAG, PAG and SAG, right for video."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..vsr_ops.sampling.interval import ALL_NOISE, GuidanceInterval
from . import host
from .common import CATEGORY, interval_inputs, layers_input, number
from .patches import RHO_TIP, SCALE_TIP


def guider_inputs(*own: Any) -> list[Any]:
    """The inputs of every guider, in their order, with its `own` between: MODEL and conditioning, CFG's other branch,
    and where the guidance acts."""
    return [
        io.Model.Input("model", tooltip="Stable Video Diffusion or Stable Diffusion, tiled or not."),
        io.Conditioning.Input(
            "positive", tooltip="From SVD Video Conditioning; for Stable Diffusion a prompt, with Apply ControlNet."
        ),
        *own,
        io.Conditioning.Input(
            "negative", optional=True, tooltip="SVD's without the video, or a negative prompt: turns CFG on."
        ),
        *interval_inputs(),
    ]


def guider_output() -> Any:
    """The output of every guider."""
    return io.Guider.Output(display_name="guider", tooltip="For SamplerCustomAdvanced.")


CFG_TIP = "Classifier-free guidance beside it; 1 is off, more needs a negative and one more UNet pass."


class DSSAGGuider(io.ComfyNode):
    """DSSAG as a guider."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VSRDSSAGGuider",
            display_name="DSSAG Guider (VSR)",
            category=f"{CATEGORY}/guiders",
            description=(
                "Detail-suppression self-attention guidance (DC-VSR): away from what the model draws with blurred"
                " attention. DC-VSR equation 8 without a negative, 9 with one; two UNet passes a step either way."
            ),
            inputs=guider_inputs(
                number("scale", 1.0, 0.0, 100.0, SCALE_TIP),
                number("rho", 0.5, 0.01, 100.0, RHO_TIP),
                layers_input("ends"),
            ),
            outputs=[guider_output()],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        scale: float,
        rho: float,
        layers: str,
        negative: Any = None,
        sigma_min: float = 0.0,
        sigma_max: float = ALL_NOISE,
        every: int = 1,
    ) -> io.NodeOutput:
        dssag = host.GuidancePatch(scale, layers, rho, GuidanceInterval(sigma_min, sigma_max, every))
        return io.NodeOutput(host.dssag_guider(model, positive, negative, dssag))


class PAGGuider(io.ComfyNode):
    """PAG as a guider."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VSRPAGGuider",
            display_name="PAG Guider (VSR)",
            category=f"{CATEGORY}/guiders",
            description=(
                "Perturbed-attention guidance in the spatial layers alone, so that motion is not perturbed. Two UNet"
                " passes a step, three with CFG."
            ),
            inputs=guider_inputs(
                number("cfg", 1.0, 0.0, 100.0, CFG_TIP),
                number("scale", 1.0, 0.0, 100.0, SCALE_TIP),
                layers_input("middle"),
            ),
            outputs=[guider_output()],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        cfg: float,
        scale: float,
        layers: str,
        negative: Any = None,
        sigma_min: float = 0.0,
        sigma_max: float = ALL_NOISE,
        every: int = 1,
    ) -> io.NodeOutput:
        interval = GuidanceInterval(sigma_min, sigma_max, every)
        patched = host.patch_perturbed(model, "pag", scale, layers, interval=interval)
        return io.NodeOutput(host.guider(patched, positive, negative, cfg))


class SAGGuider(io.ComfyNode):
    """SAG as a guider."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VSRSAGGuider",
            display_name="SAG Guider (VSR)",
            category=f"{CATEGORY}/guiders",
            description=(
                "Self-attention guidance for video: away from the estimate blurred where the middle block attends most."
                " Two UNet passes a step, three with CFG."
            ),
            inputs=guider_inputs(
                number("cfg", 1.0, 0.0, 100.0, CFG_TIP),
                number("scale", 0.5, 0.0, 100.0, SCALE_TIP),
            ),
            outputs=[guider_output()],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        cfg: float,
        scale: float,
        negative: Any = None,
        sigma_min: float = 0.0,
        sigma_max: float = ALL_NOISE,
        every: int = 1,
    ) -> io.NodeOutput:
        interval = GuidanceInterval(sigma_min, sigma_max, every)
        patched = host.patch_perturbed(model, "sag", scale, "middle", interval=interval)
        return io.NodeOutput(host.guider(patched, positive, negative, cfg))
