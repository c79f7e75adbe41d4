"""Measures methods on folders of clips; `score` does so for what is in memory or streamed.

scores = score({"bicubic": {"kite": frames}}, {"kite": truth}, ["psnr_y", "vmaf"])
print(scores.table())
scores.write(Path("out"))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..errors import VideoError
from ..image.resize import quantize8
from ..sampling.tiling import TilePlan
from ..video import VideoInfo, probe, read_frames
from ..video.pictures import is_picture
from .report import Scores, joined
from .scoring import Video, available, check_names, nothing, score, score_pair, unlike

__all__ = ["Evaluation", "Video", "evaluate", "joined", "list_clips", "score", "score_pair"]

UNREADABLE_SHARE = 0.05
"""The share of clips that may be unreadable before a run stops."""

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".y4m", ".wmv", ".ogv")
"""What counts as a video in a folder of clips, in lower case."""


def list_clips(folder: Path) -> dict[str, Path]:
    """The clips in a folder by stem: videos, and folders of pictures. Hidden and other files are left out.

    A folder of pictures alone, or a single video, is one clip, whose stem is "". Raises VideoError for a folder that
    is not there or holds none, and for two clips of one stem.
    """
    if folder.is_file():
        return {"": folder}
    if not folder.is_dir():
        raise VideoError(f"'{folder}' does not exist; give a folder of clips, or a video")
    shown = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    found = [path for path in shown if path.is_dir() or path.suffix.lower() in VIDEO_SUFFIXES]
    if not found and any(is_picture(path) for path in shown):
        return {"": folder}
    if not found:
        raise VideoError(f"'{folder}' holds no clips; expected videos, or folders of numbered pictures")
    clips: dict[str, Path] = {}
    for path in found:
        stem = path.name if path.is_dir() else path.stem
        if stem in clips:
            raise VideoError(f"'{clips[stem]}' and '{path}' are both clip {stem!r}; take one of them away")
        clips[stem] = path
    return clips


@dataclass(frozen=True)
class Evaluation:
    """The scores of folders of clips, which clips could not be read and why, and what had no truth."""

    scores: Scores
    unreadable: Mapping[str, str]
    unmatched: tuple[Path, ...]

    def notes(self) -> str:
        """A line for each clip left out, with a count at the end; empty where there is none."""
        lines = [f"unreadable, skipped: {reason}" for reason in self.unreadable.values()]
        lines += [f"no truth, skipped: '{path}'" for path in self.unmatched]
        total = len(self.unreadable) + len(self.scores.clips)
        if self.unreadable:
            lines.append(f"{len(self.unreadable)} of {total} clips could not be read and count nowhere")
        return "\n".join(lines)


def evaluate(
    truth: Path,
    methods: Mapping[str, Path],
    names: Iterable[str] | str | None = None,
    *,
    plan: Callable[[VideoInfo], TilePlan] | None = None,
    border: int = 0,
    device: torch.device | str | None = None,
    started: Callable[[int], None] = nothing,
    tick: Callable[[int], None] = nothing,
) -> Evaluation:
    """Measures the clips in each method's folder against those of one stem in `truth`; frames in 8-bit levels.

    `plan` gives the tiles that a video of that size was made with, for the metric "seam"; `started` is told the number
    of frames in all; the rest is `score`'s. A clip that cannot be read is left out for every method; more than 5 % of
    them raise VideoError, before anything is measured where it shows by then. Raises SettingError for a method that
    lacks a clip, for sizes and numbers of frames that differ, and for an unknown metric.
    """
    available(names, plan)
    targets = list_clips(truth)
    given = {method: list_clips(folder) for method, folder in methods.items()}
    check_names(given, targets)
    unmatched = tuple(path for clips in given.values() for stem, path in clips.items() if stem not in targets)
    readable, unreadable = _probed(targets, given)
    _check_share(unreadable, len(targets))
    for stem, infos in readable.items():
        for method, info in infos.items():
            _check_alike(method, _called(stem, truth), info, infos[""])
    started(sum(info.frames for infos in readable.values() for method, info in infos.items() if method))
    parts: list[Scores] = []
    for stem, infos in readable.items():
        name = _called(stem, truth)
        videos = {method: {name: partial(_frames, info)} for method, info in infos.items() if method}
        borders = None if plan is None else plan(infos[""])
        try:
            parts.append(
                score(
                    videos,
                    {name: partial(_frames, infos[""])},
                    names,
                    borders=borders,
                    border=border,
                    device=device,
                    tick=tick,
                )
            )
        except VideoError as error:
            unreadable[stem] = str(error)
            _check_share(unreadable, len(targets))
    return Evaluation(joined(parts), unreadable, unmatched)


def _probed(
    targets: Mapping[str, Path], given: Mapping[str, Mapping[str, Path]]
) -> tuple[dict[str, dict[str, VideoInfo]], dict[str, str]]:
    """By stem: what each method's file is, the truth's under "", and why a stem cannot be read."""
    readable: dict[str, dict[str, VideoInfo]] = {}
    unreadable: dict[str, str] = {}
    for stem, path in targets.items():
        try:
            readable[stem] = {"": probe(path), **{method: probe(clips[stem]) for method, clips in given.items()}}
        except VideoError as error:
            unreadable[stem] = str(error)
    return readable, unreadable


def _check_share(unreadable: Mapping[str, str], total: int) -> None:
    if len(unreadable) > UNREADABLE_SHARE * total or len(unreadable) == total:
        raise VideoError(
            f"{len(unreadable)} of {total} clips cannot be read: expected at most {UNREADABLE_SHARE:.0%} of them; mend"
            f" or remove these: {'; '.join(unreadable.values())}"
        )


def _check_alike(method: str, clip: str, info: VideoInfo, truth: VideoInfo) -> None:
    said = [f"{x.frames} frames of {x.width}x{x.height}" for x in (info, truth)]
    if said[0] != said[1]:
        raise unlike(method, clip, *said)


def _called(stem: str, truth: Path) -> str:
    return stem or truth.stem


def _frames(info: VideoInfo) -> Iterator[Tensor]:
    return (quantize8(frame.image) for frame in read_frames(info))
