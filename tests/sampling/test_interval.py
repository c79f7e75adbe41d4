"""Guidance in an interval and kept between steps: whole and at every step it is what it was, else one pass."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.support.tensors import randn, relative
from vsr_ops.errors import SettingError
from vsr_ops.sampling.guidance import COND, GUIDANCE, Branch, GuidanceScale
from vsr_ops.sampling.interval import Act, GuidanceInterval, IntervalGuidance

SHAPE = (2, 4, 8, 8)
#: Falling noise levels, without the final 0.
SIGMAS = [700.0, 200.0, 50.0, 10.0, 2.0, 0.4, 0.05, 0.002]
POWER = GuidanceScale(2.0, 0.5, 0.5)


class Model:
    """Answers linearly in x, otherwise in each branch, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, x: Tensor, branch: Branch) -> tuple[Tensor, Tensor | None]:
        self.asked.append(branch.name)
        shift = 0.1 * len(branch.name) + (0.3 if branch.conditional else -0.2)
        return 0.7 * x + shift * x.roll(1, -1), torch.full((2, 1, 8, 8), 0.5) if branch.observe else None


def x_at(step: int) -> Tensor:
    return randn(*SHAPE, seed=step)


def run(name: str, interval: GuidanceInterval, steps: int = len(SIGMAS)) -> tuple[list[Tensor], list[list[str]]]:
    """Every step's estimate, and the branches that it asked for."""
    guidance = IntervalGuidance(GUIDANCE[name].predict, interval.acts(SIGMAS[:steps]))
    found: list[Tensor] = []
    asked: list[list[str]] = []
    for step in range(steps):
        model = Model()
        found.append(guidance.predict(step, model, x_at(step), POWER))
        asked.append(model.asked)
    return found, asked


@pytest.mark.parametrize("name", GUIDANCE)
def test_everywhere_and_at_every_step_it_is_the_strategy_exactly(name: str) -> None:
    for interval in (GuidanceInterval(), GuidanceInterval(0.0, math.inf, 1), GuidanceInterval(0.001, 1e4)):
        found, asked = run(name, interval)
        for step, (estimate, branches) in enumerate(zip(found, asked, strict=True)):
            model = Model()
            assert torch.equal(estimate, GUIDANCE[name].predict(model, x_at(step), POWER))
            assert branches == model.asked


@pytest.mark.parametrize("name", GUIDANCE)
def test_outside_it_is_the_conditional_branch_in_one_pass(name: str) -> None:
    found, asked = run(name, GuidanceInterval(0.1, 100.0))
    for step, sigma in enumerate(SIGMAS):
        if not 0.1 <= sigma <= 100:
            assert asked[step] == [COND.name]
            assert torch.equal(found[step], Model()(x_at(step), COND)[0])
        elif name != "none":
            assert len(asked[step]) > 1


@pytest.mark.parametrize("name", [name for name in GUIDANCE if name != "none"])
def test_a_kept_difference_is_that_of_the_step_where_it_was_found(name: str) -> None:
    found, asked = run(name, GuidanceInterval(every=3))
    kept: Tensor | None = None
    # Steps 2, 5 ... of the schedule, and the first.
    for step in range(len(SIGMAS)):
        plain = Model()(x_at(step), COND)[0].double()
        if step in (0, 2, 5):
            kept = GUIDANCE[name].predict(Model(), x_at(step), POWER).double() - plain
            assert len(asked[step]) == GUIDANCE[name].passes(POWER)
        else:
            assert asked[step] == [COND.name]
        assert kept is not None and relative(found[step], plain + kept) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_inputs_dtype_comes_out(dtype: torch.dtype) -> None:
    guidance = IntervalGuidance(GUIDANCE["dssag"].predict, ["new", "kept", "off"])
    for step in range(3):
        assert guidance.predict(step, Model(), x_at(step).to(dtype), POWER).dtype == dtype


@pytest.mark.parametrize(
    ("interval", "before", "expected"),
    [
        (GuidanceInterval(), 0, "nnnnnnnn"),
        (GuidanceInterval(every=2), 0, "nnknknkn"),
        (GuidanceInterval(every=2), 1, "nknknknk"),
        (GuidanceInterval(every=100), 0, "nkkkkkkk"),
        (GuidanceInterval(0.1, 100.0), 0, "oonnnnoo"),
        (GuidanceInterval(0.1, 100.0, 2), 0, "oonnknoo"),
        (GuidanceInterval(0.1, 100.0, 3), 0, "oonkknoo"),
        (GuidanceInterval(0.4, 50.0), 0, "oonnnnoo"),
        (GuidanceInterval(0.1, 0.2), 0, "oooooooo"),
    ],
)
def test_what_each_step_does(interval: GuidanceInterval, before: int, expected: str) -> None:
    names: dict[str, Act] = {"n": "new", "k": "kept", "o": "off"}
    assert interval.acts(SIGMAS, before) == [names[letter] for letter in expected]


def test_a_split_run_goes_on_where_the_first_part_stopped() -> None:
    """But for the first step of the second part, which has nothing to add yet."""
    for interval in (GuidanceInterval(every=2), GuidanceInterval(0.1, 300.0, 3)):
        whole = interval.acts(SIGMAS)
        for cut in range(1, len(SIGMAS)):
            first, second = interval.acts(SIGMAS[:cut]), interval.acts(SIGMAS[cut:], cut)
            assert first == whole[:cut]
            start = next((i for i, act in enumerate(second) if act != "off"), len(second))
            assert second[start + 1 :] == whole[cut + start + 1 :]


def test_an_even_rate_is_found_anew_at_tap_steps() -> None:
    """SAP and TAP take turns from 0 on: lagged SAP reads the step before, at which a branch may not have run."""
    acts = GuidanceInterval(every=2).acts([float(sigma) for sigma in range(40, 0, -1)])
    assert all(index % 2 == 1 for index, act in enumerate(acts) if act == "new" and index > 0)
    assert all({one, other} == {"new", "kept"} for one, other in pairwise(acts[1:]))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((-1.0, 5.0, 1), "interval is -1 to 5"),
        ((5.0, 5.0, 1), "interval is 5 to 5"),
        ((math.nan, 5.0, 1), "interval is nan to 5"),
        ((0.0, math.nan, 1), "interval is 0 to nan"),
        ((0.0, 5.0, 0), r"every 0\. step"),
    ],
)
def test_what_cannot_be_is_refused(values: tuple[float, float, int], words: str) -> None:
    with pytest.raises(SettingError, match=words) as caught:
        GuidanceInterval(*values)
    assert "expected" in str(caught.value) and "\n" not in str(caught.value)
