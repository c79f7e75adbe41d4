"""From one noise level of a run to the next: the samplers of the pipeline without a host.

In EDM's variables, where x is x0 plus noise of deviation sigma. Stable Diffusion's own z is x / sqrt(1 + sigma^2).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from ..errors import SettingError

Sampler = Callable[[Tensor, Tensor, float, float, Callable[[], Tensor]], Tensor]
"""The next x of `x`, its denoised estimate x0, sigma, the following sigma below it, and what draws noise like x of
deviation 1. All tensors (n, c, h, w)."""


def euler(x: Tensor, x0: Tensor, sigma: float, following: float, draw: Callable[[], Tensor]) -> Tensor:
    """Euler's step of the probability flow: no noise (Karras et al., NeurIPS 2022)."""
    return x0 + (x - x0) * (following / sigma)


def ddpm(x: Tensor, x0: Tensor, sigma: float, following: float, draw: Callable[[], Tensor]) -> Tensor:
    """A step of DDPM (SDATC, equation 3; Ho et al., NeurIPS 2020): a draw from q(x_following | x, x0).

    Mean and variance are the posterior's of the chain that visits the run's noise levels alone ("fixed small"), so that
    the last step, to 0, ends in x0 and draws nothing.
    """
    mean = x0 + (x - x0) * (following**2 / sigma**2)
    return mean + draw() * step_variance(sigma, following) ** 0.5 if following > 0 else mean


def step_variance(sigma: float, following: float) -> float:
    """Variance of the noise that a DDPM step adds to x: s'^2 (s^2 - s'^2) / s^2, with s' the following sigma.

    Of z it is that by 1 + s'^2: beta (1 - a') / (1 - a), with a and a' what is left of the picture's variance before
    and after.
    """
    return following**2 * max(0.0, 1 - following**2 / sigma**2)


def dpmpp_2m() -> Sampler:
    """DPM-Solver++(2M), second order at one evaluation a step (Lu et al., arXiv 2211.01095, algorithm 2).

    Euler's step towards an estimate that the step before's extrapolates by half of this step, in ln sigma. The first
    step, and the last, to 0, are Euler's, as in k-diffusion, whose sampler of this name ComfyUI has.
    """
    earlier: tuple[Tensor, float] | None = None

    def step(x: Tensor, x0: Tensor, sigma: float, following: float, draw: Callable[[], Tensor]) -> Tensor:
        nonlocal earlier
        towards = x0
        if earlier is not None and following > 0:
            older, above = earlier
            towards = x0 + (x0 - older) * (math.log(sigma / following) / (2 * math.log(above / sigma)))
        earlier = (x0, sigma)
        return euler(x, towards, sigma, following, draw)

    return step


SAMPLERS: dict[str, Callable[[], Sampler]] = {"euler": lambda: euler, "ddpm": lambda: ddpm, "dpmpp_2m": dpmpp_2m}
"""By name: what makes the sampler of one run, which may remember that run's steps."""


def check_sampler(name: str) -> None:
    """Raises SettingError for an unknown sampler."""
    if name not in SAMPLERS:
        raise SettingError(f"sampler is {name!r}: expected one of {', '.join(SAMPLERS)}; choose one of them")
