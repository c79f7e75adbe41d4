"""A decoder or encoder as sweeps over its whole picture, each of which ends where the next group norm must know it all.

A `DecoderOp` may hold several norms; a sweep holds one, at its start, and begins with whole activations in buffers. So
every tile of every sweep is computed once, with exact statistics, and needs only what a few convolutions reach.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.cfw import FuseLayer
from ..modules.idle import Idle
from ..modules.windows import Place
from ..system.precision import run_like
from .layout import DecoderOp, is_temporal
from .places import Box

#: The buffer that goes from op to op, the branch beside it, and what a guided op works out of the reference.
MAIN, BRANCH, FUSED = "x", "h", "f"


@dataclass(frozen=True)
class At:
    """A tile of a sweep: its `place`, margins included, the part `own` that is its alone, both in the pixels of what is
    read, and the frames' compression levels `hint`, for CAPM."""

    place: Place
    own: Box
    hint: Tensor | None


@dataclass(frozen=True)
class Sweep:
    """One sweep over the picture.

    `run` is given a part of the buffer `reads`, with the margin that `reach`, `window` and `before` ask for (as in a
    `DecoderOp`), normalised and, unless not `activated`, activated where there is a `norm`, which sees all frames as
    one where it is `over_time`; of the buffer `beside`, the same part; and where these lie. What it gives goes to the
    buffer `writes` (None: nowhere, it only gathers, and `ends` is called when all tiles have been seen). `last` are
    buffers that no later sweep reads. `widest` is how many channels it makes, where that is more than it reads: tiles
    are as small as these want. `alone` says that each frame is by itself in it, and that it needs no other buffer than
    these.
    """

    run: Callable[[Tensor, Tensor | None, At], Tensor | None]
    reads: str = MAIN
    writes: str | None = MAIN
    beside: str | None = None
    norm: nn.GroupNorm | None = None
    activated: bool = True
    over_time: bool = False
    reach: int = 0
    resize: int = 0
    window: int = 1
    before: int = 0
    widest: int = 0
    last: tuple[str, ...] = ()
    alone: bool = False
    ends: Callable[[], None] | None = None


def convolved_over_time(conv: Any, x: Tensor) -> Tensor:
    """A Conv3d over frames `(t, c, h, w)`. On a CPU one that sees time alone is a matrix product for each of its
    places, for which channels lie last: torch's own ways copy the frames, and take two to three times as long."""
    if x.device.type != "cpu" or tuple(conv.kernel_size[1:]) != (1, 1):
        return conv(x.transpose(0, 1)[None])[0].transpose(0, 1)
    t, c, h, w = x.shape
    frames = x.permute(0, 2, 3, 1).reshape(t, h * w, c)
    weight = conv.weight[..., 0, 0].to(x).permute(2, 1, 0)
    out = torch.zeros((t, h * w, weight.shape[-1]), dtype=x.dtype)
    for place, matrix in enumerate(weight):
        shift = place - weight.shape[0] // 2
        into, of = (slice(max(-sign * shift, 0), t - max(sign * shift, 0)) for sign in (1, -1))
        if into.start < into.stop:
            out[into].flatten(0, 1).addmm_(frames[of].flatten(0, 1), matrix)
    if conv.bias is not None:
        out += conv.bias.to(x)
    return out.view(t, h, w, -1).permute(0, 3, 1, 2)


def sweeps_of(ops: Sequence[DecoderOp]) -> list[Sweep] | None:
    """The sweeps of some steps; None where one of them is built in no way that is known here."""
    found: list[Sweep] = []
    for op in ops:
        part = _of(op)
        if part is None:
            return None
        found += part
    return found


def joined(sweeps: Sequence[Sweep]) -> list[Sweep]:
    """Sweeps in which one that halves the picture, with no norm at its start, is one with a convolution before it: what
    lies between, as large as the picture, is then made of a tile at a time and not kept."""
    found: list[Sweep] = []
    for sweep in sweeps:
        if found and sweep.resize < 0 and _is_plain(found[-1]) and _is_plain(sweep):
            found.append(_both(found.pop(), sweep))
        else:
            found.append(sweep)
    return found


def _is_plain(sweep: Sweep) -> bool:
    """Whether a sweep needs no more than a part of what went before."""
    return sweep.norm is None and sweep.beside is None and (sweep.reads, sweep.writes, sweep.window) == (MAIN, MAIN, 1)


def _both(first: Sweep, second: Sweep) -> Sweep:
    def run(x: Tensor, beside: Tensor | None, at: At) -> Tensor:
        made = first.run(x, None, at)
        assert made is not None
        halved = second.run(made, None, at)
        assert halved is not None
        return halved

    return Sweep(run, resize=second.resize, before=first.reach, widest=first.widest, alone=first.alone and second.alone)


def _of(op: DecoderOp) -> list[Sweep] | None:
    if op.sweeps is not None:
        return op.sweeps()
    if all(isinstance(module, Idle) for module in op.modules):
        return []
    if op.residual:
        return _residual_op(op.modules[0])
    if op.name == "out":
        return _out(op)
    if op.norms or op.guided is not None or op.placed is not None:
        return None
    alone = not any(is_temporal(module) for module in op.modules)
    made = [part.out_channels for module in op.modules for part in module.modules() if isinstance(part, nn.Conv2d)]
    plain = Sweep(lambda x, beside, at: op.run(x), reach=op.reach, resize=op.resize, window=op.window, alone=alone)
    return [replace(plain, widest=max(made, default=0))]


def _residual_op(block: Any) -> list[Sweep] | None:
    """diffusers' residual block, alone or with its part over time; LDM's, likewise."""
    if (temporal := getattr(block, "temporal_res_block", None)) is not None:
        spatial = _residual(block.spatial_res_block)
        if isinstance(temporal, Idle):
            return spatial

        def mixed(spatial: Tensor, temporal: Tensor) -> Tensor:
            images_only = spatial.new_zeros(1, spatial.shape[0])
            mix = block.time_mixer(*(side.transpose(0, 1)[None] for side in (spatial, temporal)), images_only)
            return mix[0].transpose(0, 1)

        if spatial is None or getattr(temporal, "conv_shortcut", None) is not None:
            return None
        return [*spatial, *_over_time((temporal.norm1, temporal.norm2), (temporal.conv1, temporal.conv2), mixed)]
    spatial = _residual(block)
    if spatial is None or (stack := getattr(block, "time_stack", None)) is None:
        return spatial
    if not isinstance(stack.skip_connection, nn.Identity):
        return None

    def blended(spatial: Tensor, temporal: Tensor) -> Tensor:
        alpha = block.get_alpha(bs=1).to(temporal)
        return alpha * temporal + (1.0 - alpha) * spatial

    norms, convs = (stack.in_layers[0], stack.out_layers[0]), (stack.in_layers[2], stack.out_layers[3])
    return [*spatial, *_over_time(norms, convs, blended)]


def frame_by_frame(sweeps: Sequence[Sweep]) -> tuple[Sequence[Sweep], Sequence[Sweep], Sequence[Sweep]]:
    """The sweeps before those at the end in which each frame is by itself, these, and the last one where it is not.

    A level on which no frame sees another need not be held for all frames at once; in SVD's the last convolution, of
    three channels, does see the others.
    """
    end = len(sweeps) if sweeps[-1].alone else len(sweeps) - 1
    start = next((i + 1 for i in range(end - 1, -1, -1) if not sweeps[i].alone), 0)
    return sweeps[:start], sweeps[start:end], sweeps[end:]


Call = Callable[[nn.Module, Tensor], Tensor]


def _as_it_is(module: nn.Module, x: Tensor) -> Tensor:
    """A host's modules see to their weights themselves."""
    return module(x)


def _residual(block: Any, buffer: str = MAIN, call: Call = _as_it_is) -> list[Sweep] | None:
    """`x + conv2(silu(norm2(conv1(silu(norm1(x))))))` on one buffer, x through a convolution where widths differ."""
    if isinstance(block, Idle):
        return []
    odd = (getattr(block, "upsample", None), getattr(block, "downsample", None), getattr(block, "conv_carry", None))
    if any(part is not None for part in odd) or getattr(block, "output_scale_factor", 1.0) != 1.0:
        return None
    named = (getattr(block, name, None) for name in ("conv_shortcut", "nin_shortcut", "conv_out"))
    shortcut = next((conv for conv in named if isinstance(conv, nn.Conv2d)), None)
    if shortcut is not None and shortcut.kernel_size != (1, 1):
        return None

    def enter(x: Tensor, beside: Tensor | None, at: At) -> Tensor:
        return call(block.conv1, x)

    def leave(h: Tensor, x: Tensor | None, at: At) -> Tensor:
        assert x is not None
        return call(block.conv2, h).add_(x if shortcut is None else call(shortcut, x))

    return [
        Sweep(enter, buffer, BRANCH, norm=block.norm1, reach=1, alone=buffer == MAIN),
        Sweep(leave, BRANCH, buffer, beside=buffer, norm=block.norm2, reach=1, last=(BRANCH,), alone=buffer == MAIN),
    ]


def _over_time(
    norms: Sequence[nn.GroupNorm], convs: Sequence[nn.Module], mixed: Callable[[Tensor, Tensor], Tensor]
) -> list[Sweep]:
    """A residual block over the frames at each pixel, mixed with what went in."""

    def enter(x: Tensor, beside: Tensor | None, at: At) -> Tensor:
        return convolved_over_time(convs[0], x)

    def leave(h: Tensor, x: Tensor | None, at: At) -> Tensor:
        assert x is not None
        return mixed(x, x + convolved_over_time(convs[1], h))

    return [
        Sweep(enter, MAIN, BRANCH, norm=norms[0], over_time=True),
        Sweep(leave, BRANCH, MAIN, beside=MAIN, norm=norms[1], over_time=True, last=(BRANCH,)),
    ]


def _out(op: DecoderOp) -> list[Sweep]:
    """The picture: the last norm and the convolution after it; then that over time, where there is one."""
    norm, conv, *over_time = op.modules
    assert isinstance(norm, nn.GroupNorm)
    picture = Sweep(lambda x, beside, at: conv(x), norm=norm, reach=op.reach, alone=True)
    return [picture, *(Sweep(lambda x, beside, at, conv=conv: convolved_over_time(conv, x)) for conv in over_time)]


def fuse_sweeps(layer: FuseLayer, features: str, w: float) -> list[Sweep]:
    """CFW's `x + w C([F_e; x])`, with F_e in the buffer `features`."""
    entering, leaving = (_residual(part, FUSED, run_like) for part in (layer.encode_enc_1, layer.encode_enc_3))
    assert entering is not None and leaving is not None

    def joined(x: Tensor, encoded: Tensor | None, at: At) -> Tensor:
        assert encoded is not None
        return torch.cat([encoded.to(x), x], 1)

    def added(x: Tensor, change: Tensor | None, at: At) -> Tensor:
        assert change is not None
        return x + w * change

    dense = [
        Sweep(lambda x, beside, at, block=block: run_like(block, x), FUSED, FUSED, reach=_reach(block))
        for block in layer.encode_enc_2
    ]
    return [
        Sweep(joined, MAIN, FUSED, beside=features, last=(features,)),
        *entering,
        *dense,
        *leaving,
        Sweep(added, MAIN, MAIN, beside=FUSED, last=(FUSED,)),
    ]


def _reach(block: nn.Module) -> int:
    return sum(max(part.kernel_size) // 2 for part in block.modules() if isinstance(part, nn.Conv2d))
