"""What the commands do: `run` is given what the command line was parsed to.

Errors a user can cause are one line and exit code 2.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

from tqdm import tqdm

from ..backbones.svd import Backbone, pick_device
from ..errors import SettingError, VSRError
from ..metrics.evaluate import evaluate
from ..metrics.published import PUBLISHED
from ..metrics.report import check_folder
from ..pipeline import cost
from ..pipeline.advice import describe_time
from ..pipeline.job import Job, scene_cuts
from ..pipeline.part_samples import Work
from ..pipeline.part_times import measure
from ..pipeline.plan_cost import duration
from ..pipeline.sampler import NoiseRange, Settings, make_layout
from ..pipeline.upscale import upscale
from ..sampling.layouts import TileLayout
from ..sampling.tiling import TilePlan, TileSize, plan_tiles
from ..system.load import Watch, one_thread
from ..system.memory import ran_out
from ..system.outputs import files_of, held_folder
from ..video import VideoInfo, check_output, glance, probe
from ..video.sampled import sample_cuts
from .bars import Bars
from .demo import check_demo, run_demo
from .settings import files_read, model_of, parts_of, settings_of
from .text import embed

#: Pixels of a result, all frames together, that take no longer to make than to plan.
SMALL = 4_000_000


def _job(args: argparse.Namespace, info: VideoInfo) -> Job:
    start, stop = 0, info.frames
    if args.frames is not None:
        first, colon, last = args.frames.partition(":")
        if not colon or not all(part == "" or part.isdigit() for part in (first, last)):
            raise SettingError(f"frames is {args.frames!r}: expected A:B, such as 0:48, 24: or :10")
        start, stop = int(first or 0), int(last or info.frames)
    return Job(info, start, stop, args.scale)


def _cuts(args: argparse.Namespace, job: Job) -> tuple[int, ...]:
    if args.cuts == "auto":
        return scene_cuts(job)
    parts: list[str] = [] if args.cuts == "none" else args.cuts.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise SettingError(f"cuts is {args.cuts!r}: expected auto, none, or frame numbers such as 24,50")
    return tuple(int(part) for part in parts)


def _laid_out(job: Job, settings: Settings, model: Backbone, cuts: tuple[int, ...]) -> TileLayout:
    return make_layout(job, settings, model.tile, model.factor, NoiseRange.of(model), cuts)


def _codec_for(output: Path, name: str | None) -> str:
    """The codec asked for, else the usual one of the output's name."""
    if name is not None:
        return name
    endings = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", "": "png"}
    return endings.get(output.suffix.lower(), "h264")


def _upscale(args: argparse.Namespace) -> None:
    watch = Watch()
    settings_of(args)
    job = _job(args, probe(args.input))
    codec = _codec_for(args.output, args.codec)
    check_output(args.output, args.overwrite, codec, job.info, job.frames, files_read(args))
    settings, parts, model, cuts = settings_of(args), parts_of(args), model_of(args), _cuts(args, job)
    layout = _laid_out(job, settings, model, cuts)
    settings = cost.resolve_sap(model, layout, settings, args.sap_mode)
    settings = cost.resolve_branches(model, layout, settings, args.branches)
    bars = Bars(_planned(Work(model, job, layout, settings, parts, codec), watch))
    try:
        upscale(model, job, args.output, settings, codec, args.overwrite, cuts, bars, parts)
    finally:
        bars.close()
    print(f"{args.output}: {job.frames} frames of {job.size[1]}x{job.size[0]}")


def _planned(work: Work, watch: Watch) -> Mapping[str, float] | None:
    """Seconds of each stage; nothing for a job that is done before they could be measured."""
    if work.job.frames * work.job.size[0] * work.job.size[1] < SMALL:
        return None
    times = measure(work, watch)
    busy = " (the machine is busy: that is of a quiet one)" if times.busy else ""
    print(f"about {duration(times.total)}, most of it {times.dearest}{busy}", file=sys.stderr)
    return times.stages


def _plan(args: argparse.Namespace) -> None:
    watch = Watch()
    settings, job = settings_of(args), _job(args, glance(args.input))
    with one_thread():  # for much that is small, a second one is only waited for
        if args.cuts == "sampled":
            sampled = sample_cuts(job.info, job.start, job.stop)
            cuts, scenes = sampled.cuts, sampled.describe()
        else:
            cuts = _cuts(args, job)
            scenes = f"{len(cuts) + 1}"
        parts, model = parts_of(args), model_of(args)
    layout = _laid_out(job, settings, model, cuts)
    settings = cost.resolve_sap(model, layout, settings, args.sap_mode)
    settings = cost.resolve_branches(model, layout, settings, args.branches)
    print(cost.describe(job, layout, settings, cost.estimate(model, layout, settings), scenes), flush=True)
    work = Work(model, job, layout, settings, parts)
    print(describe_time(work, cuts, measure(work, watch)))


def _demo(args: argparse.Namespace) -> None:
    settings = settings_of(args)
    check_demo(args.out, args.overwrite, files_read(args))
    model, parts = model_of(args), parts_of(args)
    start = time.monotonic()
    bars = Bars()
    try:
        text = run_demo(model, args.out, settings, bars, parts, args.overwrite)
    finally:
        bars.close()
    print(f"\n{text}\n\n{time.monotonic() - start:.0f} s; pictures and videos are in {args.out}/, see side_by_side.png")


def _evaluate(args: argparse.Namespace) -> None:
    methods: dict[str, Path] = {}
    named: list[str] = args.method
    for text in named:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder) or name in methods:
            raise SettingError(
                f"method is {text!r}: expected NAME=DIR, each name once, such as bicubic=results/bicubic"
            )
        methods[name] = Path(folder)
    if args.published not in PUBLISHED:
        raise SettingError(f"published is {args.published!r}: expected one of {', '.join(PUBLISHED)}")
    if args.out is None:
        _measure(args, methods)
        return
    given = [file for path in (args.truth, *methods.values()) if path.exists() for file in files_of(path)]
    check_folder(args.out, args.overwrite, given)
    with held_folder(args.out):
        _measure(args, methods)


def _measure(args: argparse.Namespace, methods: Mapping[str, Path]) -> None:
    tile = None if args.tile is None else TileSize.parse(args.tile)
    overlap: float = args.overlap

    def tiles(info: VideoInfo) -> TilePlan:
        assert tile is not None
        return plan_tiles(info.frames, -(-info.height // 8), -(-info.width // 8), tile, overlap)

    total = done = 0
    bars: Bars | None = None

    def start(frames: int) -> None:
        nonlocal total, bars
        total, bars = frames, Bars()

    def tick(frames: int) -> None:
        nonlocal done
        done += frames
        if bars is not None:
            bars("measure", done, total)

    try:
        found = evaluate(
            args.truth,
            methods,
            args.metrics,
            plan=None if tile is None else tiles,
            border=args.border,
            device=pick_device(args.device),
            started=start,
            tick=tick,
        )
    finally:
        if bars is not None:
            bars.close()
    parts = (found.scores.table(by_clip=True, beside=args.published), found.notes())
    print("\n\n".join(part for part in parts if part))
    if args.out is not None:
        written = found.scores.write(args.out, args.published, args.overwrite)
        print("\n" + "\n".join(str(path) for path in written))


def _notes() -> Callable[..., None]:
    """Shows a warning as one line a person can read, above the progress bar, and each only once."""
    seen: set[str] = set()

    def show(message: Warning | str, *_: object) -> None:
        if str(message) not in seen:
            seen.add(str(message))
            tqdm.write(f"note: {message}", file=sys.stderr)

    return show


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "upscale": _upscale,
    "plan": _plan,
    "demo": _demo,
    "evaluate": _evaluate,
    "embed": embed,
}
"""By the names that `make_parser` knows them by."""


def run(args: argparse.Namespace) -> int:
    """Runs a command; the exit code: 0, 2 for an error the user can mend, 130 for Ctrl-C."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.showwarning = _notes()
            COMMANDS[args.command](args)
    except VSRError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if not ran_out(error):
            raise
        print(
            "error: the device ran out of memory; use --sap-mode lagged, a smaller --tile or --dtype", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        print("stopped; no result was written", file=sys.stderr)
        return 130
    return 0
