"""A UNet alone as diffusers writes it, for the tests of reading one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import UNetSpatioTemporalConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from vsr_ops.checkpoints.svd import SVDWeights, read_svd
from vsr_ops.checkpoints.unet_alone import open_unet
from vsr_ops.errors import CheckpointError

STEM = "diffusion_pytorch_model"


def unet_of(weights: SVDWeights, half: bool = False) -> Any:
    model: Any = UNetSpatioTemporalConditionModel(**weights.unet_config)
    model.load_state_dict(weights.unet)
    return model.half() if half else model


def save_unet(path: Path, weights: SVDWeights, half: bool = False, **how: Any) -> Path:
    """`unet_ema` in `path`, by diffusers' own save_pretrained."""
    unet_of(weights, half).save_pretrained(path / "unet_ema", **how)
    return path / "unet_ema"


def changed(folder: Path, **values: Any) -> None:
    """Its configuration with other values."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def retensored(folder: Path, **values: Tensor) -> None:
    """Its tensors with other ones."""
    file = folder / f"{STEM}.safetensors"
    save_file({**load_file(file), **values}, file)


def refused_unet(path: Path, svd: Path | None = None) -> str:
    """The one line in which it is refused, alone or beside an SVD."""
    with pytest.raises(CheckpointError) as caught:
        if svd is None:
            with open_unet(path):
                pass
        else:
            read_svd(svd, unet=path)
    message = str(caught.value)
    assert "\n" not in message and "expected" in message and "; " in message
    return message
