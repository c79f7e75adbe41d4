"""Where scenes may change, from a few stretches of a clip: for estimates, which cannot wait for all of it."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction

import av
import torch
from av.container.input import InputContainer
from av.error import FFmpegError
from av.video.stream import VideoStream
from torch import Tensor

from . import container
from .reader import VideoInfo, read_frames
from .scenes import find_cuts

#: Frames of a stretch, and so many stretches at most. A video this short is looked at whole.
STRETCH, MOST, SHORT = 8, 12, 48
#: Times as many seconds on the wall may go by: a busy machine gets its answer too, a slow disk is not waited for.
PATIENCE = 4
#: Cuts show at this width, which FFmpeg shrinks pictures to faster than anything else does.
_WIDTH = 256
#: Where the next stretch begins, on from the last: parts that are never near to one another, however many there are.
_GOLDEN = 0.6180339887


@dataclass(frozen=True)
class SampledCuts:
    """What was seen: `found` cuts in `looked` of `frames` frames, `pairs` of which were compared with the one before;
    and the `cuts` that are assumed of the whole, first frames of new scenes."""

    cuts: tuple[int, ...]
    found: int
    looked: int
    pairs: int
    frames: int

    def describe(self) -> str:
        """In words: what was looked at, what is assumed, and how sure that is."""
        if self.looked >= self.frames:
            return f"{len(self.cuts) + 1}, all {self.frames} frames looked at"
        seen = f"{len(self.cuts) + 1} assumed: {self.found} cut(s) in the {self.looked} of {self.frames} frames"
        if self.pairs == 0:
            return f"1 assumed: none of {self.frames} frames could be looked at"
        if self.found:
            return f"{seen} that were sampled (--cuts auto looks at all)"
        # None in n: the rule of three.
        return f"{seen} that were sampled (95 % sure of under 1 in {max(1, self.pairs // 3)}; --cuts auto looks at all)"


def sample_cuts(info: VideoInfo, start: int, stop: int, seconds: float = 0.7) -> SampledCuts:
    """Looks at stretches of frames [start, stop) for about so many of the processor's seconds, and takes the rest to be
    alike.

    A short clip is looked at whole. Of a longer one the cuts are spread evenly. Raises VideoError.
    """
    frames = stop - start
    if frames <= SHORT:
        cuts = find_cuts(frame.image for frame in read_frames(info, start, stop))
        return SampledCuts(cuts, len(cuts), frames, frames - 1, frames)
    began, found, looked, pairs = None, 0, 0, 0
    with closing(_stretches(info, start, frames)) as stretches:
        for stretch in stretches:
            found += len(find_cuts(stretch))
            looked, pairs = looked + len(stretch), pairs + max(len(stretch) - 1, 0)
            now = time.process_time(), time.perf_counter()
            began = began or now  # the first one has imported what finds cuts
            if now[0] - began[0] > seconds or now[1] - began[1] > PATIENCE * seconds:
                break
    count = round(found / pairs * (frames - 1)) if pairs else 0
    cuts = tuple(sorted({round((n + 1) * frames / (count + 1)) for n in range(count)} - {0, frames}))
    return SampledCuts(cuts, found, looked, pairs, frames)


def _stretches(info: VideoInfo, start: int, frames: int) -> Generator[list[Tensor]]:
    """Stretches of consecutive frames, spread over the clip."""
    firsts = [start + int((n * _GOLDEN % 1) * (frames - STRETCH)) for n in range(MOST)]
    if info.kind != "video":
        for first in firsts:
            yield [frame.image for frame in read_frames(info, first, first + STRETCH)]
        return
    source = container.open_input(info.path)
    with source:
        stream = container.picture_stream(source, info.path)
        stream.thread_type = "AUTO"
        size = (_WIDTH, max(2, round(_WIDTH * info.height / info.width)))
        for first in firsts:
            try:
                yield list(_from(source, stream, first / info.rate, size))
            except FFmpegError:
                return  # a container that does not seek


def _from(source: InputContainer, stream: VideoStream, moment: Fraction, size: tuple[int, int]) -> Generator[Tensor]:
    """Frames from a moment in seconds on, small, `(3, h, w)` in [0, 1]. They are decoded from the key frame before, but
    not taken from there: key frames stand where scenes begin, and would seem to be no cuts."""
    base = stream.time_base or Fraction(1, av.time_base)
    target = round(moment / base) + (stream.start_time or 0)
    source.seek(target, stream=stream)
    taken = 0
    for frame in source.decode(stream):
        if frame.pts is None or frame.pts < target:
            continue
        small = torch.as_tensor(frame.to_ndarray(width=size[0], height=size[1], format="rgb24"))
        yield small.permute(2, 0, 1) / 255
        taken += 1
        if taken == STRETCH:
            return
