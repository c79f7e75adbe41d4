"""Real-ESRGAN's Compact network (SRVGGNetCompact), which the bundled DCM is: as spandrel has it, which takes seconds to
import every architecture it knows."""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoints.module_file import fill, read_module

KIND = "dcm"


class Compact(nn.Module):
    """`depth` convolutions of `width` channels between the first and the last, whose pixels are added to the nearest
    neighbour's picture, `scale` times larger."""

    def __init__(self, width: int, depth: int, scale: int) -> None:
        super().__init__()
        self.scale = scale
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.PReLU(width)]
        for _ in range(depth):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.PReLU(width)]
        self.body = nn.Sequential(*layers, nn.Conv2d(width, 3 * scale**2, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """Frames `(n, 3, h, w)` RGB to `(n, 3, s*h, s*w)` in [0, 1]."""
        enlarged = F.pixel_shuffle(self.body(x), self.scale)
        return enlarged.add_(F.interpolate(x, scale_factor=self.scale, mode="nearest")).clamp_(0, 1)


def load_compact(path: Path) -> Compact:
    """The pack's own DCM at `path`, float32 on the CPU. Raises CheckpointError."""
    stored = read_module(path, KIND)
    config = stored.config
    model = Compact(config["num_feat"], config["num_conv"], config["upscale"])
    fill(path, model, KIND, stored.tensors)
    return model.eval().requires_grad_(False)
