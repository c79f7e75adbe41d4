"""A node makes its video once: beside the result there is no second copy of it."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.common import peak_bytes

from .conftest import NAME

FRAMES, SIDE = 60, 64


def image(frames: int, side: int, seed: int = 0) -> Tensor:
    return torch.rand(frames, side, side, 3, generator=torch.Generator().manual_seed(seed))


def inputs(node: str, frames: int, lite: Any) -> tuple[Any, ...]:
    """What a node is given that makes a video of so many frames."""
    large, other = image(frames, SIDE), image(frames, SIDE, 1)
    if node == "VSRUpscaleLR":
        return image(frames, SIDE // 4), 4.0, 0, 0, "bicubic"
    if node == "VSRColorMatch":
        return large, other, "adain", 1.0, 0.0
    if node == "VSRCompare":
        return large, other, "wipe", "", "", "", 0.5, 8.0
    if node == "VSRDecode":
        return lite[1], {"samples": torch.randn(frames, 4, SIDE // 8, SIDE // 8)}, 2
    module = importlib.import_module(f"{NAME}.vsr_ops.modules.refiner")
    refiner = module.Refiner(module.RefinerShape(width=2, blocks=1, mixes=1))
    torch.nn.init.normal_(refiner.leave.weight, std=0.1)
    return large, other, refiner, 0.0


@pytest.mark.parametrize("node", ["VSRUpscaleLR", "VSRColorMatch", "VSRCompare", "VSRRefine", "VSRDecode"])
def test_beside_its_result_a_node_has_no_copy_of_the_video(nodes: dict[str, Any], lite: Any, node: str) -> None:
    """A chunk is under way whatever the length: what grows with the video is the result alone."""
    peaks: list[int] = []
    for frames in (FRAMES // 2, FRAMES):
        given, made = inputs(node, frames, lite), list[Tensor]()

        def run(given: tuple[Any, ...] = given, made: list[Tensor] = made) -> None:
            made.append(nodes[node].execute(*given).args[0])

        peaks.append(peak_bytes(run, torch.device("cpu")))
        assert made[0].is_contiguous() and made[0].shape == (frames, SIDE, SIDE, 3)
    assert peaks[1] - peaks[0] <= 1.25 * FRAMES // 2 * SIDE * SIDE * 3 * 4
