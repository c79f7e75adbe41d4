"""Optical flow: estimated, followed, and where it can be followed.

`flow[:, 0]` is dx and `flow[:, 1]` dy, in pixels; `forward[i]` maps frame i to i+1 and `backward[i]` frame i+1 to i.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..errors import SettingError

SMALLEST = 12
"""Fewest pixels a side that DIS can work on."""


def dis_flow(first: Tensor, second: Tensor) -> Tensor:
    """Flow (n, 2, h, w) from each frame of `first` to the one of `second`, both (n, 3, h, w) RGB in [0, 1].

    Dense inverse search (Kroeger et al., ECCV 2016) on 8-bit grey: OpenCV's medium preset, but down to whole pixels,
    which is ten times nearer on a shifted picture and takes three times longer. float32, on the frames' device. Raises
    SettingError for shapes that differ or frames under 12 pixels a side.
    """
    if first.shape != second.shape or first.ndim != 4 or first.shape[1] != 3 or min(first.shape[-2:]) < SMALLEST:
        shapes = " and ".join("x".join(map(str, x.shape)) for x in (first, second))
        raise SettingError(
            f"optical flow got {shapes}: expected two equal clips of (frames, 3, height, width) of at least"
            f" {SMALLEST}x{SMALLEST} pixels; use larger frames"
        )
    import cv2  # comes with scenedetect-headless; slow to import

    threads = cv2.getNumThreads()
    # DIS hands good guesses from patch to patch, but not from one thread's stripe to the next: with a thread for each
    # pair of frames instead, the flow is the same on every machine.
    cv2.setNumThreads(1)
    try:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            flows = list(pool.map(_dis, first, second))
    finally:
        cv2.setNumThreads(threads)
    return torch.stack(flows).to(first.device) if flows else first.new_zeros(0, 2, *first.shape[-2:]).float()


def _dis(first: Tensor, second: Tensor) -> Tensor:
    """Flow (2, h, w) of one pair (3, h, w)."""
    import cv2

    estimator = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    estimator.setFinestScale(0)
    start, end = _grey(first), _grey(second)
    found = estimator.calc(start, end, np.zeros((*start.shape, 2), np.float32))
    return rearrange(torch.as_tensor(np.asarray(found, np.float32)), "h w c -> c h w")


def warp(x: Tensor, flow: Tensor) -> Tensor:
    """`x` (n, c, h, w) seen where `flow` (n, 2, h, w) points: out(p) = x(p + flow(p)), bilinear, in x's dtype.

    With the flow from frame i to i+1 this brings frame i+1 onto frame i. Positions outside take the border's value:
    see `inside`.
    """
    height, width = x.shape[-2:]
    places = _places(flow.float())
    scale = torch.tensor([max(width - 1, 1), max(height - 1, 1)], device=flow.device)
    grid = 2 * rearrange(places, "n c h w -> n h w c") / scale - 1
    return F.grid_sample(x.float(), grid, "bilinear", padding_mode="border", align_corners=True).to(x.dtype)


def inside(flow: Tensor) -> Tensor:
    """Where `flow` (n, 2, h, w) points into the picture: (n, 1, h, w), True or False."""
    height, width = flow.shape[-2:]
    x, y = _places(flow.float()).unbind(1)
    return ((x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)).unsqueeze(1)


def visibility(forward: Tensor, backward: Tensor) -> Tensor:
    """Which pixels of frame i are seen in frame i+1 too: (n, 1, h, w), 1 or 0, float32.

    A pixel is where going there and back, both flows (n, 2, h, w), ends nearly where it began: |f + b|^2 < 0.01
    (|f|^2 + |b|^2) + 0.5 (Sundaram et al., ECCV 2010), and where `forward` stays in the picture. Exchange the two for
    the pixels of frame i+1.
    """
    back = warp(backward.float(), forward)
    forward = forward.float()
    apart = (forward + back).square().sum(1, keepdim=True)
    length = forward.square().sum(1, keepdim=True) + back.square().sum(1, keepdim=True)
    return ((apart < 0.01 * length + 0.5) & inside(forward)).float()


def _places(flow: Tensor) -> Tensor:
    """Where each pixel goes, (n, 2, h, w): x and y."""
    height, width = flow.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(height, device=flow.device), torch.arange(width, device=flow.device), indexing="ij"
    )
    return flow + torch.stack([x, y])


def _grey(frame: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """BT.601 luma over the full range, 8 bit."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=frame.device)
    levels = (torch.einsum("chw,c->hw", frame.float(), weights) * 255).round().clamp(0, 255)
    return levels.to(torch.uint8).cpu().contiguous().numpy()
