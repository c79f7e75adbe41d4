"""Proof without the weights: stock SVD and Stable Diffusion 2.1 at full size with random weights, on whole videos.

One table: memory, time of a step, a frame and the VAE, every method beside plain tiles, traffic to a card, what half
precision changes, and the same step through ComfyUI. NaN and what fails end it with an error.

    python -m benchmarks.full_size                                      # on a CPU: 2 x 2 tiles in two windows
    python -m benchmarks.full_size --part correctness 1080p             # on a card: four runs of at most 8 minutes
    python -m benchmarks.full_size --part host --comfyui ../ComfyUI
    python -m benchmarks.full_size --part 720p
    python -m benchmarks.full_size --part 4k
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

# What needs diffusers is imported where it is used, since it may come out of `--wheels`: these stand in `parts`, `rows`
# and `build` too, under a test.
PARTS = ("small", "correctness", "1080p", "host", "720p", "4k")
#: Sizes that a CPU would take days for.
SIZES = ("1080p", "720p", "4k")
ROW_NAMES = ("plain", "dssag8", "sap-sync", "sap-lagged", "tap", "cfg", "dssag9", "pag", "sag", "vae")
MODEL_NAMES = ("svd", "sd21")
#: Minutes after which a run on a card begins nothing more.
MINUTES = 7.0


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.full_size",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--part", nargs="+", choices=PARTS, help="left out: small on a CPU, all others on a card")
    made.add_argument("--models", nargs="+", choices=MODEL_NAMES, default=list(MODEL_NAMES))
    made.add_argument("--rows", nargs="+", choices=ROW_NAMES, default=list(ROW_NAMES), help="plain tiles always run")
    made.add_argument("--device", default="auto")
    made.add_argument("--dtype", default="auto", help="auto: float16 on a card, float32 on a CPU")
    made.add_argument("--rounds", type=int, default=0, help="left out: 3 on a card, 1 on a CPU")
    made.add_argument("--calls", type=int, help="UNet calls of a pass that are evaluated; 0: all (on a CPU: 1)")
    made.add_argument("--minutes", type=float, help=f"begin nothing after so many (on a card: {MINUTES:g})")
    path = os.environ.get("COMFYUI_PATH")
    made.add_argument("--comfyui", type=Path, default=path and Path(path), help="ComfyUI's folder, for part host")
    made.add_argument("--wheels", type=Path, help="a folder of wheels to take missing libraries from")
    made.add_argument("--config", choices=("full", "tiny"), default="full", help="tiny: the same code, small models")
    return made


def add_wheels(folder: Path) -> TemporaryDirectory[str]:
    """Unpacks a folder's wheels, for as long as what is returned lives, behind all that is installed."""
    unpacked: TemporaryDirectory[str] = TemporaryDirectory()
    found = sorted(folder.glob("*.whl"))
    if not found:
        raise SystemExit(f"--wheels {folder}: no .whl there; expected those that docs/benchmarks.md names")
    for wheel in found:
        with zipfile.ZipFile(wheel) as file:
            file.extractall(unpacked.name)
    sys.path.append(unpacked.name)
    return unpacked


def main(words: list[str] | None = None) -> None:
    """Runs the parts and prints their table; ends with an error where a row failed."""
    begun = time.monotonic()
    arguments = parser().parse_args(words)
    unpacked = add_wheels(arguments.wheels) if arguments.wheels else None
    from benchmarks.common import machine
    from benchmarks.full_size import parts, report
    from vsr_ops.backbones.svd import pick_device, pick_dtype

    device = pick_device(arguments.device)
    cuda = device.type == "cuda"
    chosen = arguments.part or (PARTS[1:] if cuda else PARTS[:1])
    if "host" in chosen and arguments.comfyui is None:
        raise SystemExit("--part host needs ComfyUI's folder: give --comfyui, or set COMFYUI_PATH")
    if not cuda and (large := [part for part in chosen if part in SIZES]):
        raise SystemExit(f"--part {large[0]} needs a card, and this is a {device.type}: leave --part out for the CPU's")
    minutes = arguments.minutes or (MINUTES if cuda else float("inf"))
    wishes = parts.Wishes(
        device,
        pick_dtype(arguments.dtype, device),
        tuple(arguments.models),
        tuple(arguments.rows),
        arguments.config,
        arguments.rounds,
        arguments.calls,
        begun + 60 * minutes,
        arguments.comfyui,
    )
    print(f"on {machine(device)}\n", flush=True)
    lines: list[report.Line] = []
    for part in chosen:
        try:
            lines += parts.PARTS[part](wishes, part)
        except Exception as error:
            # what was found so far is worth its table
            traceback.print_exc()
            lines.append(report.failure(f"part {part}", error))
    print()
    report.show(lines)
    print(f"on {machine(device)}; {(time.monotonic() - begun) / 60:.1f} minutes")
    if unpacked is not None:
        unpacked.cleanup()
    if failed := sum(line.failed for line in lines):
        raise SystemExit(f"{failed} of {len(lines)} rows failed: see the table")


if __name__ == "__main__":
    main()
