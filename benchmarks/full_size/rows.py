"""The rows of the table that are steps of sampling: what each does, and how one step of it is timed.

Each is `pipeline.sampler.sample` itself. Where a pass has too many UNet calls, only its last ones are evaluated, and
their time is multiplied; in place of the others the banks are filled with one tile's keys and values, so that SAP and
TAP read as much as they would.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import peak_resident
from vsr_ops.backbones.svd import Backbone
from vsr_ops.pipeline.sampler import SamplingSettings, sample
from vsr_ops.sampling.attention import Fused, fused_attention
from vsr_ops.sampling.calls import Call, calls, gather_tiles
from vsr_ops.sampling.guidance import COND, sag_degrade
from vsr_ops.sampling.layers import Layer
from vsr_ops.sampling.propagation import Propagation, TileRun
from vsr_ops.sampling.schedule import Kind, Step, step_at
from vsr_ops.sampling.tiling import TilePlan


@dataclass(frozen=True)
class Row:
    """One method beside plain tiles. The last of `steps` is timed: lagged SAP reads what the step before left."""

    title: str
    passes: int = 1
    guidance: str = "none"
    cfg: float | None = None
    scale: float | None = None
    kinds: tuple[Kind, ...] = ()
    lagged: bool = False
    steps: int = 1

    @property
    def settings(self) -> SamplingSettings:
        """As the sampler takes them."""
        return SamplingSettings(
            steps=self.steps,
            guidance=self.guidance,
            cfg=self.cfg,
            guidance_scale=self.scale,
            propagation=Propagation(self.kinds, sap_lagged=self.lagged),
        )

    @property
    def timed(self) -> Step:
        """The step that is timed."""
        return step_at(self.steps - 1, self.kinds)

    @property
    def synchronous(self) -> bool:
        """Whether all tiles of a window go through the UNet together."""
        return "sap" in self.kinds and not self.lagged


PLAIN = "plain"
#: By the names of `--rows`, the cheap and the telling ones first: where time runs out the last are left out.
ROWS = {
    PLAIN: Row("plain tiles"),
    "dssag8": Row("DSSAG, eq. 8", 2, "dssag", 1.0, 1.0),
    "sap-sync": Row("SAP, synchronous", kinds=("sap",)),
    "sap-lagged": Row("SAP, lagged", kinds=("sap",), lagged=True, steps=2),
    "tap": Row("TAP", kinds=("tap",)),
    "cfg": Row("CFG", 2, "cfg", 2.0),
    "dssag9": Row("DSSAG, eq. 9", 2, "dssag", 2.0),
    "pag": Row("PAG", 2, "pag", 1.0, 1.0),
    "sag": Row("SAG", 2, "sag", 1.0, 0.5),
}


class Traffic(TorchDispatchMode):
    """Bytes that go to the device and come back, within."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = self.received = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self._note(args[0], out)
        elif func is torch.ops.aten.copy_.default:
            self._note(args[1], args[0])
        return out

    def _note(self, source: Tensor, target: Tensor) -> None:
        if source.device.type == target.device.type:
            return
        # A change of type beside the copy is made in host memory: the device's own type travels.
        if target.device.type == "cpu":
            self.received += source.numel() * source.element_size()
        else:
            self.sent += target.numel() * target.element_size()


@dataclass
class Taken:
    """What one step took: seconds, most bytes held (weights included; on the CPU the process' resident memory), bytes
    to the device and back (None where nobody counted), UNet passes seen, and whether the tiles of a synchronous call
    had to be parted."""

    seconds: float
    peak: int
    moved: tuple[int, int] | None
    passes: int
    parted: bool


@dataclass
class Clock:
    """Seconds of the calls that were evaluated, and of what stood in for the others; tiles of the former."""

    evaluated: float = 0.0
    stood_in: float = 0.0
    tiles: int = 0
    begun: float = 0.0
    branches: set[str] = field(default_factory=set[str])
    parted: bool = False


def now(device: torch.device) -> float:
    """Seconds on a clock, the device's queue drained."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def forget_peak(device: torch.device) -> None:
    """Peak memory is counted from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    marks = Path("/proc/self/clear_refs")
    if marks.exists():
        marks.write_text("5")


def peak(device: torch.device) -> int:
    """Most bytes since `forget_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident()


@dataclass
class Recorder(TileRun):
    """Keeps the keys and values of the layers that methods act in."""

    seen: list[tuple[Layer, Tensor, Tensor]] = field(default_factory=list[tuple[Layer, Tensor, Tensor]])

    def attend(
        self, call: Call, layer: Layer, q: Tensor, k: Tensor, v: Tensor, fused: Fused = fused_attention
    ) -> Tensor:
        if layer.places & {"ends", "middle"}:
            self.seen.append((layer, k, v))
        return super().attend(call, layer, q, k, v, fused)


@dataclass
class Bench:
    """A model, a video's plan and its LR latents. `evaluated` is how many of a pass' tiles are; None is all of them."""

    model: Backbone
    plan: TilePlan
    evaluated: int | None = None
    seen: list[tuple[Layer, Tensor, Tensor]] = field(default_factory=list[tuple[Layer, Tensor, Tensor]])

    def __post_init__(self) -> None:
        plan = self.plan
        self.lr = torch.randn(plan.frames, 4, plan.height, plan.width, generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def warm_up(self) -> None:
        """One call that is not counted; its keys and values fill banks later."""
        size = self.plan.tile_size(0)
        call = Call(Step(0), COND, 0, (0,), size.frames, size.height, size.width)
        run, x = Recorder(self.plan, Propagation(())), gather_tiles(self.plan, call, self.lr)
        with self.model.serving(run, call):
            self.model.denoise(x, 1.0, x, self.model.context(None), call.frames)
        if self.evaluated is not None:
            self.seen = run.seen

    def chosen(self, row: Row) -> set[tuple[int, int]]:
        """The (window, tile) of the timed step whose calls are evaluated: the last of a pass, which have neighbours. A
        synchronous call is of all its tiles."""
        found = set[tuple[int, int]]()
        for call in reversed(list(calls(self.plan, row.timed, COND, 1, synchronous=row.synchronous))):
            if self.evaluated is None or len(found) < self.evaluated:
                found |= {(call.window, m) for m in call.tiles}
        return found

    def stand_in(self, run: TileRun, call: Call) -> None:
        """Lets `run` bank as if `call` had gone through the UNet: one query is enough. A synchronous call banks
        nothing."""
        if len(call.tiles) == 1:
            for layer, k, v in self.seen:
                run.attend(call, layer, k[:, :, :1].clone(), k, v)

    def step(self, row: Row, traffic: Traffic | None = None) -> Taken:
        """One step of a row, of the whole video."""
        clock, device = Clock(), self.model.device
        if row.guidance == "sag":
            # Its blur loads a library, which is no part of a step.
            sag_degrade(self.lr[:1], self.lr[:1, :1])
        forget_peak(device)
        with self._watched(row, clock, traffic):
            sample(self.model, self.lr, self.plan, row.settings, tick=lambda call: self._tick(row, clock, call))
        seconds = now(device) - clock.begun
        times = len(clock.branches) * self.plan.tiles / clock.tiles
        return Taken(
            seconds - clock.stood_in - clock.evaluated + clock.evaluated * times,
            peak(device),
            None if traffic is None else (round(traffic.sent * times), round(traffic.received * times)),
            len(clock.branches),
            clock.parted,
        )

    def _tick(self, row: Row, clock: Clock, call: Call) -> None:
        if call.step.index != row.steps - 1:
            return
        if not clock.branches:
            clock.begun = now(self.model.device)
        clock.branches.add(call.branch.name)
        clock.parted |= row.synchronous and len(call.tiles) < len(self.plan.spatial)

    @contextmanager
    def _watched(self, row: Row, clock: Clock, traffic: Traffic | None) -> Generator[None]:
        model, chosen = self.model, self.chosen(row)
        inner = model.denoise

        def denoise(x: Tensor, sigma: float, lr: Tensor, context: Tensor, frames: int) -> Tensor:
            assert model.active is not None, "`sample` calls this inside `serving`"
            run, call = model.active
            timed, begun = call.step.index == row.steps - 1, now(model.device)
            if (timed or self.evaluated is None) and any((call.window, m) in chosen for m in call.tiles):
                with traffic if timed and traffic is not None else nullcontext():
                    out = inner(x, sigma, lr, context, frames)
                if timed:
                    clock.evaluated += now(model.device) - begun
                    clock.tiles += len(call.tiles)
                return out
            assert isinstance(run, TileRun), "branches are evaluated apart"
            self.stand_in(run, call)
            clock.stood_in += now(model.device) - begun if timed else 0.0
            return x.float()

        setattr(model, "denoise", denoise)  # noqa: B010
        try:
            yield
        finally:
            delattr(model, "denoise")
