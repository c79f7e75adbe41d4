"""What a run of the benchmark is cut into: the CPU's part, and on a card correctness, three sizes and the host."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.full_size import measure, precision
from benchmarks.full_size.build import CONFIGS, Sizes
from benchmarks.full_size.measure import Case, Limits
from benchmarks.full_size.report import Line
from vsr_ops.sampling.tiling import TilePlan, TileSize
from vsr_ops.vae.latents import CELL

#: What the CPU runs at full size: whole tiles, but of two frames.
CPU_TILE = TileSize(64, 64, 2)
#: Of UNet and VAE in half precision, which most CPUs compute slowly whatever the tile.
CPU_LITTLE, CPU_VAE = TileSize(16, 16, 2), TileSize(8, 8, 1)
#: Frames of a card's VAE tile whose precision is looked at.
VAE_FRAMES = 4
#: On a card, of a pass over a 4K video and of the VAE, what is evaluated; the rest is multiplied.
CALLS_4K, VAE_CALLS = 48, 16
#: What goes through the host too.
HOST_ROWS = ("plain", "dssag8")


@dataclass(frozen=True)
class Wishes:
    """What was asked for. `calls` None and `rounds` 0 take the part's own, `calls` 0 is all; `deadline` is in seconds
    of `time.monotonic`."""

    device: torch.device
    dtype: torch.dtype
    models: tuple[str, ...]
    rows: tuple[str, ...]
    config: str = "full"
    rounds: int = 0
    calls: int | None = None
    deadline: float = float("inf")
    comfyui: Path | None = None

    @property
    def cuda(self) -> bool:
        """Whether this is a card."""
        return self.device.type == "cuda"

    @property
    def sizes(self) -> Sizes:
        """The models' configuration; on a CPU with its tile."""
        sizes = CONFIGS[self.config]
        return sizes if self.cuda or self.config == "tiny" else replace(sizes, tile=CPU_TILE)

    def limits(self, part: str, share: float = 1.0) -> Limits:
        """How much of a part is run, in a `share` of the time that is left."""
        own = (CALLS_4K if part == "4k" else None) if self.cuda else 1
        calls = own if self.calls is None else self.calls or None
        now = time.monotonic()
        return Limits(
            self.rounds or (3 if self.cuda else 1),
            calls,
            VAE_CALLS if self.cuda else 1,
            now + (self.deadline - now) * share,
        )

    def case(self, model: str, size: str) -> tuple[Case, TilePlan]:
        """A model, and the tiles of a video: of a size of PICTURES, or else of 2 x 2 tiles."""
        tile = self.sizes.tile
        plan = measure.plan_of(size, tile) if size in measure.PICTURES else measure.small_plan(tile)
        label = size if size in measure.PICTURES else f"{plan.width * CELL}x{plan.height * CELL}x{plan.frames}"
        return Case(model, self.sizes, label, self.device, self.dtype, self.rows), plan


def sized(wishes: Wishes, part: str) -> list[Line]:
    """Every model headless on a video of one size."""
    lines: list[Line] = []
    for place, name in enumerate(wishes.models):
        case, plan = wishes.case(name, part)
        lines += measure.measured(case, plan, wishes.limits(part, 1 / (len(wishes.models) - place)))
    return lines


def correctness(wishes: Wishes, part: str) -> list[Line]:
    """A card against the CPU, and half precision against float32."""
    tile = wishes.sizes.tile
    whole = wishes.cuda or wishes.config == "tiny"
    unet = tile if whole else CPU_LITTLE
    vae = replace(tile, frames=min(tile.frames, VAE_FRAMES)) if whole else CPU_VAE
    lines: list[Line] = []
    for name in wishes.models:
        if wishes.cuda:
            lines += precision.as_on_the_cpu(name, wishes.device)
        lines += precision.in_half(name, wishes.sizes, wishes.device, unet, vae)
    return lines


def in_the_host(wishes: Wishes, part: str) -> list[Line]:
    """SVD headless, and the same steps through ComfyUI."""
    from benchmarks.full_size import through_host

    assert wishes.comfyui is not None, "the options ask for it"
    rows = tuple(name for name in HOST_ROWS if name in wishes.rows)
    case, plan = replace(wishes, rows=rows).case("svd", "1080p" if wishes.cuda else "small")
    headless = measure.measured(case, plan, wishes.limits(part, 0.5))
    pack = through_host.start_host(wishes.comfyui, wishes.device)
    model = through_host.random_svd(pack, case.sizes.svd)
    lines = through_host.host_lines(pack, model, plan, rows, wishes.limits(part), f"SVD, {case.size}", headless)
    return headless + lines


#: In the order of their use on a card; "small" is the CPU's.
PARTS = {
    "small": sized,
    "correctness": correctness,
    "1080p": sized,
    "host": in_the_host,
    "720p": sized,
    "4k": sized,
}
