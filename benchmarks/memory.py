"""Peak memory against a video's length and area: encode, sample (DSSAG, lagged SAP and TAP in turn), decode.

Device: most bytes the model side holds at once beyond its weights. On a GPU over a whole stage; on the CPU, where the
video lies beside it, the most that encoding a frame, or a single UNet or decoder call, allocates.
Host (CPU only, another process without the profiler): growth of the peak resident memory after a warm-up, what of it
the video's own tensors and SAP's banks are, and the rest. Own tensors: VIDEO_COPIES latent videos while sampling; all
latents and CHUNK_COPIES chunks of frames while decoding.

    python -m benchmarks.memory --size full --device cuda
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from itertools import repeat
from typing import Any

import torch

from benchmarks.common import MIB, Options, build, heading, parser, peak_bytes, peak_resident, read, table
from vsr_ops.backbones.svd import SVD
from vsr_ops.pipeline.sampler import VIDEO_COPIES, Settings, sample
from vsr_ops.sampling.propagation import Propagation
from vsr_ops.sampling.tiling import plan_tiles
from vsr_ops.system.allocator import keep_freed
from vsr_ops.vae import latents
from vsr_ops.vae.encode import stream_encode
from vsr_ops.vae.latents import CELL, CHUNK_COPIES, decode_frames
from vsr_ops.vae.stream import Streaming

STEPS = 3  # SAP, TAP, and a SAP step that reads banks


def area(options: Options, times: int) -> tuple[int, int]:
    """Latent height and width: 1.5 tiles a side at area 1."""
    height, width = options.tile.height * 3 // 2, options.tile.width * 3 // 2
    return (height * (2 if times == 4 else 1), width * (2 if times > 1 else 1))


def watch(model: SVD, method: str, peaks: dict[str, int], profiled: bool) -> None:
    """Notes the peak of every call of a method, on the CPU, and the most the banks held."""
    inner: Callable[..., Any] = getattr(model, method)
    banks: dict[int, int] = {}

    def watched(*args: object) -> object:
        out: list[object] = []
        if profiled:
            peaks[method] = max(peaks.get(method, 0), peak_bytes(lambda: out.append(inner(*args)), model.device))
        else:
            out.append(inner(*args))
        if model.active is not None:
            # Each branch has its own.
            run = model.active[0]
            banks[id(run)] = run.bank_bytes
            peaks["banks"] = max(peaks.get("banks", 0), sum(banks.values()))
        return out[0]

    setattr(model, method, watched)


def child(options: Options, frames: int, times: int, lagged: bool, profiled: bool) -> dict[str, int]:
    """One run, in its own process; bytes by name."""
    model = build(options, with_vae=True)
    cuda = options.device.type == "cuda"
    height, width = area(options, times)
    settings = Settings(steps=STEPS, tile=options.tile, propagation=Propagation(sap_lagged=lagged))
    plan = plan_tiles(frames, height, width, options.tile, settings.overlap, factor=model.factor)
    peaks: dict[str, int] = {"spatial": len(plan.spatial), "windows": len(plan.windows)}
    one = options.tile
    stages(model, Settings(steps=1, tile=one), plan_tiles(one.frames, one.height, one.width, one, 0.5), {}, False)
    before = peak_resident()
    for method in ("denoise", "decode"):
        watch(model, method, peaks, profiled and not cuda)
    stages(model, settings, plan, peaks, cuda, profiled and not cuda)
    peaks["host"] = peak_resident() - before
    return peaks


def stages(
    model: SVD, settings: Settings, plan: Any, peaks: dict[str, int], cuda: bool, profiled: bool = False
) -> None:
    """Encode, sample and decode; on a GPU with each stage's peak, `profiled` with that of encoding a frame."""
    picture = torch.rand(3, plan.height * CELL, plan.width * CELL)
    lr = torch.empty(plan.frames, 4, plan.height, plan.width)

    def encode() -> None:
        # The least that it takes: nothing is kept of whole activations.
        pictures, how = repeat(picture, plan.frames), Streaming(tile=latents.VAE_TILE, kept=0.0)
        encoded = stream_encode(model.vae, pictures, plan.height, plan.width, how)
        for i in range(plan.frames):
            if profiled:
                taken = peak_bytes(lambda i=i: lr[i].copy_(next(encoded)), model.device)
                peaks["encode"] = max(peaks.get("encode", 0), taken)
            else:
                lr[i] = next(encoded)

    def decode() -> None:
        for _ in decode_frames(model, lr, model.tile.frames):
            pass

    work = {"encode": encode, "denoise": lambda: sample(model, lr, plan, settings), "decode": decode}
    for name, run in work.items():
        if cuda:
            peaks[name] = peak_bytes(run, model.device)
        else:
            run()


def measured(frames: int, times: int, lagged: bool, profiled: bool) -> dict[str, int]:
    spec = f"{frames},{times},{int(lagged)},{int(profiled)}"
    command = [sys.executable, "-m", "benchmarks.memory", *sys.argv[1:], "--child", spec]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def row(options: Options, frames: int, times: int, lagged: bool) -> list[str]:
    device = measured(frames, times, lagged, True)
    height, width = area(options, times)
    label = "" if lagged else ", synchronous"
    cells = [f"{frames} frames, area x{times}{label}", f"{device['spatial']}x{device['windows']}"]
    cells += [f"{device[name] / MIB:.1f}" for name in ("encode", "denoise", "decode")]
    if options.device.type == "cuda":
        return [*cells, "", "", f"{device['banks'] / MIB:.1f}", ""]
    host = measured(frames, times, lagged, False)
    video = frames * 4 * height * width * 4
    chunk = min(options.tile.frames, frames) * 3 * height * width * CELL**2 * 4
    own = max(VIDEO_COPIES * video, video + CHUNK_COPIES * chunk)
    rest = host["host"] - max(own, VIDEO_COPIES * video + host["banks"])
    return [*cells, *(f"{n / MIB:.1f}" for n in (host["host"], own, host["banks"], rest))]


def main() -> None:
    made = parser(__doc__, repeats=1)
    made.add_argument("--frames", type=int, nargs="*", default=[14, 42, 140])
    made.add_argument("--areas", type=int, nargs="*", default=[2, 4], choices=(1, 2, 4))
    made.add_argument("--vae-tile", type=int, help="the VAE's tile in latents; lite: the UNet's, as videos are small")
    made.add_argument("--child", help=argparse.SUPPRESS)
    arguments = made.parse_args()
    options = read(arguments)
    if arguments.vae_tile or arguments.size == "lite":
        # smaller tiles than the pipeline's, so that small videos have several
        setattr(latents, "VAE_TILE", arguments.vae_tile or options.tile.height)  # noqa: B010
    if arguments.child:
        frames, times, lagged, profiled = (int(part) for part in arguments.child.split(","))
        print(json.dumps(child(options, frames, times, bool(lagged), bool(profiled))))
        return
    heading("Peak memory", options)
    print(f"area x1 is {'x'.join(map(str, area(options, 1)))} latents\n", flush=True)
    cases = [(frames, 1, True) for frames in arguments.frames]
    cases += [(min(arguments.frames), times, True) for times in arguments.areas]
    cases += [(min(arguments.frames), times, False) for times in (1, *arguments.areas)]
    rows: list[list[str]] = []
    for case in cases:
        rows.append(row(options, *case))
        print(rows[-1], file=sys.stderr, flush=True)
    columns = ["MiB", "tiles", "encode", "UNet", "decode", "host growth", "own tensors", "SAP banks", "rest"]
    table(columns, rows)


if __name__ == "__main__":
    keep_freed()
    main()
