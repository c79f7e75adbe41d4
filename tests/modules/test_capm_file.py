"""CAPM's files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.tensors import randn
from tests.support.tiny_capm import SHAPE, VAE_SHAPE, WIDTHS, filled
from vsr_ops.backbones.svd import load_svd
from vsr_ops.checkpoints.module_file import write_module
from vsr_ops.errors import CheckpointError
from vsr_ops.modules.capm import SVD_UNET, attached
from vsr_ops.modules.capm_file import KIND, CAPMs, load_capms, write_capms


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_capms(tmp_path / "capm.safetensors", CAPMs(filled(), filled(VAE_SHAPE)), "nothing")
    return tmp_path / "capm.safetensors"


def test_what_is_written_is_read(path: Path) -> None:
    read, features = load_capms(path), randn(1, 32, 6, 6)
    for half, shape in ((read.unet, SHAPE), (read.vae, VAE_SHAPE)):
        assert half is not None and half.shape == shape and not half.training
        assert not any(parameter.requires_grad for parameter in half.parameters())
        assert torch.equal(half("up_blocks.1", features), filled(shape).half().float()("up_blocks.1", features))


def test_another_kind_is_refused(path: Path) -> None:
    write_module(path, "refiner", {}, {"weight": torch.zeros(1)}, "nothing")
    with pytest.raises(CheckpointError, match="kind 'refiner', expected kind 'capm'"):
        load_capms(path)
    write_module(path, KIND, {}, {"weight": torch.zeros(1)}, "nothing")
    with pytest.raises(CheckpointError, match="neither a UNet's nor a VAE's"):
        load_capms(path)


@pytest.mark.parametrize(
    "config",
    [
        {"vae": {"backbone": SVD_UNET, "widths": WIDTHS}},
        {"encoder": {"backbone": SVD_UNET, "widths": WIDTHS}},
        {"unet": {"backbone": SVD_UNET, "widths": 3}},
        {"unet": {"backbone": SVD_UNET, "widths": {"a": "b"}}},
        {"unet": {"backbone": SVD_UNET, "size": 1}},
        {"backbone": SVD_UNET, "widths": WIDTHS},
    ],
)
def test_a_configuration_of_something_else_is_refused(tmp_path: Path, config: dict[str, object]) -> None:
    write_module(tmp_path / "c.safetensors", KIND, config, {"weight": torch.zeros(1)}, "nothing")
    with pytest.raises(CheckpointError, match="no CAPM's") as caught:
        load_capms(tmp_path / "c.safetensors")
    assert "\n" not in str(caught.value)


def test_the_bundled_one_hears_the_level() -> None:
    """What it is told changes the picture about as much as that it is there: its prompts are not drowned."""
    svd, half = load_svd("lite", torch.device("cpu"), torch.float32), load_capms("lite").vae
    assert half is not None
    z = randn(2, 4, 12, 12)
    plain = svd.decode(z)

    def told(level: float) -> Tensor:
        with attached(half, svd.vae.decoder, torch.full((2,), level)):
            return svd.decode(z)

    clean, coarse = told(0.0), told(1.0)
    assert (coarse - clean).norm() > 0.2 * (coarse - plain).norm() > 0
