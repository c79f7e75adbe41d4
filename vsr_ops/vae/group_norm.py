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
    return together([(statistics_of(norm, x), x[0].numel() // norm.num_groups)])


def together(parts: Sequence[tuple[tuple[Tensor, Tensor], int]]) -> Moments:
    """The moments of several parts' values together, of what `statistics_of` says of each and their counts."""
    means, variances = (torch.stack([exact(part[0][side]) for part in parts]) for side in (0, 1))
    total = sum(count for _, count in parts)
    shares = exact(torch.tensor([count / total for _, count in parts], device=means.device)).view(-1, 1, 1)
    mean = (shares * means).sum(0)
    return Moments(total, mean, (shares * (variances + (means - mean).square())).sum(0))


def statistics_of(norm: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance `(n, groups)` of each group of `(n, c, ...)`, float32 or wider."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        values = x.reshape(x.shape[0], norm.num_groups, -1).float()
        variance, mean = torch.var_mean(values, -1, correction=0)
        return mean, variance
    # Several times as fast here as var_mean, and as exact.
    if layout_of(x) is torch.channels_last:
        values = x.permute(0, 2, 3, 1).flatten(1, 2)
        means = values.mean(1, keepdim=True)
        variances = (values - means).square_().mean(1)
        means, variances = (side.view(len(x), norm.num_groups, -1) for side in (means, variances))
        mean = means.mean(-1, keepdim=True)
        return mean[..., 0], (variances + (means - mean).square()).mean(-1)
    shape = (x.shape[0], norm.num_channels, x[0, 0].numel(), norm.num_groups)
    _, mean, scale = torch.native_group_norm(x.contiguous(), None, None, *shape, norm.eps)
    return mean, exact(scale).pow(-2) - norm.eps


def over_frames(moments: Moments) -> Moments:
    """Of all n together, as one."""
    mean = moments.mean.mean(0, keepdim=True)
    variance = moments.variance.mean(0, keepdim=True) + (moments.mean - mean).square().mean(0, keepdim=True)
    return Moments(moments.count * moments.mean.shape[0], mean, variance)


def layout_of(x: Tensor) -> torch.memory_format:
    """How `(n, c, h, w)` lies in memory, roughly: channels last, or not."""
    last = x.ndim == 4 and x.shape[1] > 1 and x.stride(1) == 1
    return torch.channels_last if last else torch.contiguous_format


def affine_of(norm: nn.GroupNorm, moments: Moments, ndim: int) -> tuple[Tensor, Tensor]:
    """The factor and the summand `(n or 1, c, 1, ...)`, float32, that normalise `(n, c, ...)` of so many dimensions."""
    tail = (1,) * (ndim - 2)
    scale = (moments.variance + norm.eps).rsqrt()
    each = norm.num_channels // norm.num_groups
    scale, shift = (
        side.float().repeat_interleave(each, -1).reshape(-1, norm.num_channels, *tail)
        for side in (scale, -moments.mean * scale)
    )
    if norm.affine:
        weight, bias = (side.to(scale).reshape(-1, *tail) for side in (norm.weight, norm.bias))
        scale, shift = scale * weight, shift * weight + bias
    return scale, shift


def affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`x * scale + shift` in x's precision; of a part of a larger picture, a third of the time of both in one."""
    return torch.mul(x, scale).add_(shift).to(x.dtype)


def normalised(norm: nn.GroupNorm, x: Tensor, moments: Moments) -> Tensor:
    """`(n, c, ...)` normalised by `moments` of n or of one, in its own precision."""
    return affine(x, *affine_of(norm, moments, x.ndim))


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
