"""Seconds a frame of what stands around the diffusion in the default job, 480x270 to 1920x1080, on the CPU.

Reading and writing beside PyAV's own conversion, the DCM, the refiner and its flow, the colour correction that models
without a refiner have. `--against` a checkout of another commit measures both in turn, each in its own processes.

    python -m benchmarks.cpu --threads 2 --against ../before
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parents[1]
SMALL, LARGE, FRAMES = (270, 480), (1080, 1920), 3
#: Stage by stage: wall, user and system seconds a frame.
Times = dict[str, tuple[float, float, float]]


def timed(frames: int, work: Callable[[], object], warm: bool = True) -> tuple[float, float, float]:
    """Wall, user and system seconds a frame, after one run that warms up."""
    if warm:
        work()
    start, before = time.perf_counter(), os.times()
    work()
    wall, after = time.perf_counter() - start, os.times()
    return wall / frames, (after.user - before.user) / frames, (after.system - before.system) / frames


def child(threads: int) -> Times:
    """Every stage once, of the checkout that this process imports."""
    try:
        from vsr_ops.system.allocator import keep_freed

        keep_freed()  # as the command line does
    except ImportError:
        pass  # a checkout from before there was one
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        return {**files(Path(folder)), **pictures()}


def clip(size: tuple[int, int], frames: int) -> Any:
    """A photograph under a moving camera, `(frames, 3, *size)`."""
    import torch
    from skimage import data

    from vsr_ops.cli.demo_clip import camera_path

    photo = torch.tensor(data.coffee()).permute(2, 0, 1) / 255
    larger = torch.nn.functional.interpolate(photo[None], scale_factor=size[0] / 360, mode="bicubic")[0]
    return camera_path(larger.clamp(0, 1), frames, *size)


def files(folder: Path) -> Times:
    """Reading and writing."""
    import av

    from vsr_ops.video import Frame, made_info, open_writer, probe, read_frames

    frames, times = 24, Times()
    for height, width in (SMALL, LARGE):
        video, path = clip((height, width), frames), folder / f"{width}.mp4"

        def write(video: Any = video, path: Path = path) -> None:
            info = made_info(video.shape[-1], video.shape[-2], len(video), Fraction(24))
            with open_writer(path, info, size=tuple(video.shape[-2:]), overwrite=True) as writer:
                for index, frame in enumerate(video):
                    writer.write(Frame(frame, None, index))

        def pyav_writes(video: Any = video, path: Path = path) -> None:
            with av.open(str(path.with_suffix(".av.mp4")), "w") as output:
                stream: Any = output.add_stream("libx264", 24, options={"crf": "16"})
                stream.height, stream.width, stream.pix_fmt = *video.shape[-2:], "yuv420p"
                for frame in video:
                    pixels = frame.mul(255).round().byte().permute(1, 2, 0).contiguous().numpy()
                    output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
                output.mux(stream.encode(None))

        def pyav(path: Path = path) -> None:
            with av.open(str(path)) as source:
                source.streams.video[0].thread_type = "AUTO"
                for frame in source.decode(video=0):
                    frame.to_ndarray(format="rgb24")

        name = f"{width}x{height}"
        times[f"write {name}"] = timed(frames, write, warm=False)
        times[f"write {name}: PyAV, libx264"] = timed(frames, pyav_writes, warm=False)
        info = probe(path)
        times[f"read {name}"] = timed(frames, lambda info=info: [None for _ in read_frames(info)])
        times[f"read {name}: PyAV to rgb24"] = timed(frames, pyav)
    return times


def pictures() -> Times:
    """What is computed, at 1920x1080."""
    import torch

    from vsr_ops.image.color import correct
    from vsr_ops.modules import refiner
    from vsr_ops.modules.dcm import load_dcm

    small, large = clip(SMALL, FRAMES), clip(LARGE, FRAMES)
    decoded = (large + 0.02 * torch.randn_like(large)).clamp(0, 1)
    dcm, model = load_dcm("lite", torch.device("cpu")), refiner.load_refiner("lite")
    return {
        "DCM": timed(1, lambda: dcm(small[:1])),
        "flow of the refiner, a pair, both ways": timed(1, lambda: refiner.neighbours(large[:2])),
        "refiner and its flow": timed(
            FRAMES, lambda: list(refiner.refine_frames(model, zip(decoded, large, strict=True))), warm=False
        ),
        "colour, detail": timed(1, lambda: correct("detail", decoded[:1], large[:1])),
    }


def measured(folder: Path, threads: int) -> Times:
    """A child's times in the checkout at `folder`; this very file asks, whatever stands there."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", "--threads", str(threads)]
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def rows(found: Mapping[str, list[Times]]) -> list[list[str]]:
    """Medians over the rounds, the first checkout's ratio to the second where there are two."""
    made: list[list[str]] = []
    for stage in next(iter(found.values()))[0]:
        walls = {name: [each[stage][0] for each in rounds] for name, rounds in found.items()}
        cells = [stage]
        for name, rounds in found.items():
            user, system = (median(each[stage][part] for each in rounds) for part in (1, 2))
            cells += [f"{median(walls[name]):.3f}", f"{user:.3f} + {system:.3f}"]
        if len(walls) == 2:
            ours, theirs = walls.values()
            cells.append(f"{median(a / b for a, b in zip(ours, theirs, strict=True)):.2f}")
        made.append(cells)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", type=Path, help="a checkout of the commit to compare with")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.threads)))
        return
    # Needs diffusers, which a child does without.
    import torch

    from benchmarks.common import machine, table

    places = {"here": HERE, **({} if options.against is None else {"against": options.against.resolve()})}
    found: dict[str, list[Times]] = {name: [] for name in places}
    for turn in range(options.rounds):
        for name in list(places)[:: -1 if turn % 2 else 1]:
            found[name].append(measured(places[name], options.threads))
    print(f"{machine(torch.device('cpu'))}; {options.threads} used; {options.rounds} rounds in turn, medians\n")
    columns = ["seconds a frame"]
    for name in places:
        columns += [name, "user + system"]
    table([*columns, *(["here / against"] if len(places) == 2 else [])], rows(found))


if __name__ == "__main__":
    main()
