"""Arithmetic of a plan's cost: bytes of banks, time of a matrix product. Needs no model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..sampling.layouts import TileLayout
from ..sampling.propagation import Propagation, sap_rate
from ..sampling.tiling import TilePlan
from ..units import readable

#: Share of a matrix product's speed that a UNet reaches: rough, good to a factor of about 2.
EFFICIENCY = 0.45


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


def matmul_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a matrix product here, in about a tenth of a second."""
    size = 1024 if device.type == "cpu" else 4096
    a = torch.randn(size, size, device=device).to(dtype)

    def run() -> float:
        start = time.perf_counter()
        out: Tensor = a @ a
        out[0, 0].item()  # waits for the device
        return time.perf_counter() - start

    run()
    return 2 * size**3 / min(run() for _ in range(3))


def grids(layout: TileLayout) -> str:
    """The tile grids of a layout in words: each phase, and that of the last steps."""

    def words(plan: TilePlan) -> str:
        return f"{len(plan.rows)} rows x {len(plan.cols)} columns x {len(plan.windows)} windows"

    moving = " and ".join(words(plan) for plan in layout.phases)
    return (
        moving
        if layout.settling == 0
        else f"{moving} in turn, the last {layout.settling} steps {words(layout.settled)},"
    )


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
    flops: float,
    speed: float,
) -> str:
    """A plan as text. Bytes, `flops` of one tile's UNet call, `speed` of a matrix product in operations a second. All
    `passes` are those of the `guided` steps (None: of every one), spread evenly over the `steps`; the others take one.
    """
    plan = layout.settled
    tile, tiles = plan.tile_size(0), len(plan.spatial)
    guided = steps if guided is None else min(guided, steps)
    spent = [passes if (step + 1) * guided // steps > step * guided // steps else 1 for step in range(steps)]
    calls = sum(layout.over(steps).at(step).tiles * each for step, each in enumerate(spent))
    mode = " (SAP lagged)" if settings.sap_lagged and "sap" in settings.kinds else ""
    seconds = calls * flops / (EFFICIENCY * speed)
    return "\n".join(
        [
            f"latents      {plan.width}x{plan.height}, {plan.frames} frames, {plan.windows[-1].scene + 1} scene(s)",
            f"tiles        {grids(layout)} of {tile}",
            f"propagation  {' + '.join(settings.kinds) or 'none'}{mode if tiles > 1 else ''}",
            f"UNet         {calls} tile passes of {flops / 1e9:.1f} GFLOP ({steps} steps, {guided} of {passes} passes)",
            f"memory       weights {readable(weights)}, activations about {readable(activations)}, TAP banks"
            f" {readable(tap)}; in host memory: SAP's lagged banks {readable(lagged)}",
            f"time         about {seconds / 60:.1f} minutes of sampling (good to a factor of 2)",
        ]
    )
