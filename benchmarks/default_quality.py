"""What the default job on the command line makes of the clips kept out of training, beside another commit's.

Eight frames of each clip, a quarter of its size, clean and in H.264; the means over the clips of what is measured
against the truth.

    python -m benchmarks.default_quality --data ../clips --against ../before
"""

from __future__ import annotations

import argparse
import tempfile
from fractions import Fraction
from pathlib import Path

from torch import Tensor

from benchmarks.common import table
from benchmarks.default_job import HERE, run
from training.data.held_out import Clip, shrunk, truths
from vsr_ops.cli.demo_clip import load_frames
from vsr_ops.image.resize import quantize8
from vsr_ops.metrics.scoring import score
from vsr_ops.sampling.tiling import TilePlan, TileSize, plan_tiles
from vsr_ops.vae.latents import CELL
from vsr_ops.video import Frame, made_info, open_writer

FRAMES = 8
METRICS = ("psnr_y", "vmaf_neg", "haarpsi", "tof", "warp_error", "flicker", "seam")
#: The bundled SVD's tiles: where seams are looked for, the same in both.
TILE = TileSize(24, 24, 8)


def written(clip: Clip, folder: Path) -> None:
    """The small clip as pictures."""
    count, _, height, width = clip.small.shape
    info = made_info(width, height, count, Fraction(24))
    with open_writer(folder, info, size=(height, width), codec="png8") as writer:
        for index, frame in enumerate(clip.small):
            writer.write(Frame(frame, None, index))


def tiles_of(truth: Tensor) -> TilePlan:
    height, width = (-(-side // (8 * CELL)) * 8 for side in truth.shape[-2:])
    return plan_tiles(len(truth), height, width, TILE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of photographs and videos")
    add("--against", type=Path, help="a checkout of the commit to compare with")
    add("--crf", type=int, nargs="+", default=[0, 25], help="0 is clean")
    add("--clips", nargs="+", help="only these")
    add("--large", action="store_true", help="the 1280x720 clip too")
    add("--options", default="", help="of upscale, for this commit alone: beside its own default, a third row")
    args = parser.parse_args()
    places = {**({} if args.against is None else {"against": args.against.resolve()}), "here": HERE}
    options: dict[str, list[str]] = {}
    if args.options:
        places[args.options], options[args.options] = HERE, args.options.split()
    known = truths(args.data, FRAMES, large=args.large)
    known = {name: truth for name, truth in known.items() if name in (args.clips or known)}
    rows: list[list[str]] = []
    for crf in args.crf:
        found: dict[str, list[list[float]]] = {place: [] for place in places}
        for clip in shrunk(known, crf):
            results: dict[str, dict[str, Tensor]] = {}
            with tempfile.TemporaryDirectory() as folder:
                source = Path(folder) / "in"
                written(clip, source)
                for name, place in places.items():
                    output = Path(folder) / f"out {len(results)}"
                    run(place, ["upscale", str(source), str(output), "--codec", "png8", *options.get(name, [])])
                    results[name] = {clip.name: quantize8(load_frames(output))}
            scores = score(results, {clip.name: clip.truth}, METRICS, borders=tiles_of(clip.truth))
            for name in places:
                found[name].append([scores.value(name, metric) for metric in METRICS])
            print(f"  {clip.name}, CRF {crf}", flush=True)
        for name, values in found.items():
            means = [_mean([value for value in column if value == value]) for column in zip(*values, strict=True)]
            rows.append([f"{f'CRF {crf}' if crf else 'clean'}, {name}", *(f"{mean:.3f}" for mean in means)])
    table([f"{len(known)} clips", *METRICS], rows)


def _mean(values: list[float]) -> float:
    """NaN of none: flicker is of clips in which something stands still."""
    return sum(values) / len(values) if values else float("nan")


if __name__ == "__main__":
    main()
