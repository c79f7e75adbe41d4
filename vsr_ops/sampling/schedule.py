"""A run's noise levels: which step one belongs to, what that step propagates, and where the run stands in the model's
whole schedule.

A run need not go the whole way: at partial denoise it begins low, and where artists split the sigmas its first part
ends high and its second begins there. The same rules hold for all of them, in the host and without it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

Kind = Literal["plain", "sap", "tap"]

#: A run that begins above this share of the model's most noise begins at the top.
TOP = 0.9
#: How even spacing must be, and how whole the steps before it, for a run to be taken for a part of a longer one.
EVEN = 0.005
#: Where samplers space their steps evenly: Karras' schedule (rho 7), and the logarithm (SVD's own time, exponential).
PLACES: tuple[Callable[[float], float], ...] = (lambda sigma: sigma ** (1 / 7), math.log)


@dataclass(frozen=True)
class Step:
    """A sampling step: its index in the model's whole schedule, what it propagates, and TAP's direction in time."""

    index: int
    kind: Kind = "plain"
    forward: bool = True


def step_index(sigmas: Sequence[float], sigma: float) -> int:
    """Index of the last of the falling `sigmas` that is not below `sigma`: calls between two sigmas belong to the step
    that began above them, so a second-order sampler's two calls see one step."""
    slack = sigma * (1 - 1e-5)
    return max(bisect_right([-s for s in sigmas], -slack) - 1, 0)


def following(sigmas: Sequence[float], sigma: float) -> float:
    """The noise level that the step to which `sigma` belongs leads to."""
    return sigmas[min(step_index(sigmas, sigma) + 1, len(sigmas) - 1)]


def step_at(index: int, kinds: tuple[Kind, ...]) -> Step:
    """The kinds take turns; TAP steps alternate forward and backward."""
    if not kinds:
        return Step(index)
    round_, place = divmod(index, len(kinds))
    return Step(index, kinds[place], forward=round_ % 2 == 0)


def schedule_ends(sigmas: Sequence[float], model_max: float, model_min: float) -> tuple[float, float]:
    """The upper and lower sigma between which gamma falls (DC-VSR, equation 10), of a run with these falling `sigmas`.

    The run's own ends above zero; the model's where the run begins lower, after earlier steps, or leaves noise for
    later ones: so the parts of a split run take gamma as the whole does.
    """
    above = [sigma for sigma in sigmas if sigma > 0]
    whole = above[0] >= TOP * model_max and steps_before(sigmas, model_max) == 0
    upper = above[0] if whole else model_max
    lower = above[-1] if sigmas[-1] == 0 and len(above) > 1 else model_min
    return upper, lower


def steps_before(sigmas: Sequence[float], model_max: float) -> int:
    """How many steps of the model's whole schedule lie before a run with these falling `sigmas`: SAP and TAP take turns
    from there on, as they would have in one run.

    Read from the run's own spacing, where that is even in one of PLACES. 0 where it is in none, as the other schedules'
    are, where the steps before are no whole number, and for a run of two steps or fewer.
    """
    above = [sigma for sigma in sigmas if sigma > 0]
    if len(above) < 3:
        return 0
    for place in PLACES:
        gaps = [place(a) - place(b) for a, b in pairwise(above)]
        gap = sum(gaps) / len(gaps)
        before = (place(model_max) - place(above[0])) / gap
        if max(abs(each - gap) for each in gaps) < EVEN * gap and abs(before - round(before)) < EVEN * max(before, 1):
            return max(round(before), 0)
    return 0
