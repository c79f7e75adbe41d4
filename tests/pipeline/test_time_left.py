"""How long a job still takes: a law, on simulated jobs whose stages weigh differently and keep to their plan or not."""

from __future__ import annotations

import pytest

from vsr_ops.pipeline.time_left import TimeLeft

#: Seconds of a job's stages as they are, and into how many parts each is reported.
STAGES = {"encode": (70.0, 24), "sample": (330.0, 400), "decode": (280.0, 24)}
WHOLE = sum(seconds for seconds, _ in STAGES.values())


def said(planned: dict[str, float], uneven: float = 0.0) -> list[tuple[float, float]]:
    """(seconds really left, seconds said to be left) at every report of the job. `uneven` is how much more the even
    parts of sampling take than the odd ones: SAP's steps and TAP's."""
    now = 0.0
    left, found = TimeLeft(planned, lambda: now), list[tuple[float, float]]()
    for stage, (seconds, parts) in STAGES.items():
        began = now
        for part in range(parts + 1):
            rough = uneven * seconds / parts * (part // 50 % 2) if stage == "sample" and part < parts else 0.0
            now = began + seconds * part / parts + rough
            left.report(stage, part, parts)
            found.append((WHOLE - now, left.seconds()))
    return found


def worst(found: list[tuple[float, float]], share: float = 0.1) -> float:
    """The largest factor by which it was wrong from this share of the job on, but for the last two per cent."""
    return max(max(real / told, told / real) for real, told in found if 0.02 * WHOLE < real <= (1 - share) * WHOLE)


def true(factor: float = 1.0, **factors: float) -> dict[str, float]:
    return {stage: seconds * factor * factors.get(stage, 1.0) for stage, (seconds, _) in STAGES.items()}


def test_a_plan_that_comes_true_is_said_to_the_second() -> None:
    assert worst(said(true()), 0.0) == pytest.approx(1)
    assert said(true())[-1][1] == pytest.approx(0)


@pytest.mark.parametrize("factor", [0.4, 0.5, 0.8, 1.5, 3.0])
def test_a_machine_slower_or_faster_than_planned_is_noticed(factor: float) -> None:
    """Within a quarter from a tenth of the job on, however far off the plan was."""
    assert worst(said(true(factor))) < 1.25
    assert worst(said(true(factor)), 0.5) < 1.1


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("factor", [0.83, 1.2])
def test_a_stage_that_was_planned_wrong_spoils_little(stage: str, factor: float) -> None:
    assert worst(said(true(**{stage: factor}))) < 1.25


def test_steps_that_take_turns_do_not_make_it_jump() -> None:
    assert worst(said(true(), uneven=3.0)) < 1.1


def test_the_plan_is_what_makes_it_right() -> None:
    """A plan that knows nothing of the stages' weights is off by a factor, by the same law."""
    assert worst(said(dict.fromkeys(STAGES, WHOLE / 3))) > 1.6
