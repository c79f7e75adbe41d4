"""Names that help shows, against the tables that they stand for."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from vsr_ops import names
from vsr_ops.backbones.svd import DTYPES
from vsr_ops.cli import flow, options
from vsr_ops.cli.commands import COMMANDS
from vsr_ops.image.color import COLOR
from vsr_ops.metrics.published import PUBLISHED
from vsr_ops.metrics.table import METRICS
from vsr_ops.sampling import align
from vsr_ops.sampling.guidance import GUIDANCE
from vsr_ops.sampling.layouts import LAYOUTS
from vsr_ops.sampling.propagation import PROPAGATION
from vsr_ops.sampling.samplers import SAMPLERS
from vsr_ops.video import CODECS

#: Those that are no table's: all there is to them is the name.
ALONE = {"SAP_MODES", "BRANCH_MODES", "PREDICTIONS"}
TABLES: dict[str, Iterable[str]] = {
    "GUIDANCE": GUIDANCE,
    "LAYOUTS": LAYOUTS,
    "PROPAGATION": PROPAGATION,
    "SAMPLERS": SAMPLERS,
    "ALIGN_MODES": align.MODES,
    "ALIGN_SCALES": align.SCALES,
    "FLOWS": flow.FLOWS,
    "COLOR": COLOR,
    "DTYPES": DTYPES,
    "CODECS": CODECS,
    "METRICS": METRICS,
    "PUBLISHED": PUBLISHED,
}


@pytest.mark.parametrize("name", TABLES)
def test_names_are_the_tables(name: str) -> None:
    assert getattr(names, name) == tuple(TABLES[name])


def test_no_names_are_left_out() -> None:
    assert {name for name in vars(names) if name.isupper()} == {*TABLES, *ALONE}
    assert list(COMMANDS) == list(options.COMMANDS)
