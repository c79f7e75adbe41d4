"""What one sampling run remembers: ComfyUI's data, none of its modules.

A run's state lives in a `Run` that this run's own copy of the model options refers to, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from ...vsr_ops.sampling.guidance import gamma_at
from ...vsr_ops.sampling.interval import EVERY_STEP, Act, GuidanceInterval, difference
from ...vsr_ops.sampling.layers import Layer
from ...vsr_ops.sampling.layouts import TileLayout
from ...vsr_ops.sampling.propagation import Propagation, TileRun
from ...vsr_ops.sampling.schedule import Step, schedule_ends, step_at, step_index
from ...vsr_ops.sampling.tiling import TilePlan, TileSize

#: Where the pack keeps its settings in a MODEL's transformer options, and the name of its hooks.
KEY = "coherent_vsr"


@dataclass(frozen=True)
class Scenes:
    """A video's frames, and the first ones of new scenes."""

    frames: int
    cuts: tuple[int, ...]


@dataclass(frozen=True)
class Tiles:
    """What `VSRTiledDiffusion` asks for; `tile` axes of 0 take the checkpoint's own, `scenes` of None are those
    that the conditioning knows."""

    tile: TileSize
    overlap: float
    propagation: Propagation
    sap_mode: str
    start: float = 0.0
    end: float = 1.0
    batch: int = 1
    scenes: Scenes | None = None
    layout: str = "paper"


@dataclass(frozen=True)
class GuidancePatch:
    """A perturbed-attention guidance: its strength, its layers, rho where it has a gamma, and where it acts."""

    scale: float
    layers: str
    rho: float = 0.5
    interval: GuidanceInterval = EVERY_STEP


def pack_settings(model_options: Mapping[str, Any]) -> dict[str, Any]:
    """What the pack's nodes and hooks have put into model options."""
    return model_options["transformer_options"][KEY]


def changed(model_options: dict[str, Any], **values: object) -> dict[str, Any]:
    """Model options with some of the pack's settings changed; the given ones stay as they are."""
    options = model_options["transformer_options"]
    return {**model_options, "transformer_options": {**options, KEY: {**options[KEY], **values}}}


class UNetCall(NamedTuple):
    """What one call of the UNet holds, for patches that know of the pack's tiles: the `frames`, how many `tiles` `of`
    all, and the `places` of these, rows and columns of latents."""

    frames: slice = slice(None)
    tiles: int = 1
    of: int = 1
    places: tuple[tuple[slice, slice], ...] = ()


def call_of(transformer_options: Mapping[str, Any]) -> tuple[Run | None, UNetCall]:
    """The run that a call of the UNet belongs to, where the pack's hooks have begun one, and what the call holds:
    without tiles the whole video."""
    settings = transformer_options.get(KEY, {})
    return settings.get("run"), UNetCall(*(settings.get("call") or ()))


def resolve_tile(tile: TileSize, own: TileSize) -> TileSize:
    """`tile` with the zeros filled from the checkpoint's own."""
    return TileSize(tile.height or own.height, tile.width or own.width, tile.frames or own.frames)


def sap_lagged(tiles: Tiles, plan: TilePlan, at_once: int) -> bool:
    """Whether SAP reads the last step's bank."""
    return at_once < len(plan.spatial) or tiles.sap_mode == "lagged"


@dataclass(frozen=True)
class CFGPatch:
    """Where classifier-free guidance acts that has no other guidance beside it."""

    interval: GuidanceInterval


@dataclass
class Run:
    """What one sampling run remembers. `before` are the steps of the model's schedule before this run's, `order` counts
    the evaluations of one step, to keep nested ones apart; `warned` is whether the artist has been told of a
    ControlNet's features that lie between tiles' cells. `passes` has the banks of every branch and conditioning, `kept`
    what each guidance added when it was last found, by name ("cfg": by CFG's two branches); `live` is what shows tiles
    as they are done, where somebody looks."""

    model: Any
    sigmas: list[float]
    layers: dict[str, Layer]
    layout: TileLayout
    tiles: Tiles | None
    propagation: Propagation
    batch: int = 1
    at_once: int = 1
    before: int = 0
    order: int = 0
    warned: bool = False
    passes: dict[tuple[object, ...], TileRun] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    live: Any = None

    @property
    def plan(self) -> TilePlan:
        """The largest of the run's tile plans; they are all of one video."""
        return self.layout.largest

    def gamma(self, sigma: float, rho: float) -> float:
        """DSSAG's gamma at a noise level (DC-VSR, equation 10)."""
        sampling = self.model.get_model_object("model_sampling")
        ends = schedule_ends(self.sigmas, float(sampling.sigma_max), float(sampling.sigma_min))
        return gamma_at(sigma, *ends, rho)

    def act(self, name: str, interval: GuidanceInterval, sigma: float) -> Act:
        """What a guidance does at a noise level. Nothing is kept where a sampler leaves the run's own levels out."""
        act = interval.acts(self.sigmas[:-1], self.before)[min(step_index(self.sigmas, sigma), len(self.sigmas) - 2)]
        return "new" if act == "kept" and name not in self.kept else act

    def keep(self, name: str, interval: GuidanceInterval, guided: Tensor, plain: Tensor) -> None:
        """Keeps what a guidance has added, where a step to come may add it."""
        if interval.every > 1:
            self.kept[name] = difference(guided, plain)

    def step(self, sigma: float) -> Step:
        """The step of the model's whole schedule that a noise level belongs to; plain outside the tiles' share."""
        index = self.before + step_index(self.sigmas, sigma)
        if self.tiles is None:
            return Step(index)
        sampling = self.model.get_model_object("model_sampling")
        first, last = (sampling.percent_to_sigma(share) for share in (self.tiles.start, self.tiles.end))
        acts = last <= sigma <= first
        return step_at(index, self.propagation.kinds) if acts else Step(index)
