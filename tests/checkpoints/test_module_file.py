"""The pack's own modules on disk: what is written is read, and every other file is refused by name."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.support.refusals import refused
from vsr_ops.checkpoints.module_file import VERSION, fill, read_module, write_module
from vsr_ops.checkpoints.svd import LITE
from vsr_ops.errors import CheckpointError

KIND = "thing"
CONFIG = {"width": 4, "names": ["a", "b"]}


def tensors() -> dict[str, Tensor]:
    return {"weight": torch.arange(6.0).reshape(2, 3) / 8, "steps": torch.tensor([3])}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    floats = {"weight": tensors()["weight"]}
    write_module(tmp_path / "thing.safetensors", KIND, CONFIG, floats, "noise, CC0")
    return tmp_path / "thing.safetensors"


def changed(path: Path, **metadata: str | None) -> Path:
    """The file with some of its metadata replaced; None takes an entry out."""
    with safe_open(path, "pt") as file:
        kept = {**file.metadata(), **{f"vsr.{key}": value for key, value in metadata.items()}}
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(state, path, {key: value for key, value in kept.items() if value is not None})
    return path


thing = partial(read_module, kind=KIND)


def test_what_is_written_is_read(path: Path) -> None:
    read = read_module(path, KIND)
    assert read.config == CONFIG and read.trained_on == "noise, CC0"
    assert set(read.tensors) == {"weight"} and read.tensors["weight"].dtype == torch.float32
    assert torch.equal(read.tensors["weight"], tensors()["weight"])


def test_it_is_stored_as_asked_and_whole_numbers_stay(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        write_module(tmp_path / "x.safetensors", KIND, {}, tensors(), "", dtype)
        with safe_open(tmp_path / "x.safetensors", "pt") as file:
            assert file.get_tensor("weight").dtype == dtype and file.get_tensor("steps").dtype == torch.int64
            assert file.metadata()["vsr.kind"] == KIND and json.loads(file.metadata()["vsr.config"]) == {}
    assert [item.name for item in tmp_path.iterdir()] == ["x.safetensors"]


def test_tensors_that_share_or_skip_memory_are_written(tmp_path: Path) -> None:
    whole = torch.arange(8.0).reshape(2, 4)
    write_module(tmp_path / "x.safetensors", KIND, {}, {"a": whole.T, "b": whole[:, 1:]}, "", torch.float32)
    read = read_module(tmp_path / "x.safetensors", KIND)
    assert torch.equal(read.tensors["a"], whole.T) and torch.equal(read.tensors["b"], whole[:, 1:])


def test_a_write_that_fails_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_module(tmp_path / "nowhere" / "x.safetensors", KIND, {}, tensors(), "")


def test_another_kind_names_both(path: Path) -> None:
    refused(partial(read_module, kind="refiner"), path, "'thing'", "'refiner'")
    refused(partial(read_module, kind="refiner"), LITE, "'refiner'")
    refused(thing, changed(path, kind=None), "None", "'thing'")


@pytest.mark.parametrize("version", ["2", "", None])
def test_another_version_is_refused(path: Path, version: str | None) -> None:
    refused(thing, changed(path, version=version), repr(version), repr(VERSION), "update")


@pytest.mark.parametrize("config", ["", "{", "[1]", "3", None])
def test_a_configuration_that_is_no_object_is_refused(path: Path, config: str | None) -> None:
    refused(thing, changed(path, config=config), "vsr.config")


def test_files_that_cannot_be_are_refused(path: Path) -> None:
    refused(thing, path.parent / "nowhere.safetensors", "no such file", "thing")
    refused(thing, path.parent, "no such file")
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    refused(thing, path, "truncated or damaged")
    path.write_bytes(b"")
    refused(thing, path, "truncated or damaged")
    torch.save(tensors(), path)
    refused(thing, path, "a pickle")


def test_values_that_are_no_numbers_are_refused(path: Path) -> None:
    write_module(path, KIND, CONFIG, {"weight": torch.tensor([1.0, torch.nan])}, "")
    refused(thing, path, "weight", "NaN")
    write_module(path, KIND, CONFIG, {"weight": torch.tensor([1.0, 1e30])}, "")
    refused(thing, path, "weight", "infinity")


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"weight": torch.zeros(2, 3)}, ("1 missing", "bias")),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "scale": torch.zeros(1)}, ("1 unexpected", "scale")),
        ({"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}, ("wrong shape", "(2, 4)", "(2, 3)")),
        ({"weight": torch.zeros(3, 2), "other": torch.zeros(2)}, ("1 missing", "1 unexpected", "1 of the wrong shape")),
    ],
)
def test_tensors_that_do_not_fit_are_named(path: Path, state: dict[str, Tensor], words: tuple[str, ...]) -> None:
    module = nn.Linear(3, 2)
    before = module.weight.clone()
    with pytest.raises(CheckpointError) as caught:
        fill(path, module, KIND, state)
    text = str(caught.value)
    assert "\n" not in text and KIND in text and all(word in text for word in words), text
    assert torch.equal(module.weight, before)


def test_tensors_that_fit_are_given(path: Path) -> None:
    module = nn.Linear(3, 2)
    fill(path, module, KIND, {"weight": torch.ones(2, 3), "bias": torch.zeros(2)})
    assert torch.equal(module(torch.ones(1, 3)), torch.full((1, 2), 3.0))


def test_a_matrix_stands_for_a_1x1_convolution(path: Path) -> None:
    module = nn.Conv2d(3, 2, 1, bias=False)
    fill(path, module, KIND, {"weight": torch.arange(6.0).reshape(2, 3)})
    assert torch.equal(module.weight[..., 0, 0], torch.arange(6.0).reshape(2, 3))
