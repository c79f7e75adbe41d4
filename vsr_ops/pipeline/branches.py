"""The branches of a step's guidance, evaluated on a model: one by one, or those that see the same video in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..backbones.svd import Backbone
from ..sampling.calls import Call, gather_tiles
from ..sampling.guidance import Branch, Denoise
from ..sampling.layouts import TileLayout
from ..sampling.passes import SideBySide, run_passes
from ..sampling.propagation import Propagation, TileRun
from ..sampling.schedule import Step

Found = tuple[Tensor, Tensor | None]
"""A branch's estimate of the video, and where it was observed its saliency."""


@dataclass
class Branches:
    """What is told to `model` in each branch of a run, and the run's banks, a `TileRun` for each branch.

    `lr` and `contexts` are by whether a branch is conditional: LR latents `(frames, 4, h, w)`, and tokens `(1, tokens,
    dim)`, of the conditional branch also `(scenes, tokens, dim)`. `batch` is how many tiles of a branch go through the
    UNet together; `tick` is called for each branch before each UNet call.
    """

    model: Backbone
    layout: TileLayout
    propagation: Propagation
    batch: int
    lr: Mapping[bool, Tensor]
    contexts: Mapping[bool, Tensor]
    tick: Callable[[Call], None]
    _runs: dict[str, TileRun] = field(default_factory=dict[str, TileRun])

    @property
    def may_join(self) -> bool:
        """Whether the UNet takes the tokens of all branches in one call: there must be as many of each."""
        return self.contexts[True].shape[1] == self.contexts[False].shape[1]

    def denoise(self, step: Step, sigma: float, together: Sequence[Branch] = ()) -> Denoise:
        """The denoiser of a step. The branches `together`, which the guidance asks for one after the other with the
        same x, are evaluated in one pass when it asks for the first of them."""
        ahead: dict[Branch, Found] = {}

        def denoise(x: Tensor, branch: Branch) -> Found:
            if branch not in ahead:
                ahead.update(self._passed(x, step, sigma, together if branch in together else (branch,)))
            return ahead.pop(branch)

        return denoise

    def _passed(self, x: Tensor, step: Step, sigma: float, branches: Sequence[Branch]) -> dict[Branch, Found]:
        runs = [self._run(branch) for branch in branches]
        values = run_passes(runs, step, branches, partial(self._evaluate, x, sigma), self.batch)
        saliencies = [None if run.saliency is None else run.saliency.result() for run in runs]
        return dict(zip(branches, zip(values, saliencies, strict=True), strict=True))

    def _run(self, branch: Branch) -> TileRun:
        made = TileRun(self.layout.phases[0], self.propagation, layout=self.layout)
        return self._runs.setdefault(branch.name, made)

    def _evaluate(self, x: Tensor, sigma: float, run: TileRun | SideBySide, calls: Sequence[Call]) -> Tensor:
        for call in calls:
            self.tick(call)
        call, told = calls[0], [call.branch.conditional for call in calls]
        inputs = gather_tiles(run.plan, call, x).repeat(len(calls), 1, 1, 1)
        lr = torch.cat([gather_tiles(run.plan, call, self.lr[each]) for each in told])
        tokens = torch.cat([self._context(run, call, each) for each in told])
        with self.model.serving(run, call):
            return self.model.denoise(inputs, sigma, lr, tokens, call.frames)

    def _context(self, run: TileRun | SideBySide, call: Call, conditional: bool) -> Tensor:
        tokens = self.contexts[conditional]
        scene = run.plan.windows[call.window].scene if len(tokens) > 1 else 0
        return tokens[scene : scene + 1]
