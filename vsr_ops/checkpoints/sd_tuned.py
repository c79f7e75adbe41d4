"""A Stable Diffusion's file with some tensors of its UNet replaced, everything else as it was: what trained a part of a
published checkpoint leaves a checkpoint of the same layout, with its text encoder and VAE, which hosts load as such."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..errors import CheckpointError
from . import keymap
from .safefile import open_safely, refuse_not_finite, write_whole
from .sd import SD_UNET_PART


def write_tuned_sd(
    path: Path, start: Path, config: Mapping[str, object], tuned: Mapping[str, Tensor], notes: Mapping[str, str]
) -> None:
    """Writes the Stable Diffusion at `start` (a single file) with the `tuned` tensors of its UNet, under the names of
    diffusers' UNet2DConditionModel of `config`; each in the precision that it had. `notes` join the metadata.

    Raises CheckpointError for a `start` that cannot be read, tensors that its UNet does not have or in another shape,
    values that are not finite, and where `path` cannot be written.
    """
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: suffix '{path.suffix}', expected '.safetensors'; rename the output")
    _, names = SD_UNET_PART.plan(start, config)
    if unknown := sorted(tuned.keys() - {str(name) for name in names.values()}):
        raise CheckpointError(f"{start}: its UNet has no {unknown[0]}; give the Stable Diffusion that was trained")
    with open_safely(start) as source:
        tensors: dict[str, Tensor] = {key: source.get(key) for key in source.shapes}
        for original, name in names.items():
            if name not in tuned:
                continue
            made = keymap.to_original(original, name, tuned).detach().cpu()
            if original not in tensors or made.numel() != tensors[original].numel():
                has = tuple(tensors[original].shape) if original in tensors else "nothing"
                what = f"{start}: {original} is {has}, expected the {tuple(made.shape)} that was trained"
                raise CheckpointError(f"{what}; give the Stable Diffusion that the training started from")
            before = tensors[original]
            # A matrix may stand for a 1x1 convolution.
            tensors[original] = made.to(before.dtype).reshape(before.shape).contiguous()
            refuse_not_finite(path, original, tensors[original], made)
        write_whole(path, tensors, {"format": "pt", **source.metadata, **notes})
