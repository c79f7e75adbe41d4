"""Real but small autoencoders, and what is put through them, for the tests of decoding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from tests.conftest import randomise
from vsr_ops.vae.decoder_modules import DecoderModules
from vsr_ops.vae.stream import Streaming, stream_decode

#: Three levels: a latent is 4x4 pixels.
WIDTHS, CELL = (8, 8, 16), 4


def picture_vae(seed: int = 2) -> Any:
    """Frame by frame, as Stable Diffusion's."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    )
    randomise(vae, seed)
    return vae.eval()


def video_vae() -> Any:
    """With a decoder whose frames see each other, as SVD's."""
    from diffusers import AutoencoderKLTemporalDecoder

    vae = AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 3,
        block_out_channels=(32, 32, 32),
        layers_per_block=1,
        latent_channels=4,
    )
    randomise(vae, 2)
    return vae.eval()


class _Block(nn.Module):
    """LDM's residual block."""

    def __init__(self, given: int, made: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, given), nn.Conv2d(given, made, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(4, made), nn.Conv2d(made, made, 3, padding=1)
        self.nin_shortcut = nn.Identity() if given == made else nn.Conv2d(given, made, 1)

    def forward(self, x: Tensor, temb: None) -> Tensor:
        h = self.conv1(nn.functional.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(nn.functional.silu(self.norm2(h)))


class _Attention(nn.Module):
    """LDM's, of one head over the picture."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (each(h).flatten(2).transpose(1, 2) for each in (self.q, self.k, self.v))
        h = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class _Halving(nn.Module):
    """LDM's: padded at the end alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(nn.functional.pad(x, (0, 1, 0, 1)))


class LDMEncoder(nn.Module):
    """As Latent Diffusion's, and so StableSR's and the host's, name and order its parts."""

    def __init__(self, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        self.conv_in, self.down, self.mid = nn.Conv2d(3, widths[0], 3, padding=1), nn.ModuleList(), nn.Module()
        for level, width in enumerate(widths):
            down: Any = nn.Module()
            down.block, down.attn = nn.ModuleList([_Block(widths[max(level - 1, 0)], width)]), nn.ModuleList()
            if level < len(widths) - 1:
                down.downsample = _Halving(width)
            self.down.append(down)
        self.mid.block_1, self.mid.block_2 = _Block(widths[-1], widths[-1]), _Block(widths[-1], widths[-1])
        self.mid.attn_1 = _Attention(widths[-1])
        self.norm_out, self.conv_out = nn.GroupNorm(4, widths[-1]), nn.Conv2d(widths[-1], 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for down in self.down:
            for block in down.block:
                x = block(x, None)
            if hasattr(down, "downsample"):
                x = down.downsample(x)
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x, None)), None)
        return self.conv_out(nn.functional.silu(self.norm_out(x)))


def ldm_encoder(quantised: bool = True) -> Any:
    """An autoencoder's half, with LDM's convolution behind it or, as the original SVD, without."""
    vae: Any = nn.Module()
    vae.encoder, vae.quant_conv = LDMEncoder(), nn.Conv2d(8, 8, 1) if quantised else nn.Identity()
    randomise(vae, 4)
    return vae.eval()


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Latents that differ from place to place, so that a tile's statistics are not the picture's."""
    rng = torch.Generator().manual_seed(seed)
    slow = torch.randn(shape[0], shape[1], 3, 3, generator=rng)
    return nn.functional.interpolate(slow, shape[-2:], mode="bilinear") + 0.3 * torch.randn(shape, generator=rng)


def pictures(*shape: int, seed: int = 1) -> Tensor:
    """In [0, 1], likewise."""
    return noise(*shape, seed=seed).sigmoid()


def stream(
    vae: Any, z: Tensor, cuts: Sequence[int] = (), reference: Any = None, levels: Tensor | None = None, **named: Any
) -> Iterator[Tensor]:
    """`stream_decode` with the fields of its two records by name."""
    beside = {field.name: named.pop(field.name) for field in fields(DecoderModules) if field.name in named}
    return stream_decode(vae, z, cuts, DecoderModules(**beside), reference, levels, Streaming(**named))


def streamed(vae: Any, z: Tensor, *rest: Any, **named: Any) -> Tensor:
    return torch.stack(list(stream(vae, z, *rest, **named)))
