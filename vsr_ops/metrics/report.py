"""Scores of methods on clips: tables in the layout of the papers, CSV files, curves."""

from __future__ import annotations

import csv
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import SettingError, VideoError
from ..system.outputs import refuse_inputs, refuse_taken, whole
from ..video.pictures import save_png8
from ..views.chart import Panel, draw_panels
from .published import Published, ours, published
from .table import METRICS, aligned, mean, written

Key = tuple[str, str, str]
"""(method, clip, metric)"""

FILES = ("table.txt", "metrics.csv", "frames.csv", "metrics.png")
"""What `Scores.write` leaves in a folder."""

_NOTE_BEST = "* best of its row. "
_NOTE = "Values are means over frames, then over clips."
_NOTE_PUBLISHED = (
    "published: as the papers print them, on other clips with other degradations; the channels of PSNR and SSIM stand"
    " beside them where they are known, tOF is on RAFT. They say what is usual and do not compare with the rows above."
)


@dataclass(frozen=True)
class Scores:
    """What was measured. `frames` holds one value per frame for each (method, clip, metric).

    NaN where there is none: at the first frame of metrics over time, where flicker finds nothing static. `missing`
    says for each metric that was asked for and not measured why.
    """

    methods: tuple[str, ...]
    clips: tuple[str, ...]
    names: tuple[str, ...]
    frames: Mapping[Key, tuple[float, ...]]
    missing: Mapping[str, str]

    def value(self, method: str, name: str, clip: str | None = None) -> float:
        """Mean of a metric over a clip's frames; without a clip the mean of the clips' means. NaN of nothing."""
        clips = self.clips if clip is None else (clip,)
        means = [mean(_vector(self.frames[method, one, name])) for one in clips]
        return mean(_vector(means))

    def rows(self, clip: str | None = None) -> dict[str, dict[str, float]]:
        """`value` of each metric by method."""
        return {method: {name: self.value(method, name, clip) for name in self.names} for method in self.methods}

    def table(self, by_clip: bool = False, beside: str = "none") -> str:
        """Text in the layout of DC-VSR's table 1: data sets and metrics down, methods across, the best marked.

        Rows are the means; `by_clip` adds each clip's before them; `beside` names published tables
        (`published.PUBLISHED`). Captions and what was not measured follow. Raises SettingError.
        """
        several = len(self.clips) > 1
        groups: list[tuple[str, str | None]] = [(clip, clip) for clip in self.clips if by_clip or not several]
        groups += [(f"mean of {len(self.clips)}", None)] if several else []
        lines = [["Datasets", "Metrics", *self.methods]]
        for title, clip in groups:
            for k, name in enumerate(self.names):
                values = [self.value(method, name, clip) for method in self.methods]
                texts = [written(name, value) for value in values]
                lines.append([title if k == 0 else "", _headed(name), *_marked(name, texts, values)])
        shown = [part for part in published(beside) if part.beside(self.names)]
        notes = [_NOTE_BEST * (len(self.methods) > 1) + _NOTE]
        notes.append(". ".join(f"{METRICS[name].label}: {METRICS[name].note}" for name in self.names) + ".")
        notes += [_NOTE_PUBLISHED] if shown else []
        notes += [f"not measured: {name}: {reason}" for name, reason in self.missing.items()]
        captions = "\n".join(textwrap.fill(note, 118, break_on_hyphens=False) for note in notes)
        return "\n\n".join([aligned(lines, 2), *_published(shown, self.names), captions])

    def plot(self, width: int = 960) -> Tensor:
        """Curves over the frames of all clips, a panel for each metric: (3, H, width) RGB in [0, 1]."""
        return draw_panels([self._panel(name) for name in self.names], width)

    def write(self, folder: Path, beside: str = "none", overwrite: bool = False) -> list[Path]:
        """Writes table.txt, metrics.csv, frames.csv and metrics.png into `folder`; their paths.

        metrics.csv has a line for each clip, method and metric, and for the means clip "mean"; frames.csv a line for
        each clip, method and frame. Raises VideoError where the disk does not take them, and without `overwrite` where
        one of them is there.
        """
        check_folder(folder, overwrite)
        table, means, frames, plot = paths = [folder / name for name in FILES]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with whole(table, overwrite) as part:
                part.write_text(self.table(True, beside) + "\n", encoding="utf-8")
            self.write_csv(means, overwrite)
            self.write_frames(frames, overwrite)
            with whole(plot, overwrite) as part:
                save_png8(part, self.plot(), None)
        except OSError as error:
            raise VideoError(
                f"'{folder}' cannot be written ({error.strerror}); free the disk or give another"
            ) from error
        return paths

    def write_csv(self, path: Path, overwrite: bool = False) -> None:
        """clip,method,metric,value; raises OSError, also where `path` is there and may not be replaced."""
        lines = [
            [clip or "mean", method, name, _exact(self.value(method, name, clip))]
            for clip in [*self.clips, None]
            for method in self.methods
            for name in self.names
        ]
        _write(path, [["clip", "method", "metric", "value"], *lines], overwrite)

    def write_frames(self, path: Path, overwrite: bool = False) -> None:
        """clip,method,frame and a column for each metric, frames counted from 0; raises as `write_csv`."""
        lines = [
            [clip, method, str(frame), *(_exact(self.frames[method, clip, name][frame]) for name in self.names)]
            for clip in self.clips
            for method in self.methods
            for frame in range(self._length(clip))
        ]
        _write(path, [["clip", "method", "frame", *self.names], *lines], overwrite)

    def _length(self, clip: str) -> int:
        return len(self.frames[self.methods[0], clip, self.names[0]]) if self.names else 0

    def _panel(self, name: str) -> Panel:
        parts: list[tuple[int, str]] = []
        start = 0
        for clip in self.clips:
            parts.append((start, clip))
            start += self._length(clip)
        curves = {
            method: [value for clip in self.clips for value in self.frames[method, clip, name]]
            for method in self.methods
        }
        return Panel(f"{METRICS[name].label}, {METRICS[name].aim} ({METRICS[name].note})", curves, parts)


def check_folder(folder: Path, overwrite: bool = False, inputs: Iterable[Path] = ()) -> None:
    """Raises VideoError where `Scores.write` would refuse `folder`, or where it holds one of the `inputs`."""
    refuse_inputs(folder, inputs)
    for name in FILES:
        refuse_taken(folder / name, overwrite)


def joined(parts: Iterable[Scores]) -> Scores:
    """Scores of the same methods and metrics on several clips as one. Raises SettingError where they differ."""
    together = list(parts)
    if not together:
        raise SettingError("no scores to join: expected at least one clip; measure something first")
    first = together[0]
    if any((part.methods, part.names) != (first.methods, first.names) for part in together):
        raise SettingError("scores of different methods or metrics cannot be joined: measure all clips alike")
    frames = {key: values for part in together for key, values in part.frames.items()}
    clips = tuple(clip for part in together for clip in part.clips)
    return Scores(first.methods, clips, first.names, frames, first.missing)


def _headed(name: str, label: str = "") -> str:
    return f"{label or METRICS[name].label} {METRICS[name].arrow}"


def _marked(name: str, texts: Sequence[str], values: Sequence[float]) -> list[str]:
    """Values as text of even width, "*" after the best, also where several print alike; one alone is not marked."""
    best = METRICS[name].best(values)
    if len(values) < 2 or math.isnan(best):
        return list(texts)
    shown = texts[list(values).index(best)]
    return [text + ("*" if text == shown else " ") for text in texts]


def _published(shown: Sequence[Published], names: Sequence[str]) -> list[str]:
    """A block for each paper and set of methods, its data sets below each other."""
    blocks: dict[tuple[str, tuple[str, ...]], list[list[str]]] = {}
    for part in shown:
        lines = blocks.setdefault((part.source, part.methods), [["published", "Metrics", *part.methods]])
        for k, (label, texts) in enumerate(part.beside(names).items()):
            marked = _marked(ours(label), texts, [float(text) for text in texts])
            lines.append([part.dataset if k == 0 else "", _headed(ours(label), label), *marked])
    return [f"published: {source}\n{aligned(lines, 2)}" for (source, _), lines in blocks.items()]


def _vector(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _exact(value: float) -> str:
    return "" if math.isnan(value) else repr(value)


def _write(path: Path, lines: Iterable[Sequence[str]], overwrite: bool) -> None:
    with whole(path, overwrite) as part, part.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)
