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
