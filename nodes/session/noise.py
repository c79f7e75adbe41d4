"""Noise by frame, as the host's samplers ask for noise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...vsr_ops.errors import SettingError
from ...vsr_ops.sampling.noise import frame_noise
from .known import frames_of


@dataclass(frozen=True)
class FrameNoise:
    """The host's NOISE: of every frame by the seed and the frame's number in its source, of which the video that was
    encoded begins at `first_frame`. A frame that is there again, as Repeat Latent Batch has it, gets noise of its own:
    the following seed's."""

    seed: int
    first_frame: int = 0

    def generate_noise(self, input_latent: Mapping[str, Any]) -> Tensor:
        """Noise `(n, c, h, w)` for a LATENT of this shape, on the CPU in its dtype. Raises SettingError for one that is
        no batch of frames."""
        samples: Tensor = input_latent["samples"]
        if samples.is_nested or samples.ndim != 4:
            shape = "nested" if samples.is_nested else f"of shape {tuple(samples.shape)}"
            raise SettingError(
                f"the LATENT is {shape}: expected (frames, channels, height, width), as SVD and Stable Diffusion have"
                " it; take Random Noise for this MODEL"
            )
        seen, noise = Counter[int](), list[Tensor]()
        for number in frames_of(input_latent):
            noise.append(frame_noise([self.first_frame + number], samples.shape[1:], self.seed + seen[number])[0])
            seen[number] += 1
        return torch.stack(noise).to(samples.dtype)
