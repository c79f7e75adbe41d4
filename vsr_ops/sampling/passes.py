"""Passes of a step's branches over the whole video, one by one or side by side: their calls, in as many parts as
memory asks for, checked and blended."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import SamplingError
from .attention import fused_attention
from .calls import Call, calls
from .guidance import Branch
from .layers import Layer
from .propagation import TileRun
from .schedule import Step
from .tiling import Merger, TilePlan

log = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class SideBySide:
    """Calls of several branches on the same tiles, evaluated as one: a share of the batch each, in the order of
    `calls`, and to each its own banks. A model serves it as it does a `TileRun`."""

    runs: Sequence[TileRun]
    calls: Sequence[Call]

    @property
    def plan(self) -> TilePlan:
        """The tiles of the pass under way."""
        return self.runs[0].plan

    @property
    def bank_bytes(self) -> int:
        """Host memory the lagged banks hold now."""
        return sum(run.bank_bytes for run in self.runs)

    def serve(self, call: Call) -> None:
        """Announces the evaluation; `call` is the first of the calls."""
        for run, own in zip(self.runs, self.calls, strict=True):
            run.serve(own)

    def attend(self, call: Call, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Self-attention of a layer `(branches*tiles*frames, heads, tokens, dim)`, in each branch's share its own."""
        parts = list(zip(self.runs, self.calls, strict=True))
        if not any(run.acts(own, layer) for run, own in parts):
            return fused_attention(q, k, v)
        shares = zip(*(x.chunk(len(parts)) for x in (q, k, v)), strict=True)
        return torch.cat([run.attend(own, layer, *qkv) for (run, own), qkv in zip(parts, shares, strict=True)])


Evaluate = Callable[[TileRun | SideBySide, Sequence[Call]], Tensor]
"""(what the model is to serve, calls of different branches on the same tiles) -> `(calls*tiles*frames, c, h, w)`."""


def evaluate_together(runs: Sequence[TileRun], own: Sequence[Call], evaluate: Evaluate) -> Sequence[Tensor]:
    """Values of the same tiles in several branches: in one call where memory takes it, else branch by branch."""
    if len(own) > 1 and not any(run.alone for run in runs):
        try:
            return evaluate(SideBySide(runs, own), own).chunk(len(own))
        except Exception as error:
            if not runs[0].memory.ran_out(error):
                raise
        # Outside the handler: only now is what the exception held free.
        for run in runs:
            run.separate()
        runs[0].memory.free()
        log.warning("Out of memory with %d branches in a call: going on with one at a time", len(own))

    def alone(run: TileRun) -> Callable[[Call], Tensor]:
        return lambda call: evaluate(run, [call])

    return [evaluate_within(run, call, alone(run)) for run, call in zip(runs, own, strict=True)]


def run_pass(
    run: TileRun,
    step: Step,
    branch: Branch,
    evaluate: Callable[[Call], Tensor],
    batch: int = 1,
    watch: Callable[[Call, Merger], None] = lambda call, merger: None,
) -> Tensor:
    """`run_passes` of one branch: `(frames, c, height, width)`; `evaluate` gives `(tiles*frames, c, h, w)`."""
    return run_passes([run], step, [branch], lambda _, calls: evaluate(calls[0]), batch, watch)[0]


def run_passes(
    runs: Sequence[TileRun],
    step: Step,
    branches: Sequence[Branch],
    evaluate: Evaluate,
    batch: int = 1,
    watch: Callable[[Call, Merger], None] = lambda call, merger: None,
) -> list[Tensor]:
    """A pass of each branch over the video, side by side: every tile evaluated, checked and blended; a list of
    `(frames, c, height, width)`.

    There is a run for each branch. `watch` is told of every call whose tiles are blended. Raises SamplingError, naming
    step and tile, for a value that is not finite.
    """
    lagged = any(run.settings.sap_lagged for run in runs)
    for run, branch in zip(runs, branches, strict=True):
        # Where one of them ran out of memory the others would too.
        run.settings = replace(run.settings, sap_lagged=lagged)
        run.begin(step, branch)
    mergers = [Merger(run.plan) for run in runs]
    finite: list[tuple[Call, Tensor]] = []
    for first in calls(runs[0].plan, step, branches[0], batch, synchronous=not lagged):
        own = [replace(first, branch=branch) for branch in branches]
        values = evaluate_together(runs, own, evaluate)
        for run, call, value, merger in zip(runs, own, values, mergers, strict=True):
            finite.append((call, torch.isfinite(value).all()))
            run.finish(call)
            for i, m in enumerate(call.tiles):
                merger.add(call.window, m, value[i * call.frames : (i + 1) * call.frames])
            watch(call, merger)
    # Read once a pass: each reading waits until the device has done all that it was given.
    if not bool(torch.stack([each for _, each in finite]).all()):
        call = next(call for call, each in finite if not bool(each))
        raise SamplingError(
            f"step {step.index + 1}, window {call.window + 1} of {len(runs[0].plan.windows)}, tile"
            f" {', '.join(str(m + 1) for m in call.tiles)} of {len(runs[0].plan.spatial)}, branch {call.branch.name}:"
            " the model gave NaN or infinity; try float32, or check the weights"
        )
    return [merger.result() for merger in mergers]
