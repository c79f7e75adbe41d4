"""Scores clips in memory or streamed, a few frames at a time, every metric in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SettingError
from ..image.resize import quantize8
from ..sampling.tiling import TilePlan
from .report import Scores
from .seams import Borders, plan_borders
from .table import METRICS, Metric, chosen, seams

Video = Tensor | Callable[[], Iterable[Tensor]]
"""(frames, 3, h, w) RGB in [0, 1], or a callable that gives its frames (3, h, w) one by one, anew at each call."""

_PIXELS = 8 * 1280 * 720
"""How much of a video is measured at once: 8 frames of 720p, fewer of larger ones."""

_MOST = 16


def nothing(_: int) -> None:
    """No progress bar."""


def score(
    results: Mapping[str, Mapping[str, Video]],
    truths: Mapping[str, Video],
    names: Iterable[str] | str | None = None,
    *,
    borders: Borders | TilePlan | None = None,
    border: int = 0,
    device: torch.device | str | None = None,
    tick: Callable[[int], None] = nothing,
) -> Scores:
    """Measures `results[method][clip]` against `truths[clip]`: every method on every clip, one at a time.

    `names` are metrics of METRICS, or text with commas; None: all. What cannot be measured on this machine is in the
    result's `missing`, and so is "seam" without `borders`, which are those of the tiles (a TilePlan over latents will
    do; NaN where it is a single tile). `border` pixels are left out on each side, but for seams. `device` is where it
    is computed (None: where the frames are). `tick` is told how many frames have been measured since the last call.
    Values are taken as they are: quantise first for those of an 8-bit picture. Raises SettingError for a method
    without one of the clips, sizes or numbers of frames that differ from the truth's, and an unknown metric.
    """
    metrics, missing = available(names, borders)
    check_names(results, truths)
    frames: dict[tuple[str, str, str], tuple[float, ...]] = {}
    for clip, truth in truths.items():
        for method, clips in results.items():
            where = _Place(method, clip, border, borders, device)
            found = _score_clip(metrics, clips[clip], truth, where, tick)
            frames.update({(method, clip, name): tuple(values) for name, values in found.items()})
    return Scores(tuple(results), tuple(truths), tuple(metric.name for metric in metrics), frames, missing)


def score_pair(
    result: Tensor,
    truth: Tensor,
    names: Iterable[str] | str,
    plan: TilePlan | None = None,
    border: int = 0,
    tick: Callable[[int], None] = nothing,
) -> Scores:
    """`score` of one clip (frames, 3, h, w) in 8-bit levels, as it would be stored: method "result", clip "clip"."""

    def rounded(video: Tensor) -> Callable[[], Iterator[Tensor]]:
        return lambda: (quantize8(frame) for frame in video)

    return score(
        {"result": {"clip": rounded(result)}}, {"clip": rounded(truth)}, names, borders=plan, border=border, tick=tick
    )


@dataclass(frozen=True)
class _Place:
    """Which clip of which method, and how it is measured."""

    method: str
    clip: str
    border: int
    borders: Borders | TilePlan | None
    device: torch.device | str | None


def _score_clip(
    metrics: Sequence[Metric], result: Video, truth: Video, place: _Place, tick: Callable[[int], None]
) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {metric.name: [] for metric in metrics}
    for r, t, lead, count in _windows(result, truth, place):
        for metric in metrics:
            cut = place.border if metric.cropped else 0
            x, y = (_inside(video, cut) for video in (r, t))
            values[metric.name] += _new_values(_placed(metric, place, r), x, y, lead, count)
        tick(count)
    return values


def _placed(metric: Metric, place: _Place, frames: Tensor) -> Metric | None:
    """The metric with the tiles of this clip, where it is one of tiles; None where there is a single tile."""
    if metric.name != "seam":
        return metric
    plan = place.borders
    borders = plan_borders(plan, *frames.shape[-2:]) if isinstance(plan, TilePlan) else plan
    alone = isinstance(plan, TilePlan) and borders == Borders((), ())
    return None if alone else seams(borders)


def _new_values(metric: Metric | None, result: Tensor, truth: Tensor, lead: int, count: int) -> list[float]:
    """One value for each of `count` new frames, of which `lead` were seen before; NaN where there is none."""
    if metric is None:
        return [math.nan] * count
    new = slice(lead, lead + count)
    if not metric.context and not metric.pairs:
        return [float(value) for value in metric(result[new], truth[new])]
    if metric.context:
        return [float(value) for value in metric(result, truth)[new]]
    # The first frame of a clip has none before it.
    first = [math.nan] * (1 - lead)
    if lead + count < 2:
        return first
    return first + [float(value) for value in metric(result[: lead + count], truth[: lead + count])]


def _windows(result: Video, truth: Video, place: _Place) -> Iterator[tuple[Tensor, Tensor, int, int]]:
    """Frames of both in parts: (result, truth, how many came before already: 0 or 1, how many are new).

    One frame more follows where the video goes on, so that each new frame has its neighbours.
    """
    held: list[tuple[Tensor, Tensor]] = []
    lead = 0
    for pair in _paired(_stream(result), _stream(truth), place):
        held.append(pair)
        size = max(1, min(_MOST, _PIXELS // pair[0][0].numel()))
        if len(held) > lead + size:
            yield (*_stacked(held, place.device), lead, size)
            held, lead = held[-2:], 1
    if not held:
        raise SettingError(f"{place.method} of clip {place.clip!r} has no frames: expected at least one")
    yield (*_stacked(held, place.device), lead, len(held) - lead)


def _stream(video: Video) -> Iterator[Tensor]:
    return iter(video) if isinstance(video, Tensor) else iter(video())


def _paired(result: Iterator[Tensor], truth: Iterator[Tensor], place: _Place) -> Iterator[tuple[Tensor, Tensor]]:
    """Frames of both, which must be alike and as many."""
    count = 0
    while True:
        r, t = next(result, None), next(truth, None)
        if r is None or t is None:
            counts = [count + (x is not None) + sum(1 for _ in rest) for x, rest in ((r, result), (t, truth))]
            if counts[0] != counts[1]:
                raise unlike(place.method, place.clip, f"{counts[0]} frames", f"{counts[1]} frames")
            return
        if r.shape != t.shape:
            sizes = [f"{x.shape[-1]}x{x.shape[-2]} with {x.shape[0]} channels" for x in (r, t)]
            raise unlike(place.method, place.clip, *sizes)
        count += 1
        yield r, t


def _stacked(held: list[tuple[Tensor, Tensor]], device: torch.device | str | None) -> tuple[Tensor, Tensor]:
    r, t = (torch.stack(frames) for frames in zip(*held, strict=True))
    return r.to(device), t.to(device)


def _inside(video: Tensor, border: int) -> Tensor:
    height, width = video.shape[-2:]
    if border < 0 or min(height, width) <= 2 * border:
        raise SettingError(
            f"border is {border}: expected 0 or more pixels that leave some of {width}x{height}; use a smaller one"
        )
    return video[..., border : height - border, border : width - border]


def available(names: Iterable[str] | str | None, borders: object) -> tuple[list[Metric], dict[str, str]]:
    """The metrics to measure, and why the others are not."""
    asked = chosen(METRICS if names is None else names)
    metrics = [METRICS[name] for name in asked]
    reasons = {metric.name: metric.missing() for metric in metrics if metric.name != "seam" or borders is None}
    missing = {name: reason for name, reason in reasons.items() if reason}
    if len(missing) == len(metrics):
        lines = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
        raise SettingError(f"none of the metrics can be measured here: {lines}; name others, such as psnr_y")
    return [metric for metric in metrics if metric.name not in missing], missing


def check_names(results: Mapping[str, Mapping[str, object]], truths: Mapping[str, object]) -> None:
    """Raises SettingError for a method without one of the truth's clips."""
    if not results or not truths:
        raise SettingError("nothing to measure: expected at least one method and one clip with its truth")
    for method, clips in results.items():
        lacking = [clip for clip in truths if clip not in clips]
        if lacking:
            raise SettingError(
                f"method {method!r} has no clip {', '.join(map(repr, lacking))}: expected one for each of the truth's,"
                f" by the same name; it has {', '.join(map(repr, clips)) or 'none'}"
            )


def unlike(method: str, clip: str, result: str, truth: str) -> SettingError:
    """The error of a result that is not as long or large as the truth."""
    return SettingError(
        f"clip {clip!r}: {method} is {result}, the truth is {truth}: expected equal frames and sizes (width x height);"
        " metrics resize and cut nothing, bring both to one size first"
    )
