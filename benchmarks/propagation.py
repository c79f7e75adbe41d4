"""Time per sampling step with SAP and TAP, against tiles alone, for videos of 4 to 64 spatial tiles.

Lagged SAP and TAP: one tile a call, so one call's ratio is a step's, with the banks of all the video's tiles;
gathering, transfers and blending are in the time. A SAP call reads one bank and fills the next (what SAP at every step
pays); a TAP call takes its neighbour's frames, hands over its own and fills SAP's bank. Synchronous SAP: all tiles in
one call, against the same tiles one by one.

    python -m benchmarks.propagation --size full --synchronous 4
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import MIB, Options, interleaved, ratio, table
from vsr_ops.backbones.svd import SVD
from vsr_ops.sampling.attention import Fused, fused_attention
from vsr_ops.sampling.calls import Call, gather_tiles, token_grid
from vsr_ops.sampling.guidance import COND
from vsr_ops.sampling.layers import Layer
from vsr_ops.sampling.propagation import Propagation, TileRun, sap_rate
from vsr_ops.sampling.schedule import Kind, Step
from vsr_ops.sampling.tiling import Merger, TileSize, plan_tiles
from vsr_ops.system.allocator import keep_freed
from vsr_ops.system.memory import ran_out

TILES_ALONE = "tiles alone"
#: Middle of the three windows of the plan: TAP has a neighbour on both sides.
WINDOW, SIGMA = 1, 3.0
TAP_RATES = (1, 2, 4)
SAP_TARGET, TAP_TARGET, CHEAP_TAP_TARGET = 1.10, 2.0, 1.15


@dataclass
class Recorder(TileRun):
    """Keeps the last keys and values each layer was asked with, and propagates nothing."""

    seen: dict[str, tuple[Layer, Tensor, Tensor]] = field(default_factory=dict)

    def attend(
        self, call: Call, layer: Layer, q: Tensor, k: Tensor, v: Tensor, fused: Fused = fused_attention
    ) -> Tensor:
        if "ends" in layer.places:
            self.seen[layer.name] = (layer, k, v)
        return super().attend(call, layer, q, k, v, fused)


@dataclass
class Bench:
    """One plan of `side` x `side` tiles on three windows, and the calls timed on it."""

    model: SVD
    tile: TileSize
    side: int
    seen: dict[str, tuple[Layer, Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tile, grown = self.tile, (self.side + 1) / 2
        height, width = int(tile.height * grown), int(tile.width * grown)
        self.plan = plan_tiles(2 * tile.frames, height, width, tile, 0.5, factor=self.model.factor)
        assert len(self.plan.spatial) == self.tiles and len(self.plan.windows) == 3
        self.video = torch.randn(self.plan.frames, 4, height, width)
        self.concat = torch.randn_like(self.video)
        self.context = self.model.context(None)
        self.merger = Merger(self.plan)
        recorder = Recorder(self.plan, Propagation(()))
        self.evaluate(recorder, self.call("plain", 0))
        self.seen = recorder.seen

    @property
    def tiles(self) -> int:
        return self.side**2

    def call(self, kind: Kind, index: int, window: int = WINDOW, tiles: tuple[int, ...] = (0,)) -> Call:
        size = self.plan.tile_size(window)
        return Call(Step(index, kind), COND, window, tiles, size.frames, size.height, size.width)

    def evaluate(self, run: TileRun, call: Call) -> None:
        """One UNet call as `run_pass` makes it, into a blend."""
        x, concat = (gather_tiles(self.plan, call, z) for z in (self.video, self.concat))
        with self.model.serving(run, call):
            value = self.model.denoise(x, SIGMA, concat, self.context, call.frames)
        for i, m in enumerate(call.tiles):
            self.merger.add(call.window, m, value[i * call.frames : (i + 1) * call.frames])

    def fill(self, run: TileRun, call: Call) -> None:
        """Lets `run` bank every layer's keys and values as if `call` went through the UNet: one query is enough."""
        run.serve(call)
        for layer, k, v in self.seen.values():
            run.attend(call, layer, k[:, :, :1].clone(), k, v)

    def lagged_sap(self) -> TileRun:
        """A run at its second step, with the banks of all tiles from the first."""
        run = TileRun(self.plan, Propagation(("sap",), sap_lagged=True))
        run.begin(Step(0, "sap"), COND)
        for m in range(self.tiles):
            self.fill(run, self.call("sap", 0, tiles=(m,)))
        run.begin(Step(1, "sap"), COND)
        return run

    def rates(self) -> str:
        """SAP's rate at each layer."""
        grids = [token_grid(k.shape[2], self.tile.height, self.tile.width) for _, k, _ in self.seen.values()]
        return ", ".join(str(sap_rate(Propagation(), self.tiles, grid)) for grid in grids)


def one_by_one(options: Options, model: SVD, sides: list[int]) -> None:
    """Tiles alone, lagged SAP, TAP, and their average over a run in which SAP and TAP take turns."""
    benches = {f"SAP lagged, {side**2} tiles": Bench(model, options.tile, side) for side in sides}
    first = next(iter(benches.values()))
    plain = TileRun(first.plan, Propagation(()))
    saps = {name: (bench, bench.lagged_sap()) for name, bench in benches.items()}
    taps = {
        f"TAP, every {rate}. token" if rate > 1 else "TAP, paper": TileRun(
            first.plan, Propagation(("sap", "tap"), sap_lagged=True, tap_rate=rate)
        )
        for rate in TAP_RATES
    }
    work: dict[str, Callable[[], object]] = {TILES_ALONE: lambda: first.evaluate(plain, first.call("plain", 0))}
    for name, (bench, run) in saps.items():
        work[name] = lambda b=bench, r=run: b.evaluate(r, b.call("sap", 1))
    for name, run in taps.items():
        work[name] = lambda r=run: first.evaluate(r, first.call("tap", 1))

    def prepare(name: str) -> None:
        if name in saps:
            # every call pays for joining its window's bank and moving it, as the first call of a window does
            saps[name][1].begin(Step(1, "sap"), COND)
        if name in taps:
            taps[name].begin(Step(1, "tap"), COND)
            first.fill(taps[name], first.call("tap", 1, WINDOW - 1))

    times = interleaved(work, options, prepare)
    ratios = {name: ratio(times, name, TILES_ALONE) for name in work}
    targets = dict.fromkeys(saps, SAP_TARGET) | dict.fromkeys(taps, CHEAP_TAP_TARGET) | {"TAP, paper": TAP_TARGET}
    rows = [
        [
            name,
            f"{median(times[name]):.2f}",
            f"{ratios[name]:.3f}",
            f"<= {targets[name]}" if name in targets else "",
            "",
        ]
        for name in work
    ]
    for row in rows[1:]:
        if row[0] in saps:
            bench, run = saps[row[0]]
            # one call of the step under way has added its own tile to the banks being gathered
            row[4] = f"{bench.rates()}; {run.bank_bytes * bench.tiles / (bench.tiles + 1) / MIB:.1f}"
    costly = max(ratios[name] for name in saps)
    rows += [[f"run: SAP, then {name}", "", f"{(costly + ratios[name]) / 2:.3f}", "", ""] for name in taps]
    table(["one tile per call", "s per call", "ratio", "target", "SAP rates; bank MiB per window, branch"], rows)


def together(options: Options, model: SVD, sides: list[int]) -> None:
    """Synchronous SAP against its tiles one by one, and against them in one call without SAP."""
    rows: list[list[str]] = []
    for side in sides:
        bench = Bench(model, options.tile, side)
        everyone = tuple(range(bench.tiles))
        plain, sap = TileRun(bench.plan, Propagation(())), TileRun(bench.plan, Propagation(("sap",)))
        base, batch, shared = f"{bench.tiles} tiles alone", f"{bench.tiles} tiles, one call", "SAP synchronous"
        work: dict[str, Callable[[], object]] = {
            base: lambda b=bench, r=plain: [b.evaluate(r, b.call("plain", 0, tiles=(m,))) for m in range(b.tiles)],
            batch: lambda b=bench, r=plain, e=everyone: b.evaluate(r, b.call("plain", 0, tiles=e)),
            shared: lambda b=bench, r=sap, e=everyone: b.evaluate(r, b.call("sap", 0, tiles=e)),
        }
        try:
            times = interleaved(work, options)
        except Exception as error:
            if not ran_out(error):
                raise
            rows.append([f"SAP synchronous, {bench.tiles} tiles", "does not fit", "", "", ""])
            break
        for name in work:
            label = name if name != shared else f"SAP synchronous, {bench.tiles} tiles"
            rates, target = (bench.rates(), f"<= {SAP_TARGET}") if name == shared else ("", "")
            rows.append([label, f"{median(times[name]):.2f}", f"{ratio(times, name, base):.3f}", target, rates])
    table(["all tiles of a window", "s per window", "ratio", "target", "SAP rates"], rows)


def main() -> None:
    made = common.parser(__doc__, repeats=5)
    made.add_argument("--sides", type=int, nargs="*", default=[2, 4, 8], help="tiles along a side; 8 is 64 tiles")
    made.add_argument("--synchronous", type=int, nargs="*", default=[2, 4, 8], help="sides for synchronous SAP")
    arguments = made.parse_args()
    options = common.read(arguments)
    model = common.build(options)
    common.heading("Propagation", options)
    print(f"{common.describe(model, options)}\n", flush=True)
    with torch.no_grad():
        if arguments.sides:
            one_by_one(options, model, arguments.sides)
        if arguments.synchronous:
            together(options, model, arguments.synchronous)


if __name__ == "__main__":
    keep_freed()
    main()
