"""Steps and gamma of runs that go a part of the way: as in the run that goes all of it."""

from __future__ import annotations

import math

import pytest

from vsr_ops.sampling.guidance import gamma_at
from vsr_ops.sampling.schedule import following, schedule_ends, step_at, step_index, steps_before

MOST, LEAST = 700.0, 0.002


def karras(steps: int) -> list[float]:
    ends = (MOST ** (1 / 7), LEAST ** (1 / 7))
    return [(ends[0] + (ends[1] - ends[0]) * i / (steps - 1)) ** 7 for i in range(steps)] + [0.0]


def exponential(steps: int) -> list[float]:
    ends = (math.log(MOST), math.log(LEAST))
    return [math.exp(ends[0] + (ends[1] - ends[0]) * i / (steps - 1)) for i in range(steps)] + [0.0]


SCHEDULES = {"karras": karras, "exponential": exponential}


def told(sigmas: list[float], sigma: float) -> tuple[float, object]:
    """Gamma and the kind of step at one of a run's sigmas."""
    gamma = gamma_at(sigma, *schedule_ends(sigmas, MOST, LEAST))
    return gamma, step_at(steps_before(sigmas, MOST) + step_index(sigmas, sigma), ("sap", "tap"))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [5, 10, 25, 100])
def test_a_split_run_is_the_whole_one_in_two(name: str, steps: int) -> None:
    whole = SCHEDULES[name](steps)
    for at in range(1, steps - 2):
        for part in (whole[: at + 1], whole[at:]):
            for sigma in (sigma for sigma in part[:-1] if sigma > 0):
                gamma, step = told(part, sigma)
                expected, kind = told(whole, sigma)
                assert gamma == pytest.approx(expected, abs=1e-6) and step == kind, (at, sigma)


@pytest.mark.parametrize("name", SCHEDULES)
def test_partial_denoise_begins_where_the_longer_schedule_would_be(name: str) -> None:
    whole = SCHEDULES[name](20)
    assert steps_before(whole, MOST) == 0 and steps_before(whole[-11:], MOST) == 10
    assert told(whole[-11:], whole[10])[0] < 1


def timesteps(steps: int) -> list[float]:
    """As DDIM's, which begin one step short of the most noise: a whole run all the same."""
    return [math.exp(5 * (t - 999) / 999) * MOST for t in range(1 + 1000 // steps * (steps - 1), 0, -1000 // steps)] + [
        0.0
    ]


@pytest.mark.parametrize(
    "run",
    [timesteps(10), timesteps(25), [300.0, 200.0, 30.0, 1.0, 0.0], [MOST, 0.0], [3.0, 1.0, 0.0], [0.5, 0.0]],
    ids=["leading, 10 steps", "leading, 25 steps", "by hand", "one step", "two steps", "one, partial"],
)
def test_what_cannot_be_told_counts_from_the_runs_own_start(run: list[float]) -> None:
    assert steps_before(run, MOST) == 0


@pytest.mark.parametrize(
    ("run", "ends"),
    [
        ([700.0, 10.0, 0.002, 0.0], (700.0, 0.002)),
        ([650.0, 3.0, 0.0], (650.0, 3.0)),
        ([20.0, 3.0, 0.0], (700.0, 3.0)),
        ([700.0, 20.0, 3.0], (700.0, 0.002)),
        ([20.0, 3.0], (700.0, 0.002)),
        ([20.0, 0.0], (700.0, 0.002)),
    ],
    ids=["whole", "nearly", "begun elsewhere", "to be gone on from", "between", "one step"],
)
def test_ends_are_the_runs_own_where_it_has_them(run: list[float], ends: tuple[float, float]) -> None:
    assert schedule_ends(run, 700.0, 0.002) == ends


def test_a_step_leads_to_the_next_level_from_wherever_it_is_asked() -> None:
    """A second-order sampler asks between two levels, an ancestral one above the first by its own noise."""
    levels = [14.0, 3.0, 0.5, 0.0]
    asked = {15.0: 3.0, 14.0: 3.0, 8.0: 3.0, 3.0: 0.5, 3.0 * (1 - 1e-6): 0.5, 2.9: 0.5, 0.5: 0.0, 0.1: 0.0}
    assert {sigma: following(levels, sigma) for sigma in asked} == asked


def test_one_step_has_all_of_gamma() -> None:
    assert gamma_at(MOST, *schedule_ends([MOST, 0.0], MOST, LEAST)) == 1.0
    assert 0 < gamma_at(20.0, *schedule_ends([20.0, 0.0], MOST, LEAST)) < 1
