"""What SVD's cross-attention sees: CLIP's view of a picture of each scene."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ...vsr_ops.errors import SettingError
from .model import context_width


class NoClipVision:
    """Stands where an SVD has no image encoder. A socket's None would break the node it is wired to without a word of
    why; this says so as soon as a picture is asked of it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def encode_image(self, *_: object, **__: object) -> Any:
        """Raises SettingError."""
        raise SettingError(
            f"{self._name} has no CLIP vision: expected an SVD with an image encoder; leave clip_vision_output of SVD"
            " Video Conditioning unwired, or choose svd.safetensors or svd_xt.safetensors in Load DC-VSR"
        )


def scene_contexts(
    model: Any, clip_vision_output: Any, clip_vision: Any, frames: Tensor, cuts: Sequence[int]
) -> Tensor:
    """Cross-attention tokens of a video `(n, 3, h, w)` whose scenes begin at `cuts`: `(1, 1, width)`, or where scenes
    have contexts of their own `(n, 1, width)`.

    `clip_vision_output` holds one picture's embedding, one a scene, or one a frame; `clip_vision`, in its place, looks
    at the first frame of each scene, whole, as SVD was trained. Without either, and where the checkpoint has no
    encoder, they are zeros. Raises SettingError for both, for another number, and for another width than the MODEL's.
    """
    if clip_vision_output is not None and clip_vision is not None:
        raise SettingError(
            "clip_vision and clip_vision_output are both wired: expected one; unwire clip_vision_output to have every"
            " scene seen, or clip_vision to choose the picture yourself"
        )
    width, firsts = context_width(model), [0, *cuts]
    assert width is not None, "nodes ask this of an SVD, whose UNet has cross-attention"
    if clip_vision is not None and not isinstance(clip_vision, NoClipVision):
        clip_vision_output = clip_vision.encode_image(rearrange(frames[firsts], "t c h w -> t h w c"), crop=False)
    if clip_vision_output is None:
        return torch.zeros(1, 1, width)
    found: Tensor = rearrange(clip_vision_output.image_embeds, "t d -> t 1 d")
    if found.shape[-1] != width:
        raise SettingError(
            f"clip_vision_output is {found.shape[-1]} wide, this MODEL takes {width}: expected the CLIP vision of the"
            " MODEL's own checkpoint; for Load Lite SVD leave it unwired"
        )
    if len(found) not in (1, len(firsts), len(frames)):
        raise SettingError(
            f"clip_vision_output is of {len(found)} pictures: expected 1, one for each of {len(firsts)} scene(s), or"
            f" one for each of {len(frames)} frames; encode the upscaled video, or wire clip_vision instead"
        )
    if len(found) == 1 or len(firsts) == 1:
        return found[:1]
    by_scene = found if len(found) == len(firsts) else found[firsts]
    lengths = torch.tensor([*cuts, len(frames)]) - torch.tensor(firsts)
    return by_scene.repeat_interleave(lengths, 0)
