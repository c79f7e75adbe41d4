"""Small CAPMs with random weights, for tests."""

from __future__ import annotations

import torch

from tests.conftest import randomise
from vsr_ops.modules.capm import CAPM, SVD_UNET, SVD_VAE, CAPMShape

WIDTHS = {"up_blocks.0": 48, "up_blocks.1": 32}
SHAPE = CAPMShape(SVD_UNET, WIDTHS, code=8, prompt=6, size=4)
VAE_SHAPE = CAPMShape(SVD_VAE, {"up_blocks.1": 32}, code=8, prompt=6, size=4)


def filled(shape: CAPMShape = SHAPE) -> CAPM:
    """A CAPM with random weights everywhere."""
    torch.manual_seed(0)
    model = CAPM(shape)
    randomise(model, 3)
    return model.eval().requires_grad_(False)


# --- What changes nothing -------------------------------------------------------------------------------------------
