"""The optical flow of a whole video, and where it can be followed: estimated once, used by preview and alignment.

`forward[i]` maps frame i to i+1 and `backward[i]` frame i+1 to i, as in `warp.py`. Nothing crosses a scene cut.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SettingError
from . import raft
from .raft import Estimator
from .warp import dis_flow, inside, visibility

log = logging.getLogger(__name__)

PAIRS = 4
"""Pairs of frames that are estimated together, so that DIS has work for several threads."""


@dataclass(frozen=True)
class Flow:
    """Flow of a video of `frames` frames in both directions, in pixels of `size`, and what is seen in both frames.

    `forward`, `backward`: (frames - 1, 2, h, w) float32. `visible_now[i]`: the pixels of frame i that frame i+1 shows
    too; `visible_next[i]`: those of frame i+1 that frame i shows; (frames - 1, 1, h, w), True or False. `cuts`: first
    frames of new scenes; at the pair across one, flow and masks are 0.
    """

    forward: Tensor
    backward: Tensor
    visible_now: Tensor
    visible_next: Tensor
    cuts: tuple[int, ...]
    frames: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pictures that it is for."""
        height, width = self.forward.shape[-2:]
        return height, width

    def scenes(self) -> Iterator[tuple[int, int]]:
        """First and one past the last frame of each scene."""
        return pairwise([0, *self.cuts, self.frames])

    def part(self, start: int, stop: int) -> Flow:
        """The flow of frames `start` to `stop` - 1, a view; they must be of one scene."""
        pairs = slice(start, max(start, stop - 1))
        forward, backward, now, after = (x[pairs] for x in self._tensors())
        return Flow(forward, backward, now, after, (), stop - start)

    def put(self, first: int, pairs: Flow) -> None:
        """Writes the flow of `pairs`, of the same size, to the pairs from `first` on."""
        for mine, given in zip(self._tensors(), pairs._tensors(), strict=True):
            mine[first : first + len(given)] = given

    def to(self, device: torch.device | str) -> Flow:
        """The same on another device."""
        forward, backward, now, after = (x.to(device) for x in self._tensors())
        return replace(self, forward=forward, backward=backward, visible_now=now, visible_next=after)

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.forward, self.backward, self.visible_now, self.visible_next


def _dis(folder: Path | None, device: torch.device) -> Estimator:
    return dis_flow


def _raft(name: str, folder: Path | None, device: torch.device) -> Estimator:
    """RAFT of torchvision's file, in the folder or where torchvision looks for it. Raises CheckpointError for weights
    that are not there or not RAFT's, SettingError without torchvision."""
    return raft.load_raft(raft.fetched(name, folder), device, name)


ESTIMATORS: dict[str, Callable[[Path | None, torch.device], Estimator]] = {
    "dis": _dis,
    **{name: partial(_raft, name) for name in raft.CLASSES},
}
"""By name: what makes an estimator, from a folder of weights and the device to work on. DIS needs no weights."""


@torch.no_grad()
def estimate_flow(
    video: Tensor,
    estimator: str = "dis",
    cuts: Sequence[int] | None = None,
    tick: Callable[[int], None] = lambda done: None,
    weights: Path | None = None,
    device: torch.device | str | None = None,
) -> Flow:
    """The flow of a video (n, 3, h, w) RGB in [0, 1], both ways, a few pairs at a time; on the video's device.

    `cuts` are the first frames of new scenes, found where None. Fewer than two frames give a Flow of no pairs.
    `weights` is a folder with RAFT's, `device` where RAFT works, by default the video's; `tick` is told of every pair.
    Raises SettingError for an unknown estimator, a video of another shape or too small, and cuts outside the video;
    CheckpointError for RAFT weights that are not there.
    """
    # The room of videos loads libraries of codecs, which following a flow does not need.
    from ..video.scenes import find_cuts

    _check_video(video, estimator)
    frames, _, height, width = video.shape
    found = find_cuts(iter(video)) if cuts is None else _checked(cuts, frames)
    pairs = max(0, frames - 1)
    flows = [video.new_zeros((pairs, 2, height, width), dtype=torch.float32) for _ in range(2)]
    masks = [video.new_zeros((pairs, 1, height, width), dtype=torch.bool) for _ in range(2)]
    flow = Flow(flows[0], flows[1], masks[0], masks[1], found, frames)
    if pairs == 0:
        log.warning("optical flow: a video of %d frame has no motion, so there is nothing to follow", frames)
        return flow
    where = video.device if device is None else torch.device(device)
    estimate = ESTIMATORS[estimator](weights, where)
    for start, stop in flow.scenes():
        for first in range(start, stop - 1, PAIRS):
            part = slice(first, min(first + PAIRS, stop - 1))
            now, after = (video[k : k + part.stop - part.start].to(where) for k in (first, first + 1))
            flow.put(first, _both_ways(estimate, now, after))
            tick(part.stop - part.start)
        if stop < frames:
            tick(1)
    return flow


@torch.no_grad()
def streamed_flow(
    video: Iterable[Tensor],
    frames: int,
    size: tuple[int, int],
    factor: int,
    cuts: Sequence[int],
    share: float = 1.0,
    tick: Callable[[int], None] = lambda done: None,
    estimate: Estimator = dis_flow,
) -> Flow:
    """`latent_flow` of what `estimate_flow` finds, two frames at a time: only the small flow is held.

    `video` gives `frames` frames (3, h, w) RGB in [0, 1]; `size` is that of the latents, `factor` pixels each. The rest
    is as in those two. Raises SettingError for frames that are too small, and for cuts outside the video.
    """
    pairs, found = max(0, frames - 1), _checked(cuts, frames)
    flows = [torch.zeros(pairs, 2, *size) for _ in range(2)]
    masks = [torch.zeros(pairs, 1, *size, dtype=torch.bool) for _ in range(2)]
    flow = Flow(flows[0], flows[1], masks[0], masks[1], found, frames)
    for i, (now, after) in zip(range(pairs), pairwise(frame[None] for frame in video), strict=True):
        if i + 1 not in found:
            flow.put(i, latent_flow(_both_ways(estimate, now, after), *size, factor, share))
        tick(1)
    return flow


def _both_ways(estimate: Estimator, now: Tensor, after: Tensor) -> Flow:
    """The flow of a few pairs of frames, (k, 3, h, w) each, of one scene."""
    forward, backward = estimate(torch.cat([now, after]), torch.cat([after, now])).chunk(2)
    seen = (visibility(forward, backward).bool(), visibility(backward, forward).bool())
    return Flow(forward, backward, *seen, (), len(now) + 1)


def _check_video(video: Tensor, estimator: str) -> None:
    if estimator not in ESTIMATORS:
        known = ", ".join(ESTIMATORS)
        raise SettingError(f"estimator is {estimator!r}: expected one of {known}; choose one of them")
    if video.ndim != 4 or video.shape[1] != 3:
        raise SettingError(
            f"optical flow got a video of shape {tuple(video.shape)}: expected (frames, 3, height, width); give RGB"
        )


def _checked(cuts: Sequence[int], frames: int) -> tuple[int, ...]:
    if list(cuts) != sorted({cut for cut in cuts if 0 < cut < frames}):
        raise SettingError(
            f"scene cuts are {list(cuts)} in a video of {frames} frames: expected first frames of scenes, ascending,"
            f" from 1 to {frames - 1}; leave them out to have them found"
        )
    return tuple(cuts)


def resized(flow: Flow, size: tuple[int, int], share: float = 1.0) -> Flow:
    """The flow at another (h, w): vectors averaged and scaled with the picture, in pixels of that size.

    A pixel is visible only where all of the area that it stands for is, or at least `share` of it, and where its flow
    stays in the picture. Averaged by area where neither side grows, else bilinear. Pair by pair.
    """
    return flow if size == flow.size else _resized(flow, size, flow.size, share)


def latent_flow(flow: Flow, height: int, width: int, factor: int, share: float = 1.0) -> Flow:
    """The flow of the latents (height, width) of its video, `factor` pixels each: grown at the bottom and right by
    repeating its edge, as `latents.pad_to` grows the pictures, then `resized`."""
    return _resized(flow, (height, width), (height * factor, width * factor), share)


def _resized(flow: Flow, size: tuple[int, int], padded: tuple[int, int], share: float) -> Flow:
    grow = (0, padded[1] - flow.size[1], 0, padded[0] - flow.size[0])
    smaller = size[0] <= padded[0] and size[1] <= padded[1]
    scale = flow.forward.new_tensor([size[1] / padded[1], size[0] / padded[0]]).view(2, 1, 1)

    def vectors(x: Tensor) -> Tensor:
        out = x.new_empty((x.shape[0], 2, *size))
        for i, pair in enumerate(x):
            whole = F.pad(pair[None], grow, mode="replicate")
            out[i] = F.interpolate(whole, size, mode="area" if smaller else "bilinear")[0] * scale
        return out

    def seen(mask: Tensor, x: Tensor) -> Tensor:
        out = mask.new_empty((mask.shape[0], 1, *size))
        for i, pair in enumerate(mask):
            hidden = F.pad((~pair[None]).float(), grow, mode="replicate")
            # The mean is rounded, by less than one pixel of an area that a latent could stand for.
            out[i] = F.adaptive_avg_pool2d(hidden, size)[0] <= 1 - share + 1e-6
        return out & inside(x)

    forward, backward = vectors(flow.forward), vectors(flow.backward)
    now, after = seen(flow.visible_now, forward), seen(flow.visible_next, backward)
    return replace(flow, forward=forward, backward=backward, visible_now=now, visible_next=after)


def check_fits(flow: Flow, frames: int, height: int, width: int, factor: int, multiple: int = 1) -> None:
    """Raises SettingError unless the flow is that of a video of `frames` latents (height, width), `factor` pixels each.

    A video is padded to whole latents, and to multiples of `multiple` of them.
    """
    if flow.frames != frames:
        raise SettingError(
            f"the flow is of {flow.frames} frames, the latent video of {frames}: expected equal counts; estimate it on"
            " the very video that is sampled"
        )
    expected = tuple(-(-side // (factor * multiple)) * multiple for side in flow.size)
    if expected != (height, width):
        raise SettingError(
            f"the flow is of {flow.size[1]}x{flow.size[0]} pixels, the latent video of {width * factor}x"
            f"{height * factor} (width x height): expected equal sizes; estimate the flow on the video at the size of"
            " the result"
        )
