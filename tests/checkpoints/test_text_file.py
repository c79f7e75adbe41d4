"""The file of a text's embedding: what is written is read, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.support.refusals import refused
from tests.support.tensors import randn
from vsr_ops.checkpoints.module_file import write_module
from vsr_ops.checkpoints.text_file import Texts, read_texts, write_texts


def test_what_is_written_is_read_bit_for_bit(tmp_path: Path) -> None:
    texts, path = Texts(randn(1, 77, 16), randn(1, 77, 16, seed=1)), tmp_path / "t.safetensors"
    write_texts(path, texts, ("a b", ""), "nothing")
    found = read_texts(path)
    assert torch.equal(found.prompt, texts.prompt) and torch.equal(found.negative, texts.negative)
    assert found.width == 16
    with safe_open(path, "pt") as file:
        assert file.metadata()["vsr.kind"] == "text" and '"prompt": "a b"' in file.metadata()["vsr.config"]


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"prompt": randn(1, 77, 16)}, "expected prompt and negative (1, tokens, 16)"),
        ({"prompt": randn(1, 77, 16), "negative": randn(1, 77, 8)}, "(1, 77, 8)"),
        ({"prompt": randn(77, 16), "negative": randn(77, 16)}, "(77, 16)"),
        ({}, "holds nothing"),
    ],
)
def test_other_contents_are_refused(tensors: dict[str, torch.Tensor], words: str, tmp_path: Path) -> None:
    write_module(tmp_path / "t.safetensors", "text", {"width": 16}, tensors, "nothing")
    refused(read_texts, tmp_path / "t.safetensors", words, "python -m vsr_ops embed")


def test_other_files_are_refused(tmp_path: Path) -> None:
    refused(read_texts, tmp_path / "none.safetensors", "no such file", "python -m vsr_ops embed")
    write_module(tmp_path / "dcm.safetensors", "dcm", {}, {"x": torch.zeros(1)}, "nothing")
    refused(read_texts, tmp_path / "dcm.safetensors", "weights of kind 'dcm', expected kind 'text'")
