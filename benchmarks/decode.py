"""Decoding in exact tiles against a pass without tiles: chunks of one scene, with and without the modules beside it.

Latents of `--latents` a side, tiles of half of it. Rows, in turn: the VAE's own modules over whole frames (no tiles);
every tile once; both with CFW, STAM and CAPM, told the compression level; with `--passes` tiles in passes, where memory
for whole activations is short. Seconds of the processor (user, system) stand beside those of the clock.

    python -m benchmarks.decode --size lite --device cpu
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor

from benchmarks.common import Options, build, describe, heading, parser, read, seconds, table
from vsr_ops.backbones.svd import SVD
from vsr_ops.modules.capm_file import load_capms
from vsr_ops.modules.cfw import load_cfw
from vsr_ops.modules.stam import load_stam
from vsr_ops.sampling.tiling import spans
from vsr_ops.vae.decoder_modules import DecoderModules
from vsr_ops.vae.latents import VAE_OVERLAP
from vsr_ops.vae.stream import Streaming, stream_decode

WHOLE, ONCE, PASSES = "no tiles", "tiles, once", "tiles, in passes"
BESIDE = "CFW + STAM + CAPM"
MODULES = f"{ONCE}, {BESIDE}"
#: Of a pass without tiles: tiles at most 1.3, their modules at most 1.6 of that.
TARGETS = {ONCE: "<= 1.30", MODULES: "<= 2.08"}


def scene(frames: int, height: int, width: int) -> Tensor:
    """Latents `(frames, 4, height, width)` that pan over one larger field, as those of a moving camera."""
    rng = torch.Generator().manual_seed(0)
    field = torch.randn(1, 4, height // 4, (width + frames) // 4 + 1, generator=rng)
    large = torch.nn.functional.interpolate(field, (height, width + frames), mode="bicubic")
    return 5 * torch.cat([large[..., i : i + width] for i in range(frames)])


def modules_of(options: Options) -> DecoderModules:
    """The bundled ones, made for the lite SVD's VAE."""
    capm = load_capms("lite", options.device).vae
    return DecoderModules(load_cfw("lite", options.device), 0.75, load_stam("lite", options.device), capm)


class Timed:
    """Seconds of the clock, the user's and the system's of the process, of each chunk of each round."""

    def __init__(self) -> None:
        self.rounds: list[list[tuple[float, float, float]]] = []

    def chunks(self, frames: Iterator[Tensor], ends: list[int], device: torch.device) -> None:
        """Draws a video's frames, and notes what each chunk took."""
        found: list[tuple[float, float, float]] = []
        for count in ends:
            before = os.times()
            clock = seconds(lambda count=count: [next(frames) for _ in range(count)], device)
            after = os.times()
            found.append((clock, after.user - before.user, after.system - before.system))
        self.rounds.append(found)

    def total(self, part: int, chunks: slice = slice(None)) -> float:
        """The median over rounds of one of the three, of some chunks."""
        return median(sum(chunk[part] for chunk in found[chunks]) for found in self.rounds)

    def ratio(self, other: Timed, chunks: slice = slice(None)) -> float:
        """The median over rounds of the processor's time by the other's in the same round."""
        return median(
            sum(a[1] + a[2] for a in mine[chunks]) / sum(b[1] + b[2] for b in its[chunks])
            for mine, its in zip(self.rounds, other.rounds, strict=True)
        )


def measured(model: SVD, options: Options, height: int, width: int, frames: int, passes: bool) -> dict[str, Timed]:
    """Every row's times; the rows of one round follow each other."""
    latents, tile = scene(frames, height, width), -(-max(height, width) // 2)
    reference, levels = torch.rand(frames, 3, 8 * height, 8 * width), torch.full((frames,), 0.5)
    chunk = options.tile.frames
    starts = [window.start for window in spans(frames, chunk, VAE_OVERLAP)]
    ends = [b - a for a, b in zip(starts, [*starts[1:], frames], strict=True)]
    whole = Streaming(chunk, max(height, width))
    once = replace(whole, tile=tile)
    rows: dict[str, tuple[DecoderModules, Streaming]] = {
        WHOLE: (DecoderModules(), whole),
        ONCE: (DecoderModules(), once),
    }
    if options.size == "lite":
        rows[f"{WHOLE}, {BESIDE}"] = (modules_of(options), whole)
        rows[MODULES] = (modules_of(options), once)
    if passes:
        rows[PASSES] = (DecoderModules(), replace(once, kept=0.0))
    times = {name: Timed() for name in rows}
    for _ in range(options.repeats):
        for name, (modules, how) in rows.items():
            decoded = stream_decode(model.vae, latents, (), modules, reference, levels, how)
            times[name].chunks(decoded, ends, options.device)
    return times


def row(name: str, times: dict[str, Timed], frames: int) -> list[str]:
    mine = times[name]
    each = [f"{mine.total(part) / frames:.2f}" for part in (0, 1, 2)]
    return [
        name,
        *each,
        f"{mine.ratio(times[WHOLE]):.2f}",
        f"{mine.ratio(times[WHOLE], slice(0, 1)):.2f}",
        TARGETS.get(name, ""),
    ]


def main() -> None:
    made: argparse.ArgumentParser = parser(__doc__, repeats=3)
    made.add_argument("--latents", default="24x40", help="HEIGHTxWIDTH of the picture in latents")
    made.add_argument("--frames", type=int, default=14, help="of the scene")
    made.add_argument("--passes", action="store_true", help="time tiles in passes, too")
    arguments = made.parse_args()
    options = read(arguments)
    height, width = (int(side) for side in arguments.latents.split("x"))
    model = build(options, with_vae=True)
    heading("Decoding", options)
    print(
        f"{describe(model, options)}; a scene of {arguments.frames} frames, {width * 8}x{height * 8} pixels\n",
        flush=True,
    )
    times = measured(model, options, height, width, arguments.frames, arguments.passes)
    columns = ["s a frame", "clock", "user", "system", "of no tiles", "its first chunk", "target"]
    table(columns, [row(name, times, arguments.frames) for name in times])


if __name__ == "__main__":
    main()
