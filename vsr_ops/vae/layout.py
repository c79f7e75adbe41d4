"""A VAE's encoder and decoder as steps, and which part of the picture each step needs for a part of its output.

Positions are whole pixels of the picture, halved at each level; nothing here touches a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import SettingError
from ..modules.idle import Idle
from ..modules.windows import Place
from ..sampling.tiling import Span
from .doubling import upsampling

Box = tuple[Span, Span]
"""Rows and columns."""
RUNS = 4  # of latents along each axis that the mosaic is made of


@dataclass(frozen=True)
class DecoderOp:
    """One stage of an encoder or decoder, on frames `(t, c, h, w)` of one scene.

    `modules` are those whose reach and norms count; `resize` is 1 where it doubles the picture, -1 where it halves it.
    With a `window`, values matter in whole windows of so many pixels of the frame's grid. `placed` takes the place of
    `run` where it must be known where the features lie (None: they are the whole picture's), which part of the picture
    is theirs to gather from, and the frames' compression levels. `guided` takes its place where the encoder's features
    of the reference go in, over the same part, and where that lies. Beyond the whole windows, `before` pixels more are
    needed of the input. `sweeps` says how the step is run without doing any of it twice; None: as its modules tell.
    """

    name: str
    modules: tuple[nn.Module, ...]
    run: Callable[[Tensor], Tensor]
    level: int
    resize: int = 0
    residual: bool = False
    guided: Callable[[Tensor, Tensor, Place | None, Box | None], Tensor] | None = None
    window: int = 1
    before: int = 0
    placed: Callable[[Tensor, Place | None, Box | None, Tensor | None], Tensor] | None = None
    sweeps: Callable[[], list[Any]] | None = None

    @property
    def reach(self) -> int:
        """How many pixels away, at the finer of its two resolutions, a value can matter."""
        return sum(max(convolution.kernel_size[-2:]) // 2 for convolution in self._parts(nn.Conv2d, nn.Conv3d))

    @property
    def norms(self) -> list[nn.GroupNorm]:
        """Its group norms."""
        return self._parts(nn.GroupNorm)

    def _parts(self, *kinds: type[nn.Module]) -> list[Any]:
        return [part for module in self.modules for part in module.modules() if isinstance(part, kinds)]


# --- The autoencoders that are known --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How one project's autoencoders are built: is a decoder its, and the steps of decoder and encoder."""

    fits: Callable[[Any], bool]
    decoder: Callable[[Any], list[DecoderOp]]
    encoder: Callable[[Any], list[DecoderOp]]


def is_temporal(module: nn.Module) -> bool:
    """Whether frames see each other in it."""
    return any(isinstance(part, nn.Conv3d) for part in module.modules())


def _end(norm: nn.Module, out: Sequence[nn.Module], run: Callable[[Tensor], Tensor]) -> DecoderOp:
    return DecoderOp("out", (norm, *out), lambda x: run(F.silu(norm(x))), 0)


def _residual(name: str, block: nn.Module, run: Callable[[Tensor], Tensor], level: int) -> DecoderOp:
    """A step of diffusers', which stays where its block adds nothing: modules beside it go by its name."""
    sweeps: Callable[[], list[Any]] | None = list[Any] if isinstance(block, Idle) else None
    return DecoderOp(name, (block,), run, level, residual=True, sweeps=sweeps)


def _diffusers_decoder(decoder: Any) -> list[DecoderOp]:
    temporal = is_temporal(decoder)

    def residual(name: str, block: nn.Module, level: int) -> DecoderOp:
        def run(x: Tensor) -> Tensor:
            return block(x, None, x.new_zeros(1, x.shape[0])) if temporal else block(x, None)

        return _residual(name, block, run, level)

    top = len(decoder.up_blocks) - 1
    steps = [DecoderOp("in", (decoder.conv_in,), decoder.conv_in, top)]
    middle = decoder.mid_block
    steps.append(residual("mid_0", middle.resnets[0], top))
    for index, (attention, block) in enumerate(zip(middle.attentions, middle.resnets[1:], strict=False)):
        if attention is not None:
            steps.append(DecoderOp(f"mid_attention_{index}", (attention,), attention, top))
        steps.append(residual(f"mid_{index + 1}", block, top))
    for place, up in enumerate(decoder.up_blocks):
        level = top - place
        steps += [residual(f"up_{level}_{index}", block, level) for index, block in enumerate(up.resnets)]
        for upsampler in up.upsamplers or ():
            steps.append(DecoderOp(f"up_{level}", (upsampler,), upsampling(upsampler), level, resize=1))

    def out(x: Tensor) -> Tensor:
        x = decoder.conv_out(x)
        return decoder.time_conv_out(x.transpose(0, 1)[None])[0].transpose(0, 1) if temporal else x

    last = (decoder.conv_out, decoder.time_conv_out) if temporal else (decoder.conv_out,)
    return [*steps, _end(decoder.conv_norm_out, last, out)]


def _diffusers_encoder(encoder: Any) -> list[DecoderOp]:
    steps = [DecoderOp("in", (encoder.conv_in,), encoder.conv_in, 0)]
    for level, down in enumerate(encoder.down_blocks):
        for index, block in enumerate(down.resnets):
            steps.append(_residual(f"down_{level}_{index}", block, partial(block, temb=None), level))
        for downsampler in down.downsamplers or ():
            steps.append(DecoderOp(f"down_{level}", (downsampler,), downsampler, level, resize=-1))
    return steps


def _ldm_decoder(decoder: Any) -> list[DecoderOp]:
    def residual(name: str, block: nn.Module, level: int) -> DecoderOp:
        return DecoderOp(name, (block,), lambda x: block(x, None), level, residual=True)

    top = len(decoder.up) - 1
    steps = [
        DecoderOp("in", (decoder.conv_in,), decoder.conv_in, top),
        residual("mid_0", decoder.mid.block_1, top),
        DecoderOp("mid_attention_0", (decoder.mid.attn_1,), decoder.mid.attn_1, top),
        residual("mid_1", decoder.mid.block_2, top),
    ]
    for level in range(top, -1, -1):
        up = decoder.up[level]
        steps += [residual(f"up_{level}_{index}", block, level) for index, block in enumerate(up.block)]
        if level:
            steps.append(DecoderOp(f"up_{level}", (up.upsample,), up.upsample, level, resize=1))
    return [*steps, _end(decoder.norm_out, (decoder.conv_out,), decoder.conv_out)]


def _ldm_encoder(encoder: Any) -> list[DecoderOp]:
    steps = [DecoderOp("in", (encoder.conv_in,), encoder.conv_in, 0)]
    for level, down in enumerate(encoder.down):
        for index, block in enumerate(down.block):
            steps.append(DecoderOp(f"down_{level}_{index}", (block,), partial(block, temb=None), level, residual=True))
        if level < len(encoder.down) - 1:
            steps.append(DecoderOp(f"down_{level}", (down.downsample,), down.downsample, level, resize=-1))
    return steps


def _plain(blocks: Any, attention: str) -> bool:
    return not any(getattr(block, attention, None) for block in blocks)


#: The host's and StableSR's decoders are LDM's; frames are a batch, and its video decoder takes the batch as one video.
LAYOUTS: dict[str, Layout] = {
    "diffusers": Layout(
        lambda d: isinstance(getattr(d, "conv_norm_out", None), nn.GroupNorm) and _plain(d.up_blocks, "attentions"),
        _diffusers_decoder,
        _diffusers_encoder,
    ),
    "ldm": Layout(
        lambda d: hasattr(d, "up") and isinstance(d.conv_in, nn.Conv2d) and _plain(d.up, "attn"),
        _ldm_decoder,
        _ldm_encoder,
    ),
}


def layout_of(vae: Any) -> Layout:
    """The layout of an autoencoder; raises SettingError with its class and the known layouts for an unknown one."""
    for layout in LAYOUTS.values():
        if layout.fits(vae.decoder):
            return layout
    name = type(vae.decoder).__name__
    raise SettingError(
        f"the VAE's decoder is a {name}, built like none of {', '.join(LAYOUTS)}: expected Stable Diffusion's or SVD's"
    )


def alone_from(steps: Sequence[DecoderOp]) -> int:
    """The first of a decoder's last steps in which no frame sees another, but for the convolution at the very end."""
    together = [index for index, step in enumerate(steps[:-1]) if any(is_temporal(part) for part in step.modules)]
    return together[-1] + 1 if together else 0


def is_known(vae: Any) -> bool:
    """Whether an autoencoder is of a known layout."""
    decoder = getattr(vae, "decoder", None)
    return decoder is not None and any(layout.fits(decoder) for layout in LAYOUTS.values())


def cell_of(vae: Any) -> int:
    """Picture pixels of one latent along each side."""
    return 1 << layout_of(vae).decoder(vae.decoder)[0].level


def backbone_of(vae: Any) -> str:
    """What modules beside its decoder must have been trained for: svd where its decoder sees time, else sd."""
    return "svd" if is_temporal(vae.decoder) else "sd"


def output_widths(vae: Any) -> dict[str, int]:
    """Channels that each level of the decoder gives, by the names that CAPM has for them, deepest first."""
    steps = [step for step in layout_of(vae).decoder(vae.decoder) if step.residual]
    return {output_name(steps[0].level, step): _width(step) for step in steps if step.name.startswith("up_")}


def output_name(top: int, step: DecoderOp) -> str:
    """CAPM's name of a decoder's level, which is diffusers', by any step of it; `top` is the deepest."""
    return f"up_blocks.{top - step.level}"


def residual_widths(vae: Any) -> dict[str, int]:
    """Channels that each residual block of the decoder gives, by the names of STAM's blocks, in running order."""
    return {step.name: _width(step) for step in layout_of(vae).decoder(vae.decoder) if step.residual}


def level_widths(vae: Any) -> dict[int, int]:
    """Channels at the end of each level, 0 the picture's resolution, the same in encoder and decoder."""
    return {step.level: _width(step) for step in layout_of(vae).encoder(vae.encoder) if step.residual}


def _width(step: DecoderOp) -> int:
    (block,) = step.modules
    return block.channels if isinstance(block, Idle) else int(step.norms[-1].num_channels)


# --- Where tiles lie ------------------------------------------------------------------------------------------------


class Reaching(Protocol):
    """What says how much of its input a part of its output needs."""

    @property
    def reach(self) -> int: ...
    @property
    def resize(self) -> int: ...
    @property
    def window(self) -> int: ...
    @property
    def before(self) -> int: ...


def needed_span(step: Reaching, out: Span, extent: int) -> Span:
    """What part of a step's input, `extent` long, `out` of its output depends on."""
    if step.resize > 0:
        start, stop = (out.start - step.reach) // 2, -(-(out.stop + step.reach) // 2)
    elif step.resize < 0:
        # Padded at the end alone: the output at i sees 2i, 2i+1 and 2i+2.
        start, stop = 2 * out.start, 2 * out.stop + 1
    else:
        start, stop = out.start - step.reach, out.stop + step.reach
        start, stop = start // step.window * step.window, -(-stop // step.window) * step.window
        start, stop = start - step.before, stop + step.before
    return Span(max(start, 0), min(stop, extent))


def resized(span: Span, resize: int) -> Span:
    """Where a part lies after a step that doubles (1) or halves (-1) the picture."""
    if resize > 0:
        return Span(2 * span.start, 2 * span.stop)
    return Span(span.start // 2, span.stop // 2) if resize < 0 else span


def _plan(steps: Sequence[DecoderOp], out: Span, extent: int, taps: Sequence[tuple[int, Span]]) -> list[Span]:
    """One axis: the part of each step's input that is needed, then `out` itself. `extent` is the picture's length.

    `taps` are levels, and parts that must be there after the last residual block of each.
    """
    plan = [out]
    for step in reversed(steps):
        length = extent >> step.level
        span = needed_span(step, plan[0], length)
        if step.resize < 0:
            for tap in (tap for level, tap in taps if level == step.level):
                span = Span(min(span.start, tap.start), max(span.stop, tap.stop))
            # A halved picture begins at an even pixel.
            span = Span(span.start - span.start % 2, span.stop)
        plan.insert(0, span)
    return plan


def crop(x: Tensor, have: Box, want: Box) -> Tensor:
    """The part `want` of what lies at `have`; a view."""
    rows, cols = (slice(w.start - h.start, w.stop - h.start) for h, w in zip(have, want, strict=True))
    return x[..., rows, cols]


@dataclass(frozen=True)
class Tap:
    """A part of the encoder's features after the last residual block of a level, in that level's pixels."""

    level: int
    box: Box


def needed_boxes(steps: Sequence[DecoderOp], out: Box, extent: tuple[int, int], taps: Iterable[Tap] = ()) -> list[Box]:
    """Rows and columns that every step needs of its input for `out`, then `out`; `extent` is the picture's size."""
    rows, cols = (
        _plan(steps, out[axis], extent[axis], [(tap.level, tap.box[axis]) for tap in taps]) for axis in (0, 1)
    )
    return list(zip(rows, cols, strict=True))


def axis_parts(side: int, tile: int, cell: int) -> list[Span]:
    """An axis of `side` latents, as pixels, in parts of nearly one size, none longer than `tile` latents."""
    count = -(-side // tile)
    edges = [side * i // count * cell for i in range(count + 1)]
    return [Span(start, stop) for start, stop in pairwise(edges)]


def mosaic_index(side: int, tile: int) -> Tensor:
    """Which of an axis' latents the mosaic holds: all, or evenly spread runs that fill a tile."""
    if side <= tile:
        return torch.arange(side)
    run = -(-tile // RUNS)
    count = tile // run
    starts = [(side - run) * i // max(count - 1, 1) for i in range(count)]
    return torch.cat([torch.arange(start, start + run) for start in starts])


def magnified(index: Tensor, cell: int) -> Tensor:
    """The pixels of these latents along one axis."""
    return (index[:, None] * cell + torch.arange(cell)).flatten()


def pick(x: Tensor, index: Sequence[Tensor]) -> Tensor:
    """These rows and columns of `(..., h, w)`."""
    rows, cols = (i.to(x.device) for i in index)
    return x[..., rows, :][..., cols]


def at_level(box: Box, level: int) -> Box:
    """The same part of the picture, in the pixels of a level."""
    rows, cols = (Span(span.start >> level, span.stop >> level) for span in box)
    return rows, cols
