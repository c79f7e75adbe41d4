"""A job's time in words: its dearest part, and what would make it cheaper."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..names import LAYOUTS
from ..sampling.interval import EVERY_STEP
from .part_samples import Work
from .part_times import PartTimes, sampling_seconds
from .plan_cost import WORTH, duration, measured_words
from .sampler import NoiseRange, Settings, make_layout, tile_passes

#: What makes less of a part, or does without.
WITHOUT = {
    "upscaler": "--upscaler bicubic does without the upscaler",
    "flow": "--align 0 does without the flow",
    "refiner": "--refiner none does without the refiner",
}
#: A part is worth advice from this share of the whole on.
SHARE = 0.2


def describe_time(work: Work, cuts: Sequence[int], times: PartTimes) -> str:
    """How long a job takes and its parts, the dearest first; and what would make it cheaper."""
    dearest = sorted(times.parts.items(), key=lambda part: -part[1])
    each = ", ".join(f"{name} {duration(seconds)}" for name, seconds in dearest)
    lines = [f"time         about {duration(times.total)}: {each}"]
    if times.busy:
        lines.append("machine      busy with other work while it was measured: the times are for a quiet one")
    name, seconds = dearest[0]
    at = f"; {measured_words(times.tile)}" if times.tile is not None else ""
    lines.append(f"dearest      {name}, {seconds / max(times.total, 1e-9):.0%}{at}")
    lines += [f"cheaper      {line}" for line in _cheaper(work, cuts, times)]
    return "\n".join(lines)


def _cheaper(work: Work, cuts: Sequence[int], times: PartTimes) -> Iterator[str]:
    """What would save a good part of the time, one line each."""
    model, settings, noise = work.model, work.settings, NoiseRange.of(work.model)
    sampling = times.parts.get("UNet", 0.0)
    if times.tile is not None and sampling >= SHARE * times.total:
        now = tile_passes(work.layout, settings, noise)
        for option, other in _others(settings):
            layout = make_layout(work.job, other, model.tile, model.factor, noise, cuts)
            passes = tile_passes(layout, other, noise)
            total = times.total - sampling + sampling_seconds(layout, other, noise, times.tile)
            if WORTH * passes <= now:
                yield f"{option}: {now / passes:.1f} times fewer tile passes ({passes:,}), {duration(total)} in all"
    for name, text in WITHOUT.items():
        if (seconds := times.parts.get(name, 0.0)) >= SHARE * times.total:
            yield f"{text}: {duration(times.total - seconds)} in all"


def _others(settings: Settings) -> Iterator[tuple[str, Settings]]:
    """Settings that take fewer tile passes, or might, each by the option that asks for it."""
    for name in LAYOUTS:
        if name != settings.layout:
            yield f"--layout {name}", replace(settings, layout=name)
    if settings.guidance != "none":
        yield "--guidance none", replace(settings, guidance="none", cfg=None, guidance_scale=None, interval=EVERY_STEP)
    if settings.steps > 1:
        steps = settings.steps // 2
        yield f"--steps {steps}", replace(settings, steps=steps)
