"""How long a job still takes, while it runs: what was planned of each stage, corrected by what happens."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

#: The share of the whole that a plan is trusted like: as if so much of it had come true before the job began.
TRUST = 0.01
#: The share of a stage from which on its own pace counts for more than the plan's.
PACE = 0.1


class TimeLeft:
    """Seconds left of a job of stages that follow one another, of which `planned` has the seconds of each.

    How the machine does against the plan is taken from all that is done, and expected of what is not; a stage under
    way is more and more taken at its own pace.
    """

    def __init__(self, planned: Mapping[str, float], clock: Callable[[], float] = time.monotonic) -> None:
        self._planned, self._clock = dict(planned), clock
        self._stage, self._share, self._began = "", 0.0, clock()
        self._spent: dict[str, float] = {}

    def report(self, stage: str, done: int, total: int) -> None:
        """How far a stage is; with the first report of another, the one before is over."""
        now = self._clock()
        if stage != self._stage:
            if self._stage:
                self._spent[self._stage] = now - self._began
                self._began = now
            self._stage = stage
        self._share = done / max(total, 1)

    def seconds(self) -> float:
        """Of the whole job, from now on."""
        now, whole = self._clock() - self._began, sum(self._planned.values())
        share, plan = self._share, self._planned.get(self._stage, 0.0)
        expected = sum(self._planned.get(stage, 0.0) for stage in self._spent) + share * plan
        happened = sum(self._spent.values()) + (now if share > 0 else 0.0)
        factor = (happened + TRUST * whole) / (expected + TRUST * whole) if whole else 1.0
        later = sum(seconds for stage, seconds in self._planned.items() if stage not in {*self._spent, self._stage})
        own = share / (share + PACE)
        pace = now / share if share else 0.0
        return factor * later + (1 - share) * (own * pace + (1 - own) * factor * plan)
