r"""Trains one of the pack's modules by a recipe, or goes on where the run in --out stopped.

python -m training training/recipes/dcm_lite.toml --data ../clips --out runs/dcm
python -m training training/recipes/dcm_lite.toml --data ../clips --out runs/dcm --set train.steps=40000
python -m training training/recipes/dcm_lite.toml --data ../clips --out runs/dcm --export dcm.safetensors
python -m training training/recipes/video_upscaler_lite.toml --data ../clips --draw-shard clips.safetensors
python -m training training/recipes/video_upscaler_lite.toml --data clips.safetensors --out runs/video  # on any machine
python -m training splits --check reds4 DIR     # whether a folder has the clips that the papers test on
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

from vsr_ops.errors import VSRError
from vsr_ops.system.allocator import keep_freed
from vsr_ops.system.outputs import files_of, refuse_inputs, refuse_taken


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 wrong input or a full disk (one line says what), 130 interrupted."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["splits"]:
        from training.data import splits  # reads pictures: slow to import

        return splits.main(given[1:])
    parser = argparse.ArgumentParser(
        prog="python -m training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path, help="a .toml file; those of the pack are in training/recipes")
    parser.add_argument("--data", type=Path, required=True, help="folder of photographs and videos, or a shard")
    parser.add_argument("--out", type=Path, help="folder of the run; a checkpoint there is gone on from")
    parser.add_argument("--draw-shard", type=Path, metavar="FILE", help="only draw samples, for --data on any machine")
    parser.add_argument("--samples", type=int, default=1000, help="how many --draw-shard draws")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as train.steps=2000")
    parser.add_argument("--cpu", action="store_true", help="the CPU, even where there is a GPU")
    parser.add_argument("--export", type=Path, help="only write the checkpoint's weights to this .safetensors file")
    parser.add_argument("--overwrite", action="store_true", help="let --export and --draw-shard replace files")
    options = parser.parse_args(given)
    if (options.out is None) == (options.draw_shard is None):
        parser.error("expected either --out or --draw-shard")
    try:
        return _run(options)
    except VSRError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from the last checkpoint in {options.out}", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    # Slow to import, and --help needs neither.
    from training.data.shard import Sharded, draw_shard, is_shard
    from training.loop.recipe import read_recipe
    from training.loop.trainer import export, train
    from training.tasks.tasks import make_task

    with warnings.catch_warnings():
        # Unreadable clips are named in warnings: a line each, without the place in the code.
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        recipe = read_recipe(options.recipe, options.set)
        task = make_task(recipe, options.data, options.out or options.draw_shard.parent)
        data = files_of(options.data) if options.data.exists() else []
        if is_shard(options.data) and options.data.is_file():
            task = Sharded(recipe, task, options.data)
        if options.draw_shard:
            refuse_inputs(options.draw_shard, [options.recipe, *data])
            refuse_taken(options.draw_shard, options.overwrite)
            draw_shard(recipe, task, options.samples, options.draw_shard)
        elif options.export:
            refuse_inputs(options.export, [options.recipe, *data])
            export(recipe, task, options.out, options.export, options.overwrite)
        else:
            refuse_inputs(options.out, data)
            train(recipe, task, options.out, cpu=options.cpu)
    return 0


if __name__ == "__main__":
    keep_freed()
    sys.exit(main())
