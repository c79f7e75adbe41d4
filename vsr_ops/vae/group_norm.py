"""Group-norm statistics of a whole picture, gathered and applied tile by tile."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from .layout import DecoderOp


def exact(x: Tensor) -> Tensor:
    """In float64, where a device has it; Apple's has not."""
    return x.float() if x.device.type == "mps" else x.double()


@dataclass(frozen=True)
class Moments:
    """Mean and variance `(n, groups)` of `count` values each, on the activations' device, `exact`."""

    count: int
    mean: Tensor
    variance: Tensor

    def with_more(self, more: Moments) -> Moments:
        """Those of both sets of values together."""
        total = self.count + more.count
        apart = more.mean - self.mean
        share = more.count / total
        variance = torch.lerp(self.variance, more.variance, share) + apart.square() * (share * (1 - share))
        return Moments(total, self.mean + apart * share, variance)

    def distance(self, other: Moments, eps: float) -> Tensor:
        """The largest difference of a mean or deviation, in the other's deviations; a number that nobody waits for."""
        deviation = (other.variance + eps).sqrt()
        apart = torch.maximum((self.mean - other.mean).abs(), ((self.variance + eps).sqrt() - deviation).abs())
        return (apart / deviation).max()


def moments_of(norm: nn.GroupNorm, x: Tensor) -> Moments:
    """Those of each group of `(n, c, ...)`."""
    if x.device.type == "cpu" and x.dtype == torch.float32:
        # Ten times as fast here as var_mean, and as exact; it makes the normalised values, too.
        shape = (x.shape[0], norm.num_channels, x[0, 0].numel(), norm.num_groups)
        x = x if x.is_contiguous(memory_format=layout_of(x)) else x.contiguous()
        _, mean, scale = torch.native_group_norm(x, None, None, *shape, norm.eps)
        mean, variance = exact(mean), exact(scale).pow(-2) - norm.eps
    else:
        values = x.reshape(x.shape[0], norm.num_groups, -1).float()
        variance, mean = (exact(side) for side in torch.var_mean(values, -1, correction=0))
    return Moments(x[0].numel() // norm.num_groups, mean, variance)


def over_frames(moments: Moments) -> Moments:
    """Of all n together, as one."""
    mean = moments.mean.mean(0, keepdim=True)
    variance = moments.variance.mean(0, keepdim=True) + (moments.mean - mean).square().mean(0, keepdim=True)
    return Moments(moments.count * moments.mean.shape[0], mean, variance)


def layout_of(x: Tensor) -> torch.memory_format:
    """How `(n, c, h, w)` lies in memory, roughly: channels last, or not."""
    last = x.ndim == 4 and x.shape[1] > 1 and x.stride(1) == 1
    return torch.channels_last if last else torch.contiguous_format


def normalised(norm: nn.GroupNorm, x: Tensor, moments: Moments) -> Tensor:
    """`(n, c, ...)` normalised by `moments` of n or of one, in its own precision."""
    tail = (1,) * (x.ndim - 2)
    scale = (moments.variance + norm.eps).rsqrt()
    each = norm.num_channels // norm.num_groups
    scale, shift = (
        side.float().repeat_interleave(each, -1).reshape(-1, norm.num_channels, *tail)
        for side in (scale, -moments.mean * scale)
    )
    if norm.affine:
        weight, bias = (side.to(scale).reshape(-1, *tail) for side in (norm.weight, norm.bias))
        scale, shift = scale * weight, shift * weight + bias
    # A product and a sum: of a part of a larger picture that takes a third of the time of both in one.
    return torch.mul(x, scale).add_(shift).to(x.dtype)


@dataclass
class Statistics:
    """What the group norms of some steps take for mean and variance, and what they see meanwhile.

    `sketch` are the moments of the mosaic, `offset` what has to be added to its means and by what its variances have to
    be multiplied to give the whole picture's. `inner` is the part of the activations that belongs to this tile alone;
    None where nothing is gathered.
    """

    steps: Sequence[DecoderOp]
    used: dict[nn.GroupNorm, Moments] = field(default_factory=lambda: {})
    seen: dict[nn.GroupNorm, Moments] = field(default_factory=lambda: {})
    sketch: dict[nn.GroupNorm, Moments] = field(default_factory=lambda: {})
    offset: dict[nn.GroupNorm, tuple[Tensor, Tensor]] = field(default_factory=lambda: {})
    inner: tuple[slice, slice] | None = None
    sketching: bool = False

    @property
    def norms(self) -> list[nn.GroupNorm]:
        """The norms of all steps, in running order."""
        return [norm for step in self.steps for norm in step.norms]

    @contextlib.contextmanager
    def applied(self) -> Generator[None, None, None]:
        """Within, the steps' norms take these statistics instead of their input's."""
        norms: list[Any] = self.norms
        # Another's forward, such as an offloading hook's, comes back afterwards.
        before: list[Any] = [cast("dict[str, Any]", norm.__dict__).get("forward") for norm in norms]
        for norm in norms:
            norm.forward = partial(self._normalise, norm)
        try:
            yield
        finally:
            for norm, forward in zip(norms, before, strict=True):
                del norm.forward
                if forward is not None:
                    norm.forward = forward

    def _normalise(self, norm: nn.GroupNorm, x: Tensor) -> Tensor:
        if self.inner is not None:
            self._gather(norm, x[(..., *self.inner)])
        return normalised(norm, x, self.used[norm])

    def _gather(self, norm: nn.GroupNorm, own: Tensor) -> None:
        moments = moments_of(norm, own)
        if not self.sketching:
            self.seen[norm] = self.seen[norm].with_more(moments) if norm in self.seen else moments
            return
        self.sketch[norm] = self.used[norm] = moments
        if norm in self.offset:
            difference, factor = self.offset[norm]
            variance = ((moments.variance + norm.eps) * factor - norm.eps).clamp(min=0)
            self.used[norm] = Moments(moments.count, moments.mean + difference, variance)

    def settle(self) -> list[Tensor]:
        """Ends a pass over the tiles; returns by how much what they took was off what they saw, in deviations, norm by
        norm."""
        moved: list[Tensor] = []
        for norm, seen in self.seen.items():
            moved.append(self.used[norm].distance(seen, norm.eps))
            sketch = self.sketch[norm]
            factor = (seen.variance + norm.eps) / (sketch.variance + norm.eps)
            self.offset[norm] = (seen.mean - sketch.mean, factor)
        self.used = self.seen
        self.seen = {}
        return moved

    def lend(self) -> None:
        """Leaves the last frame's offsets for the next frames to begin with."""
        self.offset = {norm: (difference[-1:], factor[-1:]) for norm, (difference, factor) in self.offset.items()}
