"""What the host's UNet takes, and the share of it that belongs to a tile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...vsr_ops.errors import SettingError
from ...vsr_ops.sampling.calls import Call, gather_tiles
from ...vsr_ops.sampling.tiling import Span, TilePlan

#: What ControlNets add to a UNet: for each stage, values in the order of the host's blocks, or nothing for a block.
Control = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Inputs:
    """What the host's `BaseModel.apply_model` takes beside its options: of a batch of branches, a branch, or a call."""

    x: Tensor
    t: Tensor
    concat: Tensor | None
    context: Tensor | None
    rest: dict[str, Any]
    control: Control | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """Everything that is per frame changed alike."""

        def each(value: Any) -> Any:
            per_frame = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == self.x.shape[0]
            return change(value) if per_frame else value

        rest = {name: each(value) for name, value in self.rest.items()}
        control = None if self.control is None else _each_control(self.control, each)
        return Inputs(each(self.x), each(self.t), each(self.concat), each(self.context), rest, control)

    def tiles(self, plan: TilePlan, call: Call) -> Inputs:
        """The share of one call: its window's frames, and of a picture its tiles."""

        def cut(value: Tensor) -> Tensor:
            if value.ndim == 4 and value.shape[-2:] == self.x.shape[-2:]:
                return gather_tiles(plan, call, value)
            window = value[plan.windows[call.window].span.slice]
            return window.repeat(len(call.tiles), *(1,) * (value.ndim - 1))

        inputs = replace(self, control=None).map(cut)
        if self.control is not None:
            own = _each_control(self.control, lambda value: cut_features(plan, call, value))
            inputs = replace(inputs, control=own)
        if "num_video_frames" not in inputs.rest:
            return inputs
        return replace(inputs, rest={**inputs.rest, "num_video_frames": call.frames})


def _each_control(control: Control, change: Callable[[Any], Any]) -> dict[str, list[Any]]:
    """New lists of changed values: the host's UNet takes them off the lists that it is given."""
    return {stage: [value if value is None else change(value) for value in values] for stage, values in control.items()}


def cut_features(plan: TilePlan, call: Call, value: Tensor) -> Tensor:
    """A call's share `(tiles*frames, c, rows, cols)` of a ControlNet's features for one branch's whole frames,
    `(frames or 1, c, ceil(height/k), ceil(width/k))`, k a power of 2, or 1 x 1 where they have no place.

    Cell i of a level lies at latent i*k. Where a tile's start is no multiple of k, its cells are interpolated between
    the two on each side. Raises SettingError for features of another size.
    """
    if plan.tiles == 1:
        return value
    if value.shape[0] not in (1, plan.frames):
        raise SettingError(
            f"a ControlNet gave features of {value.shape[0]} frames for {plan.frames}: expected one for each; give"
            " Apply ControlNet the whole video"
        )
    window = value.expand(plan.frames, *value.shape[1:])[plan.windows[call.window].span.slice]
    if value.shape[-2:] == (1, 1):
        return window.repeat(len(call.tiles), 1, 1, 1)
    k = _shrink(plan, *value.shape[-2:])
    tiles = (plan.spatial[m] for m in call.tiles)
    return torch.cat([_cells(_cells(window, -2, row, k), -1, col, k) for row, col in tiles])


def _shrink(plan: TilePlan, rows: int, cols: int) -> int:
    for k in (1, 2, 4, 8, 16, 32):
        if (-(-plan.height // k), -(-plan.width // k)) == (rows, cols):
            return k
    raise SettingError(
        f"a ControlNet gave features of {rows}x{cols} for {plan.height}x{plan.width} latents: expected 1/1, 1/2,"
        " 1/4 ... of them, which tiles can be cut from; use one made for this MODEL, or sample without tiles"
    )


def _cells(value: Tensor, axis: int, span: Span, k: int) -> Tensor:
    """A span's cells along one axis of features k times smaller than the latents."""
    first, between = divmod(span.start, k)
    near = value.narrow(axis, first, -(-span.length // k))
    if between == 0:
        return near
    places = torch.arange(first + 1, first + 1 + near.shape[axis], device=value.device)
    following = value.index_select(axis, places.clamp(max=value.shape[axis] - 1))
    return torch.lerp(near, following, between / k)
