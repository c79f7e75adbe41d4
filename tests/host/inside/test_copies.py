"""A node makes its video once: beside the result there is no second copy of it, in float32 and in half of it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.common import peak_bytes

from .conftest import NAME

FRAMES, SIDE = 60, 64


def image(side: int, seed: int = 0) -> Tensor:
    return torch.rand(FRAMES, side, side, 3, generator=torch.Generator().manual_seed(seed))


def chain(nodes: dict[str, Any], lite: Any) -> dict[str, Callable[[], Tensor]]:
    """Nodes from pictures to pictures, and from a latent."""
    large, other = image(SIDE), image(SIDE, 1)
    refiner = importlib.import_module(f"{NAME}.vsr_ops.modules.refiner")
    small = refiner.Refiner(refiner.RefinerShape(width=2, blocks=1, mixes=1))
    torch.nn.init.normal_(small.leave.weight, std=0.1)
    latent = {"samples": torch.randn(FRAMES, 4, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(0))}
    calls = {
        "VSRUpscaleLR": (image(SIDE // 4), 4.0, 0, 0, "bicubic"),
        "VSRColorMatch": (large, other, "adain", 1.0, 0.0),
        "VSRRefine": (large, other, small, 0.0),
        "VSRCompare": (large, other, "wipe", "", "", "", 0.5, 8.0),
        "VSRDecode": (lite[1], latent, 2),
    }
    return {name: lambda name=name, given=given: nodes[name].execute(*given).args[0] for name, given in calls.items()}


@pytest.mark.parametrize(
    ("node", "spare"),
    # What is under way: a frame or a chunk of a few, each in several copies; a refiner's or decoder's activations.
    [("VSRUpscaleLR", 0.5), ("VSRColorMatch", 0.25), ("VSRCompare", 0.25), ("VSRRefine", 0.9), ("VSRDecode", 3.0)],
)
def test_beside_its_result_a_node_has_no_copy_of_the_video(
    nodes: dict[str, Any], lite: Any, node: str, spare: float
) -> None:
    run, made = chain(nodes, lite)[node], list[Tensor]()
    run()
    peak = peak_bytes(lambda: made.append(run()), torch.device("cpu"))
    assert made[0].is_contiguous() and made[0].shape == (FRAMES, SIDE, SIDE, 3)
    assert peak <= (1 + spare) * made[0].nbytes, f"{peak / made[0].nbytes:.2f} times the result"


def test_decoding_takes_no_more_beside_a_longer_result(nodes: dict[str, Any], lite: Any) -> None:
    """The decoder's activations are a chunk's: what grows with the video is the video."""
    peaks: list[int] = []
    for frames in (20, 60):
        latent = {"samples": torch.randn(frames, 4, 8, 8, generator=torch.Generator().manual_seed(0))}
        made: list[Tensor] = []
        peaks.append(peak_bytes(lambda: made.append(nodes["VSRDecode"].execute(lite[1], latent, 2).args[0]), CPU))  # noqa: B023
    assert peaks[1] - peaks[0] <= 1.3 * 40 * SIDE * SIDE * 3 * 4


CPU = torch.device("cpu")
