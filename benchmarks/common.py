"""What the benchmarks share: options, models, interleaved timing, peak memory, tables."""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import AutoencoderKLTemporalDecoder
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel
from torch import nn
from torch.profiler import ProfilerActivity, profile

from vsr_ops.backbones.svd import SVD, load_svd, pick_device, pick_dtype
from vsr_ops.checkpoints.svd import LITE
from vsr_ops.sampling.tiling import TileSize

SIZES = ("full", "lite")
#: The tile that stock SVD was trained on.
FULL_TILE = TileSize(64, 64, 14)
FULL_VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}
MIB = 2**20
#: What time is counted by: the wall's clock, or the seconds this process had of the processor, the system's among them.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}


def own_tile(size: str) -> TileSize:
    """As the checkpoints of each size were trained; the lite VAE has 24 latents a side in its training clips."""
    if size == "full":
        return FULL_TILE
    # The recipes load the libraries of pictures and videos, which a full-size model does not need.
    from training.tasks.svd import FRAMES

    return TileSize(24, 24, FRAMES)


@dataclass(frozen=True)
class Options:
    """What every benchmark takes. `repeats` counts rounds in which all run once; `clock` is one of CLOCKS."""

    size: str
    device: torch.device
    dtype: torch.dtype
    repeats: int
    tile: TileSize
    clock: str = "wall"


def parser(description: str | None, repeats: int) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--size", choices=SIZES, default="lite", help="stock SVD's UNet, or the bundled one's")
    made.add_argument("--device", default="auto")
    made.add_argument("--dtype", default="auto", help="auto: float16 on a GPU; on the CPU bfloat16 full, float32 lite")
    made.add_argument("--repeats", type=int, default=repeats)
    made.add_argument("--clock", choices=CLOCKS, default="wall", help="processor: on a CPU that others use too")
    made.add_argument("--tile", help="HEIGHTxWIDTHxFRAMES in latents; the size's own when left out")
    return made


def read(arguments: argparse.Namespace) -> Options:
    device = pick_device(arguments.device)
    auto = "bfloat16" if arguments.size == "full" and device.type == "cpu" else "auto"
    dtype = pick_dtype(auto if arguments.dtype == "auto" else arguments.dtype, device)
    tile = TileSize.parse(arguments.tile) if arguments.tile else own_tile(arguments.size)
    return Options(arguments.size, device, dtype, arguments.repeats, tile, arguments.clock)


def heading(title: str, options: Options) -> None:
    """Says what ran, where."""
    print(f"{title}: {options.size} size, tile {options.tile} latents, {str(options.dtype).removeprefix('torch.')}")
    print(f"on {machine(options.device)}; {options.repeats} interleaved rounds, medians")
    print(f"command: python -m benchmarks.{Path(sys.argv[0]).stem} {' '.join(sys.argv[1:])}\n", flush=True)


def machine(device: torch.device) -> str:
    """What computes: the card's name or the processor's with its threads, and torch's version."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}; torch {torch.__version__}"
    return f"{_processor()}, {torch.get_num_threads()} threads; torch {torch.__version__}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Weights of deviation 1/sqrt(fan-in), norms that pass through: outputs stay finite in every precision.

    One block of noise over and over: drawing 1.5 billion numbers takes minutes.
    """
    block = torch.randn(1_000_003)
    for name, p in model.named_parameters():
        if p.ndim > 1:
            noise = (block * (p.numel() / p.shape[0]) ** -0.5).to(p)
            for part in p.view(-1).split(block.numel()):
                part.copy_(noise[: part.numel()])
        else:
            p.fill_(1.0 if name.endswith("weight") else 0.0)


def filled(build: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> Any:
    """The module that `build` makes, with random weights, frozen; there is never a second copy of them."""
    with torch.device("meta"):
        model = build()
    # the base method: diffusers' own warns about precision that no weight here asks for
    model = nn.Module.to(model, dtype).to_empty(device=device)
    randomize(model)
    return model.eval().requires_grad_(False)


def build(options: Options, with_vae: bool = False) -> SVD:
    """The model of a size: the bundled weights for lite where they exist, random ones else.

    Without `with_vae` the VAE has no memory behind it and cannot run.
    """
    if options.size == "lite" and LITE.exists():
        return load_svd("lite", options.device, options.dtype)
    torch.manual_seed(0)

    def make_unet() -> nn.Module:
        if options.size == "full":
            return UNetSpatioTemporalConditionModel()  # diffusers' defaults are stock SVD's
        from training.tasks.svd import UNET_LITE

        return UNetSpatioTemporalConditionModel(**UNET_LITE)

    def make_vae() -> nn.Module:
        if options.size == "full":
            return AutoencoderKLTemporalDecoder(**FULL_VAE)
        from training.tasks.vae import temporal_vae

        return temporal_vae()

    unet = filled(make_unet, options.device, options.dtype)

    with torch.device("meta"):
        vae: Any = make_vae()
    if with_vae:
        vae = filled(make_vae, options.device, options.dtype)
    return SVD(unet, vae, None, options.tile, options.device, options.dtype)


def describe(model: SVD, options: Options) -> str:
    """The UNet's size, and which weights `build` took."""
    millions = sum(p.numel() for p in model.unet.parameters()) / 1e6
    bundled = options.size == "lite" and LITE.exists()
    return f"{millions:.1f} M parameters, {'bundled' if bundled else 'random'} weights"


def seconds(work: Callable[[], object], device: torch.device, clock: str = "wall") -> float:
    """Time of one run by a clock of CLOCKS, the device's queue drained before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = CLOCKS[clock]()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return CLOCKS[clock]() - start


@torch.no_grad()
def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    options: Options,
    prepare: Callable[[str], None] = lambda name: None,
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round. One uncounted round warms up; every second round runs backwards, so
    that drift cancels. `prepare` is called, untimed, before each run."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(options.repeats + 1):
        for name in candidates if turn % 2 else reversed(list(candidates)):
            prepare(name)
            spent = seconds(candidates[name], options.device, options.clock)
            if turn:
                times[name].append(spent)
    return times


def ratio(times: Mapping[str, Sequence[float]], name: str, baseline: str) -> float:
    """Median over rounds of one candidate's time by another's in the same round."""
    return median(a / b for a, b in zip(times[name], times[baseline], strict=True))


@torch.no_grad()
def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Most bytes alive at once on the device that `work` allocated itself, above what was there before.

    On the CPU from the allocator's events in torch's profiler, which sees an operator's scratch memory too.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        work()
    recorded: Any = profiled.profiler
    events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def peak_resident() -> int:
    """Most memory this process had, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # unlike getrusage's, not inherited from the parent
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints rows under their columns: the first aligned left, the others right."""
    widths = [max(len(line[i]) for line in (columns, *rows)) for i in range(len(columns))]
    for line in (columns, ["-" * width for width in widths], *rows):
        cells = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        print("  ".join([line[0].ljust(widths[0]), *cells]))
    print(flush=True)
