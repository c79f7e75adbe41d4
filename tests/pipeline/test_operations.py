"""Operations counted while a tile runs, and of other tiles, against torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vsr_ops.backbones.svd import SVD
from vsr_ops.pipeline.operations import Operations
from vsr_ops.sampling.tiling import TileSize


@torch.no_grad()
def run(model: SVD, tile: TileSize) -> None:
    x = torch.zeros(tile.frames, 4, tile.height, tile.width)
    model.denoise(x, 1.0, x, model.context(None), tile.frames)


def torchs(model: SVD, tile: TileSize) -> int:
    # Attention in one piece is not counted on a CPU; in its matrix products it is.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run(model, tile)
    return counter.get_total_flops()


@pytest.mark.parametrize("tile", [TileSize(16, 16, 2), TileSize(8, 16, 6)])
def test_a_tile_of_another_size_takes_what_torch_counts(tiny: SVD, tile: TileSize) -> None:
    counted, operations = TileSize(8, 8, 1), Operations(tiny.unet)
    with operations.counted(counted):
        run(tiny, counted)
    with operations.counted(tile):  # the first alone is counted
        run(tiny, tile)
    assert operations.of(tile) / operations.of(counted) == pytest.approx(
        torchs(tiny, tile) / torchs(tiny, counted), rel=0.03
    )
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.unet.modules())
