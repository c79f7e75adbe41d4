"""Arithmetic of a plan's cost, and its words: bytes of banks, tile passes, times. Needs no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..sampling.layouts import TileLayout
from ..sampling.propagation import Propagation, sap_rate
from ..sampling.tiling import TilePlan
from ..units import readable
from .tile_time import TileSeconds

#: How many times fewer tile passes another layout must take to be named.
WORTH = 1.25


@dataclass(frozen=True)
class Bank:
    """A layer that propagation acts in: its tokens in a tile, and the width of keys and values together."""

    rows: int
    cols: int
    width: int


def lagged_bytes(plan: TilePlan, settings: Propagation, branches: int, layers: Sequence[Bank], itemsize: int) -> int:
    """Host memory of SAP's lagged banks: every window's, for each branch; 0 where SAP does not lag."""
    if not (settings.sap_lagged and "sap" in settings.kinds) or len(plan.spatial) == 1:
        return 0
    tokens = 0
    for layer in layers:
        rate = sap_rate(settings, len(plan.spatial), (layer.rows, layer.cols))
        tokens += -(-layer.rows // rate) * -(-layer.cols // rate) * layer.width
    frames = sum(window.span.length for window in plan.windows)
    return frames * len(plan.spatial) * tokens * branches * itemsize


def tap_bytes(plan: TilePlan, settings: Propagation, batch: int, layers: Sequence[Bank], itemsize: int) -> int:
    """Device memory of TAP's banks: those of one batch of tiles, from one window to the next."""
    if "tap" not in settings.kinds or len(plan.windows) == 1:
        return 0
    rate = settings.tap_rate
    tokens = sum(-(-layer.rows // rate) * -(-layer.cols // rate) * layer.width for layer in layers)
    return 2 * batch * settings.tap_frames * tokens * itemsize


def grids(layout: TileLayout) -> str:
    """How many tiles there are in a layout, rows by columns by windows: in each phase, and in the last steps."""

    def words(plan: TilePlan) -> str:
        return f"{len(plan.rows)}x{len(plan.cols)}x{len(plan.windows)}"

    moving = ", ".join(dict.fromkeys(words(plan) for plan in layout.phases))
    return (
        moving if layout.settling == 0 else f"{moving} in turn, {words(layout.settled)} in the last {layout.settling}"
    )


def plan_cuts(plan: TilePlan) -> tuple[int, ...]:
    """The first frames of a plan's scenes but the first."""
    return tuple(b.span.start for a, b in pairwise(plan.windows) if a.scene != b.scene)


def duration(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 90 * 60 else f"{seconds / 3600:.1f} hours"


def passes_in_all(layout: TileLayout, steps: int, passes: int, guided: int | None = None) -> int:
    """Tile passes of a run of so many steps, `guided` of which (None: every one), spread evenly, take all the `passes`
    over the video; the others take one."""
    guided = steps if guided is None else min(guided, steps)
    spent = [passes if (step + 1) * guided // steps > step * guided // steps else 1 for step in range(steps)]
    return sum(layout.over(steps).at(step).tiles * each for step, each in enumerate(spent))


def measured_words(tile: TileSeconds) -> str:
    """What a tile pass was measured to take, and on what."""
    each = f"{tile.of('plain'):.3g} s a tile pass"
    return each if tile.measured == tile.tile else f"{each}, by operations from a tile of {tile.measured}"


def describe_plan(
    layout: TileLayout,
    settings: Propagation,
    steps: int,
    passes: int,
    *,
    guided: int | None = None,
    lagged: float,
    tap: float,
    weights: float,
    activations: float,
    tile: TileSeconds,
    others: Mapping[str, TileLayout],
) -> str:
    """A plan of sampling as text: passes as `passes_in_all` counts them, bytes, what `tile` takes here, and `others`:
    layouts that might have been chosen, by name."""
    plan = layout.settled
    calls = passes_in_all(layout, steps, passes, guided)
    mode = " (SAP lagged)" if settings.sap_lagged and "sap" in settings.kinds and len(plan.spatial) > 1 else ""
    fewer = {name: passes_in_all(other, steps, passes, guided) for name, other in others.items()}
    lines = [
        f"latents      {plan.width}x{plan.height}, {plan.frames} frames, {plan.windows[-1].scene + 1} scene(s)",
        f"tiles        {grids(layout)} of {plan.tile_size(0)}",
        f"propagation  {' + '.join(settings.kinds) or 'none'}{mode}",
        f"UNet         {calls:,} tile passes ({steps} steps, {steps if guided is None else guided} of {passes} passes)",
        f"memory       weights {readable(weights)}, activations about {readable(activations)}, TAP banks"
        f" {readable(tap)}; in host memory: SAP's lagged banks {readable(lagged)}",
        f"time         about {duration(calls * tile.of('plain'))} of sampling ({measured_words(tile)})",
        *(
            f"cheaper      layout {name}: {count:,} tile passes, {duration(count * tile.of('plain'))}"
            for name, count in fewer.items()
            if WORTH * count <= calls
        ),
    ]
    return "\n".join(lines)
