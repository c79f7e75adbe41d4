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
from einops import rearrange
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
    """The banks of one branch of a run (in a host, of one conditioning in it). SAP's lagged banks stand in host memory
    until the next step has used them; TAP's live from a window to its neighbour. Both are kept by (branch's name,
    window, layer's name) and in that by the tile's index in `plan.spatial`; the joined ones by layer alone.

    `plan` is that of the pass under way: the step's of `layout`, where one is given. A lagged bank that was gathered on
    other windows is put together frame by frame.

    A call may be evaluated again, whole or in parts, until `finish` has been told of it. `limit` is how many tiles fit
    in memory together, once that is known; `alone`: that other branches' do not fit beside them.
    """

    plan: TilePlan
    settings: Propagation
    saliency: Saliency | None = None
    limit: int | None = None
    alone: bool = False
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
    _device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    #: Of the call that is served: what its layers find, whether they leave tokens for SAP and for TAP, and what they
    #: have left, by layer: SAP's of all its tiles, TAP's tile by tile.
    _served: Call | None = None
    _lent: dict[str, KeyValue] = field(default_factory=dict[str, KeyValue])
    _gathers: bool = False
    _hands_over: bool = False
    _gathered: dict[str, KeyValue] = field(default_factory=dict[str, KeyValue])
    _handed: dict[str, list[KeyValue]] = field(default_factory=dict[str, list[KeyValue]])

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
        self._forget()
        self.saliency = Saliency(self.plan) if branch.observe else None

    def serve(self, call: Call) -> None:
        """Announces the evaluation of a call, or of a part of one: its layers find what they read on the device, and
        leave what others will read there. Nothing that tells calls of one kind apart is looked at in between, so that a
        compiled model serves them all."""
        self._collect()
        self._served = call
        left, right = self._neighbours(call)
        several, tap = len(self.plan.spatial) > 1, call.step.kind == "tap"
        following = step_at(call.step.index + 1, self.settings.kinds).kind
        self._gathers = self.settings.sap_lagged and several and following == "sap"
        self._hands_over = tap and right is not None
        if tap and left is not None:
            self._lent = self._taken_over(call, left)
        elif call.step.kind == "sap" and several and self.settings.sap_lagged:
            self._lent = self._lagged_banks(call)

    def _forget(self) -> None:
        """Nothing is served, and what was left is lost."""
        self._served, self._lent, self._gathered, self._handed = None, {}, {}, {}

    def _collect(self) -> None:
        """Takes what the layers of the call that was served have left."""
        if (call := self._served) is not None:
            key = (call.branch.name, call.window)
            for layer, all_tiles in self._gathered.items():
                bank = self._gathering.setdefault((*key, layer), {})
                self._device = all_tiles.keys.device
                for i, m in enumerate(call.tiles):
                    own = slice(i * call.frames, (i + 1) * call.frames)
                    bank[m] = KeyValue(*(to_host(x[own], self._pin) for x in all_tiles))
            for layer, tiles in self._handed.items():
                self._tap.setdefault((*key, layer), {}).update(zip(call.tiles, tiles, strict=True))
        self._forget()

    def finish(self, call: Call) -> None:
        """Announces that a call is done with: what only it needed is dropped."""
        self._collect()
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
        self._forget()
        self.limit = len(call.tiles) // 2
        if call.step.kind == "sap" and not self.settings.sap_lagged:
            self.settings = replace(self.settings, sap_lagged=True)
            log.warning("Out of memory with a window's %d tiles at once: SAP is lagged from here on", len(call.tiles))
        log.warning("Out of memory with %d tiles at once: going on with %d", len(call.tiles), self.limit)

    def separate(self) -> None:
        """Makes do without other branches in its calls from now on."""
        self._forget()
        self.alone = True

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
        if self._gathers:
            rate = sap_rate(self.settings, len(self.plan.spatial), grid)
            # contiguous: a view would keep the whole layer's keys alive
            self._gathered[layer] = KeyValue(*(subsample(x, grid, rate).contiguous() for x in (k, v)))
        if self._hands_over:
            tiles = (slice(first, first + call.frames) for first in range(0, len(k), call.frames))
            self._handed[layer] = [self._sharpest(k[own], v[own], grid) for own in tiles]
        if call.step.kind == "sap" and not self.settings.sap_lagged and len(self.plan.spatial) > 1:
            return self._shared_bank(call, grid, k, v)
        return self._lent.get(layer)

    def _shared_bank(self, call: Call, grid: tuple[int, int], k: Tensor, v: Tensor) -> KeyValue:
        """The subsampled tokens of all tiles of the batch, per frame, for every tile."""
        rate = sap_rate(self.settings, len(self.plan.spatial), grid)
        banks = (rearrange(subsample(x, grid, rate), "(m t) h n d -> 1 t h (m n) d", t=call.frames) for x in (k, v))
        return KeyValue(*banks)

    def _lagged_banks(self, call: Call) -> dict[str, KeyValue]:
        """What the step before left of a call's window, by layer, its tiles in a row, on the device."""
        place = (call.step.index, call.branch.name, call.window)
        if self._joined_at != place:
            self._joined, self._joined_at = {}, place
            found = frames_within(self.plan.windows[call.window], self._lagged_windows)
            for layer in dict.fromkeys(layer for branch, _, layer in self._lagged if branch == call.branch.name):
                parts = [self._joined_tiles((call.branch.name, n, layer), frames) for n, frames in found]
                there = [part for part in parts if part is not None]
                if there and len(there) == len(parts):
                    self._joined[layer] = KeyValue(*(torch.cat(each).unsqueeze(0) for each in zip(*there, strict=True)))
        return self._joined

    def _joined_tiles(self, key: tuple[str, int, str], frames: slice) -> KeyValue | None:
        """Some frames of a lagged bank, its tiles in a row, on the device; nothing where there is none."""
        bank = self._lagged.get(key)
        if not bank:
            return None
        # Joined on the device: in the machine's memory they may not have arrived yet.
        tiles = [[to_device(x, self._device)[frames] for x in bank[m]] for m in sorted(bank)]
        return KeyValue(*(torch.cat(parts, dim=2) for parts in zip(*tiles, strict=True)))

    def _taken_over(self, call: Call, left: int) -> dict[str, KeyValue]:
        """What the window before left of a call's tiles, by layer, one for all frames."""
        found: dict[str, KeyValue] = {}
        for (branch, window, layer), bank in self._tap.items():
            if (branch, window) == (call.branch.name, left):
                tiles = [bank[m] for m in call.tiles]
                # of one tile a view
                banks = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*tiles, strict=True))
                found[layer] = KeyValue(*(x.unsqueeze(1) for x in banks))
        return found

    def _neighbours(self, call: Call) -> tuple[int | None, int | None]:
        """The windows of the same scene that run before and after the call's at a TAP step."""
        windows = self.plan.windows

        def neighbour(offset: int) -> int | None:
            n = call.window + offset
            return n if 0 <= n < len(windows) and windows[n].scene == windows[call.window].scene else None

        return (neighbour(-1), neighbour(1)) if call.step.forward else (neighbour(1), neighbour(-1))

    def _sharpest(self, k: Tensor, v: Tensor, grid: tuple[int, int]) -> KeyValue:
        if len(k) > self.settings.tap_frames:
            frames = sharpest_frames(k, self.settings.tap_frames)
            k, v = (x.index_select(0, frames) for x in (k, v))
        rate = self.settings.tap_rate
        return KeyValue(*(rearrange(subsample(x, grid, rate), "t h n d -> 1 h (t n) d") for x in (k, v)))
