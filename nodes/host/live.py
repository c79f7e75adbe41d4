"""The host's live preview and progress between two steps: with many tiles a step takes minutes, and the host hears of
steps alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import latent_preview
import torch
from torch import Tensor

from ...vsr_ops.sampling.calls import Call
from ...vsr_ops.sampling.guidance import Branch
from ...vsr_ops.sampling.tiling import Merger, TilePlan

#: Seconds between two reports: an artist sees no more, and the sampling is not held up.
INTERVAL = 1.0


class Live:
    """Reports tiles as they are done, through the host's own callback for steps: a share of a step, and one frame of
    the denoised video as far as it goes. What no tile covers yet is as the step before left it.

    The frame is the first of the video; at a SAP step, where windows follow one another, the first of the window under
    way.
    """

    def __init__(self, model: Any, steps: int, passes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._model, self._steps, self._clock, self._last = model, steps, clock, clock()
        self._show: Callable[..., None] | None = None
        self._step, self._expected, self._begun, self._done, self._reported = -1, passes, 0, 0, 0.0
        self._before: dict[int, Tensor] = {}

    def begin(self, step: int) -> None:
        """Announces a pass over the video, in a step that is counted from the run's first."""
        if step != self._step:
            # As many as the step before took, once one is over.
            self._expected = self._begun or self._expected
            self._step, self._begun = step, 0
        self._begun, self._done = self._begun + 1, 0

    def tiles(self, plan: TilePlan, call: Call, merger: Merger) -> None:
        """Tiles are done; shows them when it is time to."""
        self._done += len(call.tiles)
        if self._clock() - self._last < INTERVAL:
            return
        share = (self._begun - 1 + self._done / plan.tiles) / max(self._expected, self._begun)
        self._reported = max(self._reported, self._step + min(share, 1.0))
        frame = plan.windows[call.window].span.start if call.step.kind == "sap" else 0
        picture = self._picture(frame, call.branch, merger)
        # Prepared only now: it may load a model of its own.
        show = self._show = self._show or latent_preview.prepare_callback(self._model, self._steps)
        show(self._reported - 1, picture, picture, self._steps)
        self._last = self._clock()

    def _picture(self, frame: int, branch: Branch, merger: Merger) -> Tensor:
        before = self._before.get(frame)
        if before is not None and not shows(branch):
            return before
        picture, missing = merger.so_far(frame)
        return picture if before is None else torch.where(missing, before, picture)

    def end(self, plan: TilePlan, branch: Branch, video: Tensor) -> None:
        """A pass is over; `video` is its estimate, of which the frames that are shown are kept."""
        if shows(branch):
            frames: Sequence[int] = sorted({0, *(window.span.start for window in plan.windows)})
            self._before = {frame: video[frame : frame + 1].clone() for frame in frames}


def shows(branch: Branch) -> bool:
    """Whether a branch's estimate looks like the result."""
    return branch.conditional and branch.attention is None


def passes_of(guider: Any, guidances: Sequence[str]) -> int:
    """How many passes a step of a run most likely takes: before the first is over it can only be guessed."""
    cfg = "negative" in guider.conds and getattr(guider, "cfg", 1.0) != 1
    return 1 + cfg + sum(1 for name in guidances if not (cfg and name == "dssag"))
