"""SAP and TAP: which keys and values a tile sees beside its own (DC-VSR, sections 3.1 and 3.2, equation 2).

Settings and the kind of a step are plain values. `TileRun` holds one run's banks; nothing outlives it. A bank belongs
to one branch, window and layer, and in it to one tile. Over the steps of a run whose SAP is lagged:

    step         0 sap     1 tap forward      2 sap         3 tap backward
    _gathering   -         every tile's       -             every tile's       host memory, subsampled
    _lagged      -         -                  step 1's      -                  host memory; what SAP reads
    _joined      -         -                  one window's  -                  device; the lagged tiles in a row
    _tap         -         left neighbour's   -             right neighbour's  device, until the neighbour is done

The first SAP step of a run has no bank and is plain. A synchronous SAP needs none of the first three: all tiles of a
window are at the same layer at once. With SAP alone every step gathers and reads.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from einops import rearrange, repeat
from torch import Tensor

from ..errors import SettingError
from ..system.memory import Memory, may_pin, to_device, to_host
from .attention import Fused, KeyValue, fused_attention, plain
from .calls import Call, token_grid
from .guidance import Branch
from .layers import Layer, check_layers
from .layouts import TileLayout
from .saliency import Saliency
from .schedule import Kind, Step, step_at
from .tiling import TilePlan, Window

log = logging.getLogger(__name__)

#: What is propagated, by name.
PROPAGATION: dict[str, tuple[Kind, ...]] = {"sap+tap": ("sap", "tap"), "sap": ("sap",), "tap": ("tap",), "none": ()}


@dataclass(frozen=True)
class Propagation:
    """What is propagated. `kinds` alternate from step to step; one alone acts at every step; empty is off.

    `sap_rate` takes every s-th token in y and x (None: the smallest s from 4 up whose bank is at most half of a tile's
    own tokens). `tap_frames` is the paper's L; `tap_rate` 1 takes all their tokens (the paper's setting). `layers` is a
    name in LAYERS.
    """

    kinds: tuple[Kind, ...] = ("sap", "tap")
    sap_lagged: bool = False
    sap_rate: int | None = None
    tap_frames: int = 4
    tap_rate: int = 1
    layers: str = "ends"

    def __post_init__(self) -> None:
        check_layers(self.layers)
        if unknown := set(self.kinds) - {"sap", "tap"}:
            raise SettingError(f"propagation of {', '.join(sorted(unknown))}: expected sap, tap, or none of them")
        for label, value in {
            "SAP rate": self.sap_rate,
            "TAP frames": self.tap_frames,
            "TAP rate": self.tap_rate,
        }.items():
            if value is not None and value < 1:
                raise SettingError(f"{label} is {value}: expected a whole number from 1")

    @staticmethod
    def named(name: str, **settings: int | bool | str | None) -> Propagation:
        """From a name in PROPAGATION; raises SettingError with the known names for another."""
        if name not in PROPAGATION:
            raise SettingError(f"propagation is {name!r}: expected one of {', '.join(PROPAGATION)}")
        return Propagation(PROPAGATION[name], **settings)  # type: ignore[arg-type]


def subsample(x: Tensor, grid: tuple[int, int], rate: int) -> Tensor:
    """Every `rate`-th token in y and x of `(b, heads, tokens, dim)`; rate 1 is the tensor itself."""
    if rate == 1:
        return x
    image = rearrange(x, "b h (y x) d -> b h y x d", y=grid[0])
    return rearrange(image[:, :, ::rate, ::rate], "b h y x d -> b h (y x) d")


def sap_rate(settings: Propagation, tiles: int, grid: tuple[int, int]) -> int:
    """The rate SAP uses for a layer of `grid` tokens when `tiles` tiles share a bank."""
    if settings.sap_rate is not None:
        return settings.sap_rate
    rate = 4
    while tiles * math.ceil(grid[0] / rate) * math.ceil(grid[1] / rate) > grid[0] * grid[1] / 2 and rate < max(grid):
        rate += 1
    return rate


def sharpest_frames(keys: Tensor, count: int) -> Tensor:
    """The `count` frames of `(frames, heads, tokens, dim)` whose keys deviate most, rising; ties to the lower index.
    They stay on the device: nothing waits for it."""
    # frame by frame: a deviation over chosen axes is some 7 times slower on the CPU
    deviation = torch.stack([frame.float().std(correction=0) for frame in keys])
    order = torch.sort(deviation, descending=True, stable=True).indices
    return order[:count].sort().values


def frames_within(own: Window, windows: Sequence[Window]) -> list[tuple[int, slice]]:
    """Where a window's frames lie in others of the same scene: the other's number, and the frames counted from its
    start, in the order of the window's frames. Of several each frame takes the one in whose middle it lies deepest; a
    window that is there itself is taken whole."""
    if (same := next((n for n, window in enumerate(windows) if window == own), None)) is not None:
        return [(same, slice(0, own.span.length))]
    found: list[tuple[int, slice]] = []
    candidates = [(n, window.span) for n, window in enumerate(windows) if window.scene == own.scene]
    for frame in range(own.span.start, own.span.stop):
        depths = [(min(frame - span.start, span.stop - 1 - frame), -n, span.start) for n, span in candidates]
        depth, negative, start = max(depths, default=(-1, 0, 0))
        if depth < 0:
            return []
        n, place = -negative, frame - start
        if found and found[-1][0] == n and found[-1][1].stop == place:
            found[-1] = (n, slice(found[-1][1].start, place + 1))
        else:
            found.append((n, slice(place, place + 1)))
    return found


@dataclass
class TileRun:
    """The banks of one run (in a host, of one branch and conditioning in it). SAP's lagged banks stand in host memory
    until the next step has used them; TAP's live from a window to its neighbour. Both are kept by (branch's name,
    window, layer's name) and in that by the tile's index in `plan.spatial`; the joined ones by layer alone.

    `plan` is that of the pass under way: the step's of `layout`, where one is given. A lagged bank that was gathered on
    other windows is put together frame by frame.

    A call may be evaluated again, whole or in parts, until `finish` has been told of it. `limit` is how many tiles fit
    in memory together, once that is known.
    """

    plan: TilePlan
    settings: Propagation
    saliency: Saliency | None = None
    limit: int | None = None
    memory: Memory = field(default_factory=Memory)
    layout: TileLayout | None = None
    _step: int = -1
    _pin: bool = False
    #: The windows on which the lagged banks were gathered.
    _lagged_windows: tuple[Window, ...] = ()
    _lagged: dict[tuple[str, int, str], dict[int, KeyValue]] = field(
        default_factory=dict[tuple[str, int, str], dict[int, KeyValue]]
    )
    _gathering: dict[tuple[str, int, str], dict[int, KeyValue]] = field(
        default_factory=dict[tuple[str, int, str], dict[int, KeyValue]]
    )
    _tap: dict[tuple[str, int, str], dict[int, KeyValue]] = field(
        default_factory=dict[tuple[str, int, str], dict[int, KeyValue]]
    )

    #: The lagged banks of the window under way, joined and on the device, by layer.
    _joined: dict[str, KeyValue] = field(default_factory=dict[str, KeyValue])
    _joined_at: tuple[int, str, int] | None = None

    @property
    def bank_bytes(self) -> int:
        """Host memory the lagged banks hold now."""
        banks = [*self._lagged.values(), *self._gathering.values()]
        return sum(kv.keys.nbytes + kv.values.nbytes for bank in banks for kv in bank.values())

    def begin(self, step: Step, branch: Branch) -> None:
        """Announces the next pass over the video. A new step makes what was gathered in the last one available."""
        if step.index != self._step:
            self._lagged = self._gathering if step.index == self._step + 1 else {}
            self._lagged_windows = self.plan.windows
            self._gathering = {}
            self._step, self._pin = step.index, may_pin()
        if self.layout is not None:
            self.plan = self.layout.at(step.index)
        self._tap, self._joined, self._joined_at = {}, {}, None
        self.saliency = Saliency(self.plan) if branch.observe else None

    def finish(self, call: Call) -> None:
        """Announces that a call is done with: what only it needed is dropped."""
        left = self._neighbours(call)[0]
        for key in [key for key in self._tap if key[:2] == (call.branch.name, left)]:
            for m in call.tiles:
                self._tap[key].pop(m, None)
            if not self._tap[key]:
                del self._tap[key]
        if self.saliency is not None:
            self.saliency.commit()

    def shrink(self, call: Call) -> None:
        """Makes do with half of the call's tiles at once from now on. Synchronous SAP, which cannot, becomes lagged."""
        self.limit = len(call.tiles) // 2
        if call.step.kind == "sap" and not self.settings.sap_lagged:
            self.settings = replace(self.settings, sap_lagged=True)
            log.warning("Out of memory with a window's %d tiles at once: SAP is lagged from here on", len(call.tiles))
        log.warning("Out of memory with %d tiles at once: going on with %d", len(call.tiles), self.limit)

    def acts(self, call: Call, layer: Layer) -> bool:
        """Whether `attend` would do anything but plain attention here."""
        varied = call.branch.attention is not None and call.branch.layers in layer.places
        observed = self.saliency is not None and "middle" in layer.places
        return varied or observed or (bool(self.settings.kinds) and self.settings.layers in layer.places)

    def attend(
        self, call: Call, layer: Layer, q: Tensor, k: Tensor, v: Tensor, fused: Fused = fused_attention
    ) -> Tensor:
        """Self-attention of a layer, with what SAP or TAP appends and the branch's variant, where they act.

        All `(tiles*frames, heads, tokens, dim)`; `q` may be scaled in place. `fused` is the attention to use.
        """
        if self.saliency is not None and "middle" in layer.places:
            self.saliency.observe(call, q, k)
        variant = call.branch.attention if call.branch.layers in layer.places else None
        extra = self._extend(call, layer.name, k, v) if self.settings.layers in layer.places else None
        return (variant or plain)(q, k, v, extra, call.frames, fused)

    def _extend(self, call: Call, layer: str, k: Tensor, v: Tensor) -> KeyValue | None:
        grid = token_grid(k.shape[2], call.height, call.width)
        if self.settings.sap_lagged:
            self._gather(call, layer, grid, k, v)
        if call.step.kind == "sap" and len(self.plan.spatial) > 1:
            lagged = self.settings.sap_lagged
            return self._lagged_bank(call, layer, k) if lagged else self._shared_bank(call, grid, k, v)
        if call.step.kind == "tap":
            return self._hand_over(call, layer, grid, k, v)
        return None

    def _shared_bank(self, call: Call, grid: tuple[int, int], k: Tensor, v: Tensor) -> KeyValue:
        """The subsampled tokens of all tiles of the batch, per frame, for each tile."""
        rate, tiles = sap_rate(self.settings, len(self.plan.spatial), grid), len(call.tiles)
        banks = [
            repeat(subsample(x, grid, rate), "(m t) h n d -> (copy t) h (m n) d", m=tiles, copy=tiles) for x in (k, v)
        ]
        return KeyValue(*banks)

    def _gather(self, call: Call, layer: str, grid: tuple[int, int], k: Tensor, v: Tensor) -> None:
        """Keeps this step's subsampled tokens for the next step, if that one is a SAP step."""
        count = len(self.plan.spatial)
        if count == 1 or step_at(call.step.index + 1, self.settings.kinds).kind != "sap":
            return
        rate = sap_rate(self.settings, count, grid)
        bank = self._gathering.setdefault((call.branch.name, call.window, layer), {})
        for i, m in enumerate(call.tiles):
            own = slice(i * call.frames, (i + 1) * call.frames)
            # contiguous: a view would keep the whole layer's keys alive on the CPU
            bank[m] = KeyValue(*(to_host(subsample(x[own], grid, rate).contiguous(), self._pin) for x in (k, v)))

    def _lagged_bank(self, call: Call, layer: str, like: Tensor) -> KeyValue | None:
        place = (call.step.index, call.branch.name, call.window)
        if self._joined_at != place:
            self._joined, self._joined_at = {}, place
        if layer not in self._joined:
            own = self.plan.windows[call.window]
            parts = [
                self._joined_tiles((call.branch.name, n, layer), frames, like)
                for n, frames in frames_within(own, self._lagged_windows)
            ]
            there = [part for part in parts if part is not None]
            if len(there) < max(len(parts), 1):
                return None
            self._joined[layer] = KeyValue(*(torch.cat(each) for each in zip(*there, strict=True)))
        return KeyValue(*(repeat(x, "t h n d -> (m t) h n d", m=len(call.tiles)) for x in self._joined[layer]))

    def _joined_tiles(self, key: tuple[str, int, str], frames: slice, like: Tensor) -> KeyValue | None:
        """Some frames of a lagged bank, its tiles in a row, on the device of `like`; nothing where there is none."""
        bank = self._lagged.get(key)
        if not bank:
            return None
        # Joined on the device: in the machine's memory they may not have arrived yet.
        tiles = [[to_device(x, like.device).to(like)[frames] for x in bank[m]] for m in sorted(bank)]
        return KeyValue(*(torch.cat(parts, dim=2) for parts in zip(*tiles, strict=True)))

    def _hand_over(self, call: Call, layer: str, grid: tuple[int, int], k: Tensor, v: Tensor) -> KeyValue | None:
        """Stores this window's sharpest frames for the next window, and returns what the last one left."""
        left, right = self._neighbours(call)
        found = self._tap.get((call.branch.name, left, layer)) if left is not None else None
        if right is not None:
            bank = self._tap.setdefault((call.branch.name, call.window, layer), {})
            for i, m in enumerate(call.tiles):
                own = slice(i * call.frames, (i + 1) * call.frames)
                bank[m] = self._sharpest(k[own], v[own], grid)
        if found is None:
            return None
        tiles = [found[m] for m in call.tiles]
        # for one tile a view: every frame sees the same tokens
        joined = [torch.cat(parts) for parts in zip(*tiles, strict=True)]
        return KeyValue(*(repeat(x, "m h n d -> (m t) h n d", t=call.frames) for x in joined))

    def _neighbours(self, call: Call) -> tuple[int | None, int | None]:
        """The windows of the same scene that run before and after the call's at a TAP step."""
        windows = self.plan.windows

        def neighbour(offset: int) -> int | None:
            n = call.window + offset
            return n if 0 <= n < len(windows) and windows[n].scene == windows[call.window].scene else None

        return (neighbour(-1), neighbour(1)) if call.step.forward else (neighbour(1), neighbour(-1))

    def _sharpest(self, k: Tensor, v: Tensor, grid: tuple[int, int]) -> KeyValue:
        frames = sharpest_frames(k, self.settings.tap_frames)
        chosen = [subsample(x.index_select(0, frames), grid, self.settings.tap_rate) for x in (k, v)]
        return KeyValue(*(rearrange(x, "t h n d -> 1 h (t n) d") for x in chosen))
