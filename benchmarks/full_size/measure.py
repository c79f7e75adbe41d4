"""Headless: every row of a model on a video of one size, in rounds taken in turn, and its VAE."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import repeat

import torch
from torch import Tensor

from benchmarks.full_size import report
from benchmarks.full_size.build import MODELS, Sizes
from benchmarks.full_size.report import Line, VAETaken
from benchmarks.full_size.rows import PLAIN, ROWS, Bench, Taken, Traffic, forget_peak, now, peak
from vsr_ops.backbones.svd import Backbone
from vsr_ops.sampling.tiling import TilePlan, TileSize, plan_tiles
from vsr_ops.system.memory import free_cached, ran_out
from vsr_ops.vae.encode import stream_encode
from vsr_ops.vae.latents import CELL, decode_frames

FRAMES = 28
#: Height and width of the results.
PICTURES = {"720p": (720, 1280), "1080p": (1080, 1920), "4k": (2160, 3840)}
OVERLAP = 0.5
#: By how much both UNets shrink a latent.
FACTOR = 8


@dataclass(frozen=True)
class Limits:
    """How much is run. Of a pass `calls` UNet calls, of the VAE `vae_calls`, None is all; at most `rounds`; nothing is
    begun that would not be done by `deadline`, in seconds of `time.monotonic`."""

    rounds: int = 1
    calls: int | None = None
    vae_calls: int | None = None
    deadline: float = float("inf")

    def allows(self, seconds: float) -> bool:
        """Whether there is time for so much more."""
        return time.monotonic() + seconds <= self.deadline


@dataclass(frozen=True)
class Case:
    """A model of `build.MODELS` in a configuration, on a video whose `size` stands in its lines; the `rows` to run, of
    ROWS and "vae"."""

    model: str
    sizes: Sizes
    size: str
    device: torch.device
    dtype: torch.dtype
    rows: tuple[str, ...]

    @property
    def label(self) -> str:
        """How its lines begin."""
        return f"{MODELS[self.model].title}, {self.size}, {str(self.dtype).removeprefix('torch.')}"

    def build(self) -> Backbone:
        """The model, on its device."""
        return MODELS[self.model].build(self.sizes, self.device, self.dtype)


def plan_of(size: str, tile: TileSize) -> TilePlan:
    """The tiles of FRAMES frames whose result has a size of PICTURES."""
    height, width = (-(-side // (CELL * FACTOR)) * FACTOR for side in PICTURES[size])
    return plan_tiles(FRAMES, height, width, tile, OVERLAP, factor=FACTOR)


def small_plan(tile: TileSize) -> TilePlan:
    """2 x 2 tiles in two windows: the least in which SAP and TAP both act."""
    frames, height, width = (side + side // 2 for side in (tile.frames, tile.height, tile.width))
    return plan_tiles(frames, height, width, tile, OVERLAP, factor=FACTOR)


def release() -> None:
    """Gives a model's memory back before the next is built."""
    gc.collect()
    free_cached()


def measured(case: Case, plan: TilePlan, limits: Limits) -> list[Line]:
    """The lines of one model on one video."""
    print(f"building {case.label}", flush=True)
    model = case.build()
    try:
        bench = Bench(model, plan, limits.calls)
        bench.warm_up()
        others: list[Line] = []
        # First, since the rows take what time is left.
        vae = vae_of(bench, limits, f"{case.label}: VAE", others) if "vae" in case.rows else None
        times = rounds(bench, case, limits, others)
    finally:
        del model
        release()
    lines = report.row_lines(case.label, times, plan.frames, vae)
    return lines + ([] if vae is None else vae.lines(case.label, plan.frames)) + others


def rounds(bench: Bench, case: Case, limits: Limits, others: list[Line]) -> dict[str, list[Taken]]:
    """What the rows took, round by round; `others` gets a line for each that failed or had to be left out.

    On a card each row runs once more at the end with its traffic counted, where there is time: that slows it, most of
    all where calls are many and small, so its seconds do not count. Every second round runs backwards, so that drift
    cancels.
    """
    names = [name for name in ROWS if name in case.rows or name == PLAIN]
    times: dict[str, list[Taken]] = {name: [] for name in names}
    a_pass = 0.0
    for turn in range(limits.rounds):
        begun = time.monotonic()
        for name in names if turn % 2 == 0 else names[::-1]:
            row, start = ROWS[name], time.monotonic()
            if turn == 0 and name != PLAIN and not limits.allows(a_pass * row.passes * row.steps):
                others.append(report.left_out(f"{case.label}: {row.title}"))
                continue
            if (taken := attempt(bench, name, False, case.label, others)) is not None:
                a_pass = a_pass or time.monotonic() - start
                times[name].append(taken)
        names = [name for name in names if times[name]]
        if PLAIN not in names or not limits.allows(time.monotonic() - begun):
            break
    for name in names if case.device.type != "cpu" else ():
        row = ROWS[name]
        if limits.allows(2 * a_pass * row.passes * row.steps):
            counted = attempt(bench, name, True, case.label, others)
            times[name] = [with_traffic(taken, counted) for taken in times[name]]
    return times


def with_traffic(taken: Taken, counted: Taken | None) -> Taken:
    """With the bytes of the run that counted them."""
    if counted is None:
        return taken
    return replace(taken, moved=counted.moved)


def attempt(bench: Bench, name: str, counting: bool, label: str, others: list[Line]) -> Taken | None:
    """One step of a row; None, with a line in `others`, where it fails."""
    row = ROWS[name]
    try:
        taken = bench.step(row, Traffic() if counting else None)
    except Exception as error:
        # one row's failure must not cost the others
        others.append(report.failure(f"{label}: {row.title}", error))
        failed = ran_out(error)
    else:
        return taken
    if failed:
        release()
    return None


@dataclass
class Counter:
    """Calls of a decoder: how many there were, how many were evaluated, seconds of these and of all."""

    calls: int = 0
    evaluated: int = 0
    seconds: float = 0.0


@contextmanager
def sampled(model: Backbone, limit: int | None, counter: Counter) -> Generator[None]:
    """Within, only the first `limit` calls of a model's `decode` are evaluated; the others give zeros."""
    inner: Callable[[Tensor], Tensor] = model.decode

    def call(x: Tensor) -> Tensor:
        counter.calls += 1
        if limit is not None and counter.evaluated >= limit:
            return torch.zeros(x.shape[0], 3, x.shape[-2] * CELL, x.shape[-1] * CELL)
        begun = now(model.device)
        out = inner(x)
        counter.seconds += now(model.device) - begun
        counter.evaluated += 1
        return out

    setattr(model, "decode", call)  # noqa: B010
    try:
        yield
    finally:
        delattr(model, "decode")


def vae_of(bench: Bench, limits: Limits, what: str, others: list[Line]) -> VAETaken | None:
    """The whole video encoded and decoded, in the pipeline's own tiles and chunks."""
    model, plan = bench.model, bench.plan
    picture = torch.rand(3, plan.height * CELL, plan.width * CELL, generator=torch.Generator().manual_seed(2))
    frames = plan.frames if limits.vae_calls is None else min(plan.frames, limits.vae_calls)

    def encode() -> float:
        """Frames take the same."""
        begun = now(model.device)
        drain(stream_encode(model.vae, repeat(picture, frames), plan.height, plan.width))
        return (now(model.device) - begun) * plan.frames / frames

    def decode() -> float:
        counter, begun = Counter(), now(model.device)
        with sampled(model, limits.vae_calls, counter):
            drain(decode_frames(model, bench.lr, model.tile.frames))
        rest = now(model.device) - begun - counter.seconds
        return rest + counter.seconds * counter.calls / counter.evaluated

    seconds: dict[str, float] = {}
    peaks: dict[str, int] = {}
    work: dict[str, Callable[[], float]] = {"encode": encode, "decode": decode}
    for method, run in work.items():
        forget_peak(model.device)
        try:
            seconds[method] = run()
        except Exception as error:
            others.append(report.failure(f"{what}, {method}", error))
            return None
        peaks[method] = peak(model.device)
    return VAETaken(seconds["encode"], seconds["decode"], peaks["encode"], peaks["decode"])


def drain(frames: Iterable[Tensor]) -> None:
    """Takes every frame and keeps none. Raises ValueError for one that is not finite."""
    for frame in frames:
        if not bool(torch.isfinite(frame).all()):
            raise ValueError("a frame holds NaN or infinity")
