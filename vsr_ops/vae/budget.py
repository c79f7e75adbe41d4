"""Device memory that decoding in tiles takes, and the largest tile that fits: one truth for host and headless.

Estimates, from the widths and sizes of the decoder's stages: live copies of the largest activation, counted on the CPU
and rounded up (tests/vae/test_budget.py holds them against what is measured).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..modules.stam import POSITIONS
from ..system.memory import free_bytes
from .decoder_modules import DecoderModules
from .layout import DecoderOp, alone_from, layout_of, output_name

#: Latents around a tile that a decoder's convolutions reach, SD's and SVD's, and how many more CAPM's windows do.
MARGIN, CAPM_MARGIN = 8, 6
#: Activations of a stage's width alive at its peak: of the decoder's own, beside the float32 that norms scale in.
DECODER_COPIES = 6.0
#: Of STAM: what it is given, its strips, and these put together; beside them one strip's convolution, queries, keys and
#: values, and attention; of CFW: dense blocks, which keep all they made; of
#: CAPM, which computes in float32: the features, and tokens of a quarter of their width; of SATeCo, likewise: the
#: features, normalised, scaled and shifted, and TFA's queries, keys and values, turned and cut into windows.
STAM_COPIES, STRIP_COPIES, CFW_COPIES, CAPM_COPIES = 4.0, 12.0, 12.0, 6.0
SATECO_COPIES, TFA_COPIES = 8.0, 24.0
#: Of whole activations that are kept where every tile is computed once: what a sweep reads and what it writes.
#: CFW at its levels: the encoder's features, beside them the decoder's, both joined, and a branch.
KEPT_COPIES, KEPT_CFW_COPIES = 2.0, 5.0
#: Share of the free memory that they may take.
KEPT_SHARE = 0.5
#: Share of the free memory that a tile may take, the step of its side in latents, and the smallest that is tried.
SHARE, STEP, SMALLEST = 0.8, 8, 16


def tile_side(tile: int, modules: DecoderModules) -> int:
    """Latents a side of what goes through the decoder for a tile of `tile`, margins included."""
    return tile + 2 * (MARGIN + (0 if modules.capm is None else CAPM_MARGIN))


def _pixels(op: DecoderOp, top: int, sides: Sequence[int]) -> int:
    """Pixels of a stage's output, for `sides` in latents."""
    scale = 1 << (top - op.level + max(op.resize, 0))
    return sides[0] * scale * sides[1] * scale


def decoder_bytes(vae: Any, frames: int, sides: Sequence[int], itemsize: int) -> float:
    """What the decoder itself takes for `frames` that go together, of `sides` latents, at its widest stage."""
    ops = layout_of(vae).decoder(vae.decoder)
    widest = max(_pixels(op, ops[0].level, sides) * int(op.norms[0].num_channels) for op in ops if op.norms)
    return DECODER_COPIES * frames * widest * itemsize


def modules_bytes(vae: Any, modules: DecoderModules, frames: int, sides: Sequence[int], itemsize: int) -> float:
    """What the modules beside the decoder take at their peak, beyond the decoder's own."""
    ops = layout_of(vae).decoder(vae.decoder)
    top, acting = ops[0].level, modules.acting
    found = [0.0]
    for op in ops:
        pixels = frames * _pixels(op, top, sides)
        if acting.stam is not None and op.name in acting.stam.names:
            width = dict(acting.stam.shape.blocks)[op.name]
            strip = frames * min(pixels // frames, POSITIONS) * (acting.stam.shape.inner or width)
            found.append((STAM_COPIES * pixels * width + STRIP_COPIES * strip) * itemsize)
        if acting.cfw is not None and op.residual and op.level in acting.cfw.shape.levels:
            width = acting.cfw.shape.widths[acting.cfw.shape.levels.index(op.level)]
            found.append(CFW_COPIES * pixels * width * itemsize)
        if acting.capm is not None and op.residual:
            width = acting.capm.shape.widths.get(output_name(top, op), 0)
            found.append(CAPM_COPIES * pixels * width * 4)
        if acting.sateco is not None and op.residual and (name := output_name(top, op)) in acting.sateco.shape.widths:
            width, inner = acting.sateco.shape.widths[name], acting.sateco.shape.inner[name]
            found.append((SATECO_COPIES * width + TFA_COPIES * inner) * pixels * 4)
    return max(found)


def kept_bytes(vae: Any, modules: DecoderModules, frames: int, sides: Sequence[int], itemsize: int) -> float:
    """What whole activations take for `frames` that go together, of pictures of `sides` latents: where no frame sees
    another from some step to the picture, of one frame at a time there."""
    ops = layout_of(vae).decoder(vae.decoder)
    alone = _alone_from(ops, modules)
    copies = [KEPT_COPIES * _pixels(op, ops[0].level, sides) * _norm_width(op) for op in ops]
    found = [max((frames * value for value in copies[:alone]), default=0.0)]
    if alone < len(ops):
        # All frames wait before the first of these, and their pictures behind the last but one.
        found.append(found[0] + max(copies[alone:]) + 3.0 * frames * _pixels(ops[-1], ops[0].level, sides))
    fused = _fused_values(vae, modules, sides)
    found += [KEPT_CFW_COPIES * frames * value for value in fused]
    return itemsize * (max(found) + frames * sum(fused))


def encoding_bytes(steps: Sequence[DecoderOp], sides: Sequence[int], itemsize: int) -> float:
    """What whole activations take while an encoder's steps go over one picture of `sides` latents: what a sweep reads,
    what it writes, and a room more where a residual block widens."""
    top, width, held, found, third = steps[-1].level, 0, 0, [0], [0]
    acting = [step for step in steps if step.norms or not step.residual]
    for index, step in enumerate(acting):
        before, width = width, _made_width(step)
        made = (sides[0] * sides[1] << 2 * (top - step.level + min(step.resize, 0))) * width
        following = acting[index + 1] if index + 1 < len(acting) else None
        if following is not None and following.resize < 0 and not (step.norms or step.residual):
            continue  # the two are one sweep
        found.append(held + made)
        if step.residual and before != width:
            third.append(made)  # One as wide as what it is given writes over that.
        held = made
    return float(itemsize * (max(found) + max(third)))


def _made_width(step: DecoderOp) -> int:
    """Channels that a step of an encoder makes: of its last norm, or its convolution's."""
    if step.residual:
        return int(step.norms[-1].num_channels)
    made = [part for module in step.modules for part in module.modules() if isinstance(part, nn.Conv2d)]
    return int(made[-1].out_channels) if made else _norm_width(step)


def _norm_width(op: DecoderOp) -> int:
    return int(op.norms[0].num_channels) if op.norms else 0


def _alone_from(ops: Sequence[DecoderOp], modules: DecoderModules) -> int:
    """The first of the last steps in which neither the decoder nor a module beside it joins frames."""
    acting = modules.acting
    if acting.capm is not None:
        return len(ops)
    stam, levels = acting.stam, [level for level, _ in _taps(ops[0].level, modules)]
    beside = (
        i + 1 for i, op in enumerate(ops) if (stam and op.name in stam.names) or (op.residual and op.level in levels)
    )
    return max(alone_from(ops), *beside, 0)


def features_bytes(vae: Any, modules: DecoderModules, frames: int, sides: Sequence[int], itemsize: int) -> float:
    """Of that, what the encoder's features take that CFW mixes in and SATeCo is guided by."""
    return frames * itemsize * sum(_fused_values(vae, modules, sides))


def _fused_values(vae: Any, modules: DecoderModules, sides: Sequence[int]) -> list[int]:
    """Numbers in a frame's features, of each step that they go into."""
    top = layout_of(vae).decoder(vae.decoder)[0].level
    return [(sides[0] * sides[1] << 2 * (top - level)) * width for level, width in _taps(top, modules)]


def _taps(top: int, modules: DecoderModules) -> list[tuple[int, int]]:
    """Level and channels of what each step that is guided takes of the encoder; `top` is the deepest level."""
    cfw, sateco = modules.acting.cfw, modules.acting.sateco
    found = [] if cfw is None else list(zip(cfw.shape.levels, cfw.shape.widths, strict=True))
    taps = {} if sateco is None else sateco.shape.taps or {}
    return found + [(top - int(name.rpartition(".")[2]), width) for name, width in taps.items()]


def home_of_kept(needed: float, device: torch.device, allowed: float | None) -> torch.device | None:
    """Where whole activations of so many bytes are kept: on the device, else in the machine's memory, within `allowed`
    bytes or a share of what is free there; None where there is no room."""
    for home in dict.fromkeys((device, torch.device("cpu"))):
        if needed <= (KEPT_SHARE * free_bytes(home) if allowed is None else allowed):
            return home
    return None


def fitting_tile(tile: int, needed: Callable[[int], float], free: float) -> int:
    """The largest tile, `tile` or smaller in steps of 8 latents, whose `needed` bytes are within a share of `free`; 16
    where none is. Exact tiles give one picture whatever their size."""
    while tile > SMALLEST and needed(tile) > SHARE * free:
        tile = max(SMALLEST, tile - STEP)
    return tile
