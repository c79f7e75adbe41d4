"""The pack's nodes. Ids are permanent; widgets are only ever appended, since saved graphs hold them by place."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .capm import CompressionEstimate, CompressionPrompts
from .encode import Encode, MatchLatent
from .flow import EstimateFlow, FlowGuidedLatents, FlowPreview
from .guiders import DSSAGGuider, PAGGuider, SAGGuider
from .latent import Decode, NullPrompt, SVDConditioning
from .load import DemoClip, LoadCFW, LoadControl, LoadDCM, LoadLite, LoadRefiner, LoadSTAM, LoadVideoUpscaler
from .load_dcvsr import LoadDCVSR
from .metrics import Metrics
from .noise import NoiseByFrame
from .patches import DSSAG, TiledDiffusion, TilePreview
from .picture import ColorMatch, Compare, Refine, UpscaleLR
from .sampler import TiledSVDSampler
from .sateco import SATeCo

NODES: list[type[io.ComfyNode]] = [
    LoadLite,
    LoadDCM,
    LoadRefiner,
    DemoClip,
    UpscaleLR,
    SVDConditioning,
    TiledDiffusion,
    DSSAGGuider,
    DSSAG,
    PAGGuider,
    SAGGuider,
    TiledSVDSampler,
    Decode,
    Refine,
    ColorMatch,
    TilePreview,
    Compare,
    Metrics,
    EstimateFlow,
    FlowPreview,
    FlowGuidedLatents,
    LoadCFW,
    LoadSTAM,
    LoadControl,
    NullPrompt,
    Encode,
    MatchLatent,
    CompressionEstimate,
    CompressionPrompts,
    LoadDCVSR,
    NoiseByFrame,
    LoadVideoUpscaler,
    SATeCo,
]


class CoherentVSR(ComfyExtension):
    """The pack, as the host asks for it."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> CoherentVSR:
    """The host's entry point."""
    return CoherentVSR()
