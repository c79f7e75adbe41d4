"""What is shown while a command works."""

from __future__ import annotations

import time
from typing import Any

from tqdm import tqdm


class Bars:
    """A progress bar per stage, with frames a second and the time left."""

    def __init__(self, frames: int) -> None:
        self._frames, self._stage, self._start = frames, "", 0.0
        self._bar: Any = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage or self._bar is None:
            self.close()
            self._stage, self._start = stage, time.monotonic()
            unit = "call" if stage == "sample" else "frame"
            self._bar = tqdm(total=total, desc=stage, unit=unit, leave=True, dynamic_ncols=True)
        elapsed = time.monotonic() - self._start
        if stage == "sample" and elapsed > 0:
            self._bar.set_postfix_str(f"{self._frames * done / total / elapsed:.2f} frames/s", refresh=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Ends every bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
