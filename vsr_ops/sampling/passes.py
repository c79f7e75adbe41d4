"""One pass of a branch over the whole video: its calls, in as many parts as memory asks for, checked and blended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import SamplingError
from .calls import Call, calls
from .guidance import Branch
from .propagation import TileRun
from .schedule import Step
from .tiling import Merger


def evaluate_within(run: TileRun, call: Call, evaluate: Callable[[Call], Tensor]) -> Tensor:
    """`evaluate(call)`, in as many parts as memory asks for; `(tiles*frames, c, h, w)` all the same.

    Raises the device's own error where a single tile does not fit.
    """
    if run.limit is not None and len(call.tiles) > run.limit:
        sizes = range(0, len(call.tiles), run.limit)
        parts = [replace(call, tiles=call.tiles[first : first + run.limit]) for first in sizes]
        return torch.cat([evaluate_within(run, part, evaluate) for part in parts])
    try:
        return evaluate(call)
    except Exception as error:
        if len(call.tiles) == 1 or not run.memory.ran_out(error):
            raise
    # Outside the handler: only now is what the exception held free.
    run.shrink(call)
    run.memory.free()
    return evaluate_within(run, call, evaluate)


def run_pass(
    run: TileRun,
    step: Step,
    branch: Branch,
    evaluate: Callable[[Call], Tensor],
    batch: int = 1,
    watch: Callable[[Call, Merger], None] = lambda call, merger: None,
) -> Tensor:
    """One pass over the video: every tile evaluated, checked and blended; `(frames, c, height, width)`.

    `evaluate` gives `(tiles*frames, c, h, w)` for a call. `watch` is told of every call whose tiles are blended. Raises
    SamplingError, naming step and tile, for a value that is not finite.
    """
    run.begin(step, branch)
    merger = Merger(run.plan)
    finite: list[tuple[Call, Tensor]] = []
    for call in calls(run.plan, step, branch, batch, synchronous=not run.settings.sap_lagged):
        value = evaluate_within(run, call, evaluate)
        finite.append((call, torch.isfinite(value).all()))
        run.finish(call)
        for i, m in enumerate(call.tiles):
            merger.add(call.window, m, value[i * call.frames : (i + 1) * call.frames])
        watch(call, merger)
    # Read once a pass: each reading waits until the device has done all that it was given.
    if not bool(torch.stack([each for _, each in finite]).all()):
        call = next(call for call, each in finite if not bool(each))
        raise SamplingError(
            f"step {step.index + 1}, window {call.window + 1} of {len(run.plan.windows)}, tile"
            f" {', '.join(str(m + 1) for m in call.tiles)} of {len(run.plan.spatial)}, branch {branch.name}: the"
            " model gave NaN or infinity; try float32, or check the weights"
        )
    return merger.result()
