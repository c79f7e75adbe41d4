"""Small stock weights: as the original file has them, and as diffusers' folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from tests.support.svd_files import make_stock, save_folder, stock_file
from vsr_ops.checkpoints.svd import SVDWeights


@pytest.fixture(scope="module")
def stock() -> SVDWeights:
    return make_stock()


@pytest.fixture(scope="module")
def stock_tensors(stock: SVDWeights, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return stock_file(tmp_path_factory.mktemp("stock") / "stock.safetensors", stock)


@pytest.fixture(scope="module")
def folder(stock: SVDWeights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("diffusers")
    save_folder(path, stock)
    return path
