"""Guidance where it pays: at the noise levels of an interval, its passes spent at every n-th step.

Guidance is worth little at the highest noise levels and next to nothing at the lowest (the guidance interval:
Kynkäänniemi et al., NeurIPS 2024, arXiv 2404.07724), and what it adds to the estimate changes slowly from step to step,
so that it can be kept (FasterCache, arXiv 2410.19355, keeps CFG's). Both hold for any strategy: what it adds is the
difference of the guided estimate and the conditional branch's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from ..errors import SettingError
from .guidance import COND, Branch, Denoise, GuidanceScale, Predict

Act = Literal["off", "kept", "new"]
"""What guidance does at a step: nothing, add the difference that was kept, or find it anew."""


#: More than any model's most noise: what stands for an interval without an upper end where a number must.
ALL_NOISE = 10000.0


@dataclass(frozen=True)
class GuidanceInterval:
    """Steps whose sigma lies in [`sigma_min`, `sigma_max`] are guided, all others take the conditional branch alone.
    The branches are evaluated at every `every`-th step of the model's schedule and at the first guided one; the guided
    steps between add the difference of the last of these. Raises SettingError."""

    sigma_min: float = 0.0
    sigma_max: float = math.inf
    every: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.sigma_min < self.sigma_max:
            raise SettingError(
                f"the guidance interval is {self.sigma_min:g} to {self.sigma_max:g}: expected noise levels from 0, the"
                " lower one below the upper one"
            )
        if self.every < 1:
            raise SettingError(f"guidance at every {self.every}. step: expected a whole number from 1 (every step)")

    @property
    def everywhere(self) -> bool:
        """Whether it leaves every step as it is."""
        return self.sigma_min == 0 and self.sigma_max >= ALL_NOISE and self.every == 1

    def acts(self, sigmas: Sequence[float], before: int = 0) -> list[Act]:
        """What guidance does at each of a run's falling noise levels (without the final 0), of which `before` steps of
        the model's whole schedule come first."""
        found: list[Act] = []
        for index, sigma in enumerate(sigmas, before):
            if not self.sigma_min <= sigma <= self.sigma_max:
                found.append("off")
            else:
                due = index % self.every == self.every - 1 or "new" not in found
                found.append("new" if due else "kept")
        return found


EVERY_STEP = GuidanceInterval()


def check_guided(guidance: str, interval: GuidanceInterval) -> None:
    """Raises SettingError for an interval of a guidance that is none."""
    if guidance == "none" and not interval.everywhere:
        raise SettingError(
            "an interval of guidance is given, or steps that keep it, but guidance is none: expected a guidance;"
            " choose one, or leave them out"
        )


def difference(guided: Tensor, plain: Tensor) -> Tensor:
    """What guidance added to an estimate, float32."""
    return guided.float() - plain.float()


def add_difference(plain: Tensor, kept: Tensor) -> Tensor:
    """An estimate with what guidance added at another step."""
    return (plain.float() + kept).to(plain.dtype)


@dataclass
class IntervalGuidance:
    """A strategy over the steps of a run, of which `acts` says what it does at each. The difference is held only while
    a step to come adds it."""

    strategy: Predict
    acts: Sequence[Act]
    _kept: Tensor | None = field(default=None, init=False)

    def predict(self, step: int, denoise: Denoise, x: Tensor, strength: GuidanceScale) -> Tensor:
        """The estimate of step number `step` of the run; steps are asked for in order."""
        act, following = self.acts[step], self.acts[step + 1 : step + 2]
        if act == "off":
            return denoise(x, COND)[0]
        if act == "kept":
            assert self._kept is not None, "the first guided step finds its difference"
            return add_difference(denoise(x, COND)[0], self._kept)
        self._kept = None
        if following != ["kept"]:
            return self.strategy(denoise, x, strength)
        plain: list[Tensor] = []

        def watched(x: Tensor, branch: Branch) -> tuple[Tensor, Tensor | None]:
            found = denoise(x, branch)
            if branch.name == COND.name:
                plain.append(found[0])
            return found

        guided = self.strategy(watched, x, strength)
        self._kept = difference(guided, plain[0])
        return guided
