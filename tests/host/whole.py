"""All of DC-VSR and SDATC in one prompt, on the lite weights, as the server takes it: what runs where no page is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tests.host.results import files_of

if TYPE_CHECKING:
    from tests.host.conftest import Server

Prompt = dict[str, dict[str, Any]]
FRAMES = 3


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def whole_prompt(tile: int = 32) -> Prompt:
    """All of DC-VSR and SDATC's modules on the lite weights, without what only shows."""
    return {
        "clip": node("VSRDemoClip", frames=FRAMES, crf=25),
        "lite": node("VSRLoadLite", which="svd_lite"),
        "dcm": node("VSRLoadDCM", which="lite"),
        "large": node(
            "VSRUpscaleLR", image=["clip", 0], scale=4.0, width=0, height=0, method="bicubic", upscale_model=["dcm", 0]
        ),
        "levels": node("VSRCompressionEstimate", image=["clip", 0], which="lite", crf=-1.0),
        "tiles": node(
            "VSRTiledDiffusion",
            **{"model": ["lite", 0], "tile_height": tile, "tile_width": tile, "tile_frames": 4, "overlap": 0.5},
            **{"propagation": "sap+tap", "sap_mode": "auto", "sap_rate": 0, "tap_frames": 4, "tap_rate": 1},
            **{"layers": "ends", "start_percent": 0.0, "end_percent": 1.0, "tile_batch": 1},
        ),
        "capm": node("VSRCAPM", model=["tiles", 0], which="lite", strength=1.0, levels=["levels", 0], crf=-1.0),
        "dssag": node("VSRDSSAG", model=["capm", 0], scale=1.0, rho=0.5, layers="ends"),
        "video": node(
            "VSRSVDConditioning",
            **{"model": ["dssag", 0], "vae": ["lite", 1], "image": ["large", 0], "motion_bucket_id": 127, "fps": 8},
            **{"augmentation": 0.0, "start": "LR latent", "scene_cuts": "detect"},
        ),
        "sampled": node(
            "KSampler",
            **{"model": ["dssag", 0], "positive": ["video", 0], "negative": ["video", 1], "latent_image": ["video", 2]},
            **{"seed": 0, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "karras", "denoise": 0.5},
        ),
        "cfw": node("VSRLoadCFW", which="lite"),
        "stam": node("VSRLoadSTAM", which="lite"),
        "decoded": node(
            "VSRDecode",
            **{"vae": ["lite", 1], "latent": ["sampled", 0], "chunk_frames": 0, "reference": ["large", 0]},
            **{"cfw": ["cfw", 0], "stam": ["stam", 0], "w": 0.75, "tile": 0, "capm": ["capm", 1]},
        ),
        "refiner": node("VSRLoadRefiner", which="lite"),
        "refined": node("VSRRefine", decoded=["decoded", 0], upscaled=["large", 0], refiner=["refiner", 0], w=0.0),
        "large_seen": node("PreviewImage", images=["large", 0]),
        "seen": node("PreviewImage", images=["decoded", 0]),
        "refined_seen": node("PreviewImage", images=["refined", 0]),
    }


def shown(server: Server) -> dict[str, np.ndarray]:
    """What its nodes showed, `(frames, height, width, 3)` in levels of 255, by node."""
    history = server.run(whole_prompt(), seconds=600)
    assert history["status"]["status_str"] == "success", str(history["status"])[-4000:]
    names = ("large_seen", "seen", "refined_seen")
    return {name: 255 * np.stack(files_of(server, history, name)) for name in names}
