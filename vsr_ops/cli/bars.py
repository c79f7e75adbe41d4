"""What is shown while a command works."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from ..pipeline.plan_cost import duration
from ..pipeline.time_left import TimeLeft

#: What a stage counts; others count frames.
UNITS = {"sample": "tile"}
_WHOLE = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]"


class Bars:
    """A progress bar per stage; where the seconds of each stage are `planned`, with the time left of the whole."""

    def __init__(self, planned: Mapping[str, float] | None = None) -> None:
        self._stage, self._left = "", None if planned is None else TimeLeft(planned)
        self._bar: Any = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage or self._bar is None:
            self.close()
            self._stage, unit = stage, UNITS.get(stage, "frame")
            shape = None if self._left is None else _WHOLE
            self._bar = tqdm(total=total, desc=stage, unit=unit, leave=True, dynamic_ncols=True, bar_format=shape)
        if self._left is not None:
            self._left.report(stage, done, total)
            self._bar.set_postfix_str(f"{duration(self._left.seconds())} left in all", refresh=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Ends every bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
