"""What decoding in tiles is said to take, against what it takes; and the tile that fits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder

from benchmarks.common import peak_bytes
from tests.conftest import randomise
from tests.support.small_vaes import noise, pictures
from vsr_ops.modules.capm import CAPM, SVD_VAE, CAPMShape
from vsr_ops.modules.cfw import CFW, CFWShape
from vsr_ops.modules.stam import STAM, STAMShape
from vsr_ops.vae.budget import SHARE, SMALLEST, decoder_bytes, fitting_tile, modules_bytes, tile_side
from vsr_ops.vae.decoder_modules import DecoderModules
from vsr_ops.vae.layout import residual_widths
from vsr_ops.vae.stream import stream_decode

FRAMES, SIDES = 3, (16, 20)


@pytest.fixture(scope="module")
def vae() -> Any:
    """With SVD's proportions: each level half as wide as the one below, but for the deepest."""
    model: Any = AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 4,
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=2,
        latent_channels=4,
    )
    randomise(model, 2)
    return model.eval()


def modules_of(vae: Any, name: str) -> DecoderModules:
    torch.manual_seed(0)
    made: dict[str, Any] = {
        "none": {},
        "stam": {"stam": STAM(STAMShape(tuple(residual_widths(vae).items()), backbone="svd"))},
        "cfw": {"cfw": CFW(CFWShape((1, 2), (64, 128), backbone="svd"))},
        "capm": {"capm": CAPM(CAPMShape(SVD_VAE, {"up_blocks.2": 64, "up_blocks.3": 32}))},
    }[name]
    for module in made.values():
        randomise(module, 3)
        module.eval().requires_grad_(False)
    return DecoderModules(**made)


@pytest.mark.parametrize("name", ["none", "stam", "cfw", "capm"])
def test_it_is_no_less_than_is_taken_and_not_many_times_more(vae: Any, name: str) -> None:
    modules, z = modules_of(vae, name), noise(FRAMES, 4, *SIDES)
    seen = pictures(FRAMES, 3, 8 * SIDES[0], 8 * SIDES[1])
    taken = peak_bytes(lambda: list(stream_decode(vae, z, (), modules, seen)), torch.device("cpu"))
    said = decoder_bytes(vae, FRAMES, SIDES, 4) + modules_bytes(vae, modules, FRAMES, SIDES, 4)
    print(f"{name}: taken {taken / 2**20:.1f} MiB, said {said / 2**20:.1f}")
    assert taken <= said <= 3 * taken


@pytest.mark.parametrize("name", ["stam", "cfw", "capm"])
def test_it_grows_with_frames_area_and_precision(vae: Any, name: str) -> None:
    modules = modules_of(vae, name)
    one = modules_bytes(vae, modules, 1, (16, 16), 4)
    assert one > 0
    assert modules_bytes(vae, modules, 5, (16, 16), 4) == 5 * one
    assert modules_bytes(vae, modules, 1, (32, 16), 4) > one
    # CAPM computes in float32 whatever the decoder does.
    assert modules_bytes(vae, modules, 1, (16, 16), 2) == (one if name == "capm" else one / 2)
    assert modules_bytes(vae, DecoderModules(), 1, (16, 16), 4) == 0


def test_stam_of_full_size_svd_is_in_the_plan() -> None:
    """14 frames of a tile of 64 latents: STAM's last level alone takes several tensors of more than a gigabyte."""
    with torch.device("meta"):
        full: Any = AutoencoderKLTemporalDecoder(
            block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=2
        )
        modules = DecoderModules(stam=STAM(STAMShape(tuple(residual_widths(full).items()), backbone="svd")))
    sides = [tile_side(64, modules)] * 2
    level = 14 * 256 * (8 * sides[0]) ** 2 * 2
    assert modules_bytes(full, modules, 14, sides, 2) >= level > 2.8e9


def test_the_tile_is_the_largest_that_fits() -> None:
    def needed(tile: int) -> float:
        return float(tile**2)

    assert fitting_tile(64, needed, 64**2 / SHARE) == 64
    for free in (64**2 / SHARE - 1, 2000.0, 500.0):
        tile = fitting_tile(64, needed, free)
        assert tile % 8 == 0 and needed(tile) <= SHARE * free < needed(tile + 8)
    assert fitting_tile(64, needed, 1.0) == SMALLEST
    assert fitting_tile(8, needed, 1.0) == 8
