"""Every node's inputs: which are choices and which pictures, and arguments that it takes."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from .conftest import NAME

#: Choices, by node.
COMBOS = {
    "VSRLoadLite": ["which"],
    "VSRLoadDCM": ["which"],
    "VSRLoadRefiner": ["which"],
    "VSRLoadVideoUpscaler": ["which"],
    "VSRLoadCFW": ["which"],
    "VSRLoadSTAM": ["which"],
    "VSRLoadControl": ["which"],
    "VSRLoadDCVSR": ["unet", "svd"],
    "VSRCAPM": ["which"],
    "VSRSATeCo": ["which"],
    "VSRCompressionEstimate": ["which"],
    "VSREncode": ["start", "scene_cuts"],
    "VSREstimateFlow": ["estimator", "scene_cuts"],
    "VSRFlowGuidedLatents": ["mode", "scale"],
    "VSRUpscaleLR": ["method"],
    "VSRSVDConditioning": ["start", "scene_cuts"],
    "VSRTiledDiffusion": ["propagation", "sap_mode", "layers", "layout"],
    "VSRDSSAG": ["layers"],
    "VSRDSSAGGuider": ["layers"],
    "VSRPAGGuider": ["layers"],
    "VSRTiledSVDSampler": [
        "guidance",
        "sampler_name",
        "scheduler",
        "propagation",
        "sap_mode",
        "color",
        "upscaler",
        "layout",
    ],
    "VSRColorMatch": ["method"],
    "VSRCompare": ["mode"],
}
#: Pictures, by node.
IMAGES = {
    "VSRUpscaleLR": ["image"],
    "VSRSVDConditioning": ["image"],
    "VSRTiledSVDSampler": ["image"],
    "VSRRefine": ["decoded", "upscaled"],
    "VSRColorMatch": ["image", "reference"],
    "VSRCompare": ["a", "b", "c"],
    "VSRMetrics": ["image", "reference"],
    "VSREstimateFlow": ["image"],
    "VSREncode": ["image"],
    "VSRCompressionEstimate": ["image"],
    "VSRDecode": ["reference"],
    "VSRTilePreview": ["image"],
    "VSRNullPrompt": ["image"],
}
#: The same in pairs.
IMAGE_INPUTS = [(node, name) for node, names in IMAGES.items() for name in names]


def values_for(node: Any, lite: Any, small: Any) -> dict[str, Any]:
    """Arguments that a node takes: its defaults, and something real in every socket."""
    picture = torch.rand(2, 16, 16, 3, generator=torch.Generator().manual_seed(0))
    flow = importlib.import_module(f"{NAME}.vsr_ops.flow.field")
    sockets = {
        "MODEL": lite[0],
        "VAE": lite[1],
        "IMAGE": picture,
        "CONDITIONING": small[0],
        "LATENT": small[2],
        "VSR_FLOW": flow.estimate_flow(picture.movedim(-1, 1), cuts=()),
        "VSR_REFINER": importlib.import_module(f"{NAME}.vsr_ops.modules.refiner").load_refiner("lite"),
    }
    found: dict[str, Any] = {}
    for item in node.define_schema().inputs:
        if item.io_type in sockets and not item.optional:
            found[item.id] = sockets[item.io_type]
        elif getattr(item, "default", None) is not None:
            found[item.id] = item.default
        elif item.io_type == "COMBO" and not item.optional:
            found[item.id] = item.options[0]
    return found


def inputs_of(node: Any, io_type: str) -> list[str]:
    return [item.id for item in node.define_schema().inputs if item.io_type == io_type]
