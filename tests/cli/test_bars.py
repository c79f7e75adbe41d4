"""What is shown while a command works."""

from __future__ import annotations

import pytest

from vsr_ops.cli.bars import Bars


def test_the_time_left_is_that_of_all_stages(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a job planned to take an hour, nothing of which is done, whatever the stage under way would take."""
    bars = Bars({"encode": 600.0, "sample": 2400.0, "decode": 600.0})
    bars("encode", 0, 24)
    bars._bar.refresh()
    bars.close()
    said = capsys.readouterr().err
    assert "encode:   0%" in said and "60 minutes left in all" in said


def test_without_a_plan_each_bar_says_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    bars = Bars()
    for stage in ("encode", "sample"):
        for done in range(3):
            bars(stage, done, 2)
    bars.close()
    said = capsys.readouterr().err
    assert "encode: 100%" in said and "sample: 100%" in said and "tile" in said and "left in all" not in said
