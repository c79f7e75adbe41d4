"""A VAE's encoder and decoder as steps. Nothing here touches a weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import SettingError
from ..modules.idle import Idle
from ..modules.windows import Place
from .doubling import upsampling
from .places import Box


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
    """How one project's autoencoders are built: is a decoder its, and the steps of decoder and encoder, the encoder's
    down to its deepest level; is an encoder its, and the steps from there to its end."""

    fits: Callable[[Any], bool]
    decoder: Callable[[Any], list[DecoderOp]]
    encoder: Callable[[Any], list[DecoderOp]]
    fits_encoder: Callable[[Any], bool]
    deepest: Callable[[Any], list[DecoderOp]]


def is_temporal(module: nn.Module) -> bool:
    """Whether frames see each other in it."""
    return any(isinstance(part, nn.Conv3d) for part in module.modules())


Residual = Callable[[str, Any, int], DecoderOp]
"""A residual block as a step of a name and level."""


def _end(norm: nn.Module, out: Sequence[nn.Module], run: Callable[[Tensor], Tensor], level: int = 0) -> DecoderOp:
    return DecoderOp("out", (norm, *out), lambda x: run(F.silu(norm(x))), level)


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
    steps += _diffusers_middle(decoder.mid_block, residual, top)
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


def _diffusers_middle(middle: Any, residual: Residual, level: int) -> list[DecoderOp]:
    steps = [residual("mid_0", middle.resnets[0], level)]
    for index, (attention, block) in enumerate(zip(middle.attentions, middle.resnets[1:], strict=False)):
        if attention is not None:
            steps.append(DecoderOp(f"mid_attention_{index}", (attention,), attention, level))
        steps.append(residual(f"mid_{index + 1}", block, level))
    return steps


def _diffusers_encoder(encoder: Any) -> list[DecoderOp]:
    steps = [DecoderOp("in", (encoder.conv_in,), encoder.conv_in, 0)]
    for level, down in enumerate(encoder.down_blocks):
        for index, block in enumerate(down.resnets):
            steps.append(_encoders(f"down_{level}_{index}", block, level))
        for downsampler in down.downsamplers or ():
            steps.append(DecoderOp(f"down_{level}", (downsampler,), downsampler, level, resize=-1))
    return steps


def _encoders(name: str, block: nn.Module, level: int) -> DecoderOp:
    return _residual(name, block, partial(block, temb=None), level)


def _diffusers_deepest(encoder: Any) -> list[DecoderOp]:
    level, out = len(encoder.down_blocks) - 1, encoder.conv_out
    return [*_diffusers_middle(encoder.mid_block, _encoders, level), _end(encoder.conv_norm_out, (out,), out, level)]


def _ldm_decoder(decoder: Any) -> list[DecoderOp]:
    def residual(name: str, block: nn.Module, level: int) -> DecoderOp:
        return DecoderOp(name, (block,), lambda x: block(x, None), level, residual=True)

    top = len(decoder.up) - 1
    steps = [
        DecoderOp("in", (decoder.conv_in,), decoder.conv_in, top),
        *_ldm_middle(decoder.mid, residual, top),
    ]
    for level in range(top, -1, -1):
        up = decoder.up[level]
        steps += [residual(f"up_{level}_{index}", block, level) for index, block in enumerate(up.block)]
        if level:
            steps.append(DecoderOp(f"up_{level}", (up.upsample,), up.upsample, level, resize=1))
    return [*steps, _end(decoder.norm_out, (decoder.conv_out,), decoder.conv_out)]


def _ldm_middle(middle: Any, residual: Residual, level: int) -> list[DecoderOp]:
    return [
        residual("mid_0", middle.block_1, level),
        DecoderOp("mid_attention_0", (middle.attn_1,), middle.attn_1, level),
        residual("mid_1", middle.block_2, level),
    ]


def _ldm_encoder(encoder: Any) -> list[DecoderOp]:
    steps = [DecoderOp("in", (encoder.conv_in,), encoder.conv_in, 0)]
    for level, down in enumerate(encoder.down):
        for index, block in enumerate(down.block):
            steps.append(_encoders(f"down_{level}_{index}", block, level))
        if level < len(encoder.down) - 1:
            steps.append(DecoderOp(f"down_{level}", (down.downsample,), down.downsample, level, resize=-1))
    return steps


def _ldm_deepest(encoder: Any) -> list[DecoderOp]:
    level, out = len(encoder.down) - 1, encoder.conv_out
    return [*_ldm_middle(encoder.mid, _encoders, level), _end(encoder.norm_out, (out,), out, level)]


def _plain(blocks: Any, attention: str) -> bool:
    return not any(getattr(block, attention, None) for block in blocks)


#: The host's and StableSR's decoders are LDM's; frames are a batch, and its video decoder takes the batch as one video.
LAYOUTS: dict[str, Layout] = {
    "diffusers": Layout(
        lambda d: isinstance(getattr(d, "conv_norm_out", None), nn.GroupNorm) and _plain(d.up_blocks, "attentions"),
        _diffusers_decoder,
        _diffusers_encoder,
        lambda e: isinstance(getattr(e, "conv_norm_out", None), nn.GroupNorm) and _plain(e.down_blocks, "attentions"),
        _diffusers_deepest,
    ),
    "ldm": Layout(
        lambda d: hasattr(d, "up") and isinstance(d.conv_in, nn.Conv2d) and _plain(d.up, "attn"),
        _ldm_decoder,
        _ldm_encoder,
        lambda e: hasattr(e, "down") and isinstance(e.conv_in, nn.Conv2d) and _plain(e.down, "attn"),
        _ldm_deepest,
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


def encoding_steps(vae: Any) -> list[DecoderOp] | None:
    """An autoencoder's encoder whole, from a picture in [-1, 1] to its latents' distribution; None where it is built in
    no way that is known here."""
    encoder = getattr(vae, "encoder", None)
    layout = next((layout for layout in LAYOUTS.values() if layout.fits_encoder(encoder)), None)
    if encoder is None or layout is None:
        return None
    steps = [*layout.encoder(encoder), *layout.deepest(encoder)]
    quantise = getattr(vae, "quant_conv", None)
    if quantise is None or isinstance(quantise, nn.Identity):
        return steps
    return [*steps, DecoderOp("quant", (quantise,), quantise, steps[-1].level)]


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
