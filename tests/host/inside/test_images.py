"""IMAGEs as hosts hand them on: float32, float16 and bfloat16, and a little outside [0, 1] where they were resized."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from .conftest import part
from .node_values import IMAGE_INPUTS, IMAGES, values_for
from .wiring import refused

HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture(scope="session")
def small(wired: Any) -> Any:
    """One tile of 4 frames."""
    return part(wired, 4, 16, 16)


def given(nodes: dict[str, Any], lite: Any, small: Any, node: str) -> dict[str, Any]:
    """What a node is run with: little work, pictures in every socket for them, and tiles to preview."""
    values = values_for(nodes[node], lite, small)
    values |= {name: values_for(nodes["VSRUpscaleLR"], lite, small)["image"].clone() for name in IMAGES[node]}
    values |= {"steps": 1} if "steps" in values else {}
    if node == "VSRDecode":
        values["latent"] = {"samples": small[2]["samples"][:2, :, :2, :2]}
    if node == "VSRTilePreview":
        values["model"] = (
            nodes["VSRTiledDiffusion"]
            .execute(lite[0], *(16, 16, 4, 0.5, "none", "lagged", 0, 4, 1, "ends", 0.0, 1.0, 1))
            .args[0]
        )
    return values


def tensors(value: Any) -> Iterator[Tensor]:
    """All that a node gave, whatever it is packed in."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors(each)
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors(each)
    elif dataclasses.is_dataclass(value):
        yield from tensors([getattr(value, field.name) for field in dataclasses.fields(value)])


def results(node: Any, values: dict[str, Any]) -> list[Tensor]:
    found = list(tensors(node.execute(**values).args))
    assert found
    return found


@pytest.mark.parametrize("node", IMAGES)
def test_half_precision_is_taken_as_what_it_holds(nodes: dict[str, Any], lite: Any, small: Any, node: str) -> None:
    """The same as the same values in float32, to the last bit: nothing is computed in half precision."""
    values = given(nodes, lite, small, node)
    for dtype in HALVES:
        halves = {name: values[name].to(dtype) for name in IMAGES[node]}
        wide = {name: half.float() for name, half in halves.items()}
        for found, expected in zip(
            results(nodes[node], values | halves), results(nodes[node], values | wide), strict=True
        ):
            assert found.dtype == expected.dtype and torch.equal(found, expected)


@pytest.mark.parametrize("node", IMAGES)
def test_a_little_outside_is_clamped(nodes: dict[str, Any], lite: Any, small: Any, node: str) -> None:
    values = given(nodes, lite, small, node)
    over = {name: values[name] * 1.6 - 0.3 for name in IMAGES[node]}
    clamped = {name: value.clamp(0, 1) for name, value in over.items()}
    assert all(bool((value < 0).any()) and bool((value > 1).any()) for value in over.values())
    for found, expected in zip(
        results(nodes[node], values | over), results(nodes[node], values | clamped), strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("node", "name"), IMAGE_INPUTS)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda image: image[:0], ("empty", "check")),
        (lambda image: image.repeat(1, 1, 1, 2)[..., :4], ("4 channels", "alpha")),
        (lambda image: image * 2 - 1, ("values from -", "0 to 1")),
        (lambda image: image * 255, ("values from", "to 2", "0 to 1", "tone-map")),
        (lambda image: torch.where(image > 0.9, torch.nan, image), ("nan", "0 to 1")),
    ],
    ids=["empty", "4 channels", "[-1, 1]", "[0, 255]", "NaN"],
)
def test_an_image_that_is_none(
    nodes: dict[str, Any], lite: Any, small: Any, node: str, name: str, change: Any, words: tuple[str, ...]
) -> None:
    values = given(nodes, lite, small, node)
    with refused(name, *words):
        nodes[node].execute(**values | {name: change(values[name])})


def test_images_leave_as_the_host_hands_them_on(
    host: ModuleType, nodes: dict[str, Any], lite: Any, small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, or in half of it where the artist started the host so, which hosts since 2026 know."""
    args = importlib.import_module("comfy.cli_args").args

    def dtypes() -> set[torch.dtype]:
        found: set[torch.dtype] = set()
        for node in nodes:
            outputs = nodes[node].define_schema().outputs
            if node in IMAGES and any(output.io_type == "IMAGE" for output in outputs):
                made = nodes[node].execute(**given(nodes, lite, small, node)).args
                found |= {value.dtype for value, output in zip(made, outputs, strict=True) if output.io_type == "IMAGE"}
        return found

    assert dtypes() == {torch.float32}
    if hasattr(args, "fp16_intermediates"):
        monkeypatch.setattr(args, "fp16_intermediates", True)
        assert dtypes() == {torch.float16}


@pytest.mark.parametrize("dtype", HALVES)
def test_a_latent_in_half_precision(nodes: dict[str, Any], lite: Any, small: Any, dtype: torch.dtype) -> None:
    latent = small[2]["samples"][:2, :, :8, :8].to(dtype)
    found, expected = (nodes["VSRDecode"].execute(lite[1], {"samples": z}, 0).args[0] for z in (latent, latent.float()))
    assert torch.equal(found, expected)
