"""Compression levels over a video's frames, drawn."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..modules.compression import COARSEST, mean_crf
from .chart import Panel, draw_panels


def plot_levels(levels: Tensor, cuts: Sequence[int] = (), width: int = 960, height: int = 260) -> Tensor:
    """The level of each frame `(frames,)` as a curve of CRFs, a line at each scene cut: (3, H, width) in [0, 1]."""
    parts = [(start, f"scene {number}" if cuts else "") for number, start in enumerate((0, *cuts), 1)]
    crf = [float(level) * COARSEST for level in levels]
    title = f"compression by frame, as x264's CRF (0 clean, {COARSEST} coarsest), mean {mean_crf(levels):.1f}"
    return draw_panels([Panel(title, {"CRF": crf}, parts)], width, height)
