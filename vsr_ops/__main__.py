"""Command line: `python -m vsr_ops upscale | plan | demo | evaluate | embed`.

Errors a user can cause are one line and exit code 2.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .backbones.svd import Backbone, pick_device
from .cli.demo import check_demo, run_demo
from .cli.options import add_sampling, files_read, model_of, parts_of, settings_of
from .cli.text import add_embed, embed
from .errors import SettingError, VSRError
from .metrics.evaluate import evaluate
from .metrics.published import PUBLISHED
from .metrics.report import check_folder
from .metrics.table import METRICS
from .pipeline import cost
from .pipeline.job import Job, scene_cuts
from .pipeline.sampler import NoiseRange, Settings, make_layout
from .pipeline.upscale import upscale
from .sampling.layouts import TileLayout
from .sampling.tiling import TilePlan, TileSize, plan_tiles
from .system.allocator import keep_freed
from .system.memory import ran_out
from .system.outputs import files_of, held_folder
from .video import CODECS, VideoInfo, check_output, probe


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m vsr_ops", description="Diffusion video super-resolution (DC-VSR).")
    commands = parser.add_subparsers(required=True, metavar="upscale|plan|demo|evaluate|embed")
    for name, run, text in (
        ("upscale", _upscale, "upscale a video, a folder of pictures or a picture"),
        ("plan", _plan, "show tiles, UNet passes, banks, memory and time before spending them"),
    ):
        sub = commands.add_parser(name, help=text)
        sub.set_defaults(run=run)
        sub.add_argument("input", type=Path, metavar="IN")
        if name == "upscale":
            sub.add_argument("output", type=Path, metavar="OUT")
            sub.add_argument(
                "--overwrite", action="store_true", help="replace OUT, or in it pictures of the same names"
            )
            sub.add_argument("--codec", default=None, help=", ".join(CODECS))
        sub.add_argument("--scale", type=float, default=4.0)
        sub.add_argument("--frames", metavar="A:B", help="only these frames, counted from 0, B not included")
        sub.add_argument("--cuts", default="auto", help="auto, none, or first frames of new scenes such as 24,50")
        add_sampling(sub)
    demo = commands.add_parser("demo", help="upscale a bundled clip and compare it with the truth")
    demo.set_defaults(run=_demo)
    demo.add_argument("--out", type=Path, default=Path("demo_output"))
    demo.add_argument("--overwrite", action="store_true", help="replace the files of an earlier demo")
    add_sampling(demo)
    _add_evaluate(commands.add_parser("evaluate", help="measure results against the truth: table, CSV and curves"))
    keeps = commands.add_parser("embed", help="keep what a text encoder makes of a text, for a model without one")
    keeps.set_defaults(run=embed)
    add_embed(keeps)
    return parser


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_evaluate)
    add = parser.add_argument
    clips = "a folder of clips: videos, or folders of numbered pictures; or one of those"
    add("--truth", type=Path, required=True, metavar="DIR", help=clips)
    add(
        "--method",
        action="append",
        required=True,
        metavar="NAME=DIR",
        help="results of a method, matched to the truth by their names; again for each method",
    )
    add("--metrics", metavar="A,B,C", help=f"all that can be measured by default: {', '.join(METRICS)}")
    add("--out", type=Path, metavar="DIR", help="where table.txt, metrics.csv, frames.csv and metrics.png go")
    add("--overwrite", action="store_true", help="replace those four files")
    add("--border", type=int, default=0, metavar="N", help="pixels left out on each side")
    add("--tile", metavar="HxWxT", help="tiles of the results, in latents, for the metric seam")
    add("--overlap", type=float, default=0.5, help="share of a tile, with --tile")
    add("--published", default="dc-vsr", help=f"which papers' rows stand beside: {', '.join(PUBLISHED)}")
    add("--device", default="cpu", help="auto, cpu, cuda, cuda:0 ..., mps")


def _job(args: argparse.Namespace) -> Job:
    info = probe(args.input)
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


def _prepared(args: argparse.Namespace, job: Job) -> tuple[Backbone, Settings, TileLayout, tuple[int, ...]]:
    """The model, and what is refused of settings and plan, before anything is written."""
    settings = settings_of(args)
    model = model_of(args)
    cuts = _cuts(args, job)
    layout = make_layout(job, settings, model.tile, model.factor, NoiseRange.of(model), cuts)
    return model, cost.resolve_sap(model, layout, settings, args.sap_mode), layout, cuts


def _codec_for(output: Path, name: str | None) -> str:
    """The codec asked for, else the usual one of the output's name."""
    if name is not None:
        return name
    endings = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", "": "png"}
    return endings.get(output.suffix.lower(), "h264")


def _upscale(args: argparse.Namespace) -> None:
    settings_of(args)
    job = _job(args)
    codec = _codec_for(args.output, args.codec)
    check_output(args.output, args.overwrite, codec, job.info, job.frames, files_read(args))
    parts = parts_of(args)
    model, settings, _, cuts = _prepared(args, job)
    bars = Bars(job.frames)
    try:
        upscale(model, job, args.output, settings, codec, args.overwrite, cuts, bars, parts)
    finally:
        bars.close()
    print(f"{args.output}: {job.frames} frames of {job.size[1]}x{job.size[0]}")


def _plan(args: argparse.Namespace) -> None:
    job = _job(args)
    model, settings, layout, _ = _prepared(args, job)
    print(cost.describe(job, layout, settings, cost.estimate(model, layout, settings)))


def _demo(args: argparse.Namespace) -> None:
    settings = settings_of(args)
    check_demo(args.out, args.overwrite, files_read(args))
    model, parts = model_of(args), parts_of(args)
    start = time.monotonic()
    bars = Bars(24)
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
        total, bars = frames, Bars(frames)

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; the exit code: 0, 2 for an error the user can mend, 130 for Ctrl-C."""
    args = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], None] = args.run
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.showwarning = _notes()
            run(args)
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


if __name__ == "__main__":
    keep_freed()
    sys.exit(main())
