"""What the papers published: whole rows, each beside the metric of its channels."""

from __future__ import annotations

import math

from vsr_ops.metrics.published import PUBLISHED, published
from vsr_ops.metrics.table import METRICS


def test_every_published_row_has_a_number_for_each_method() -> None:
    tables = published("all")
    assert len(tables) == 3 + 9 + 2 and {"none", "dc-vsr", "sdatc", "sateco", "all"} == set(PUBLISHED)
    for part in tables:
        assert part.rows and part.beside(METRICS) == part.rows
        for values in part.rows.values():
            assert len(values) == len(part.methods) and all(math.isfinite(float(value)) for value in values)
    (dcvsr,) = (part for part in tables if part.dataset == "UDM10")
    assert dict(zip(dcvsr.methods, dcvsr.rows["tOF"], strict=True))["DC-VSR"] == "1.04"


def test_published_rows_stand_beside_the_metric_of_their_channels() -> None:
    """SATeCo's REDS4 is of RGB (its BasicVSR is BasicVSR's own 31.42 of RGB), its Vid4 and all of SDATC's of Y; DC-VSR
    does not say, so that it stands beside either."""
    found: dict[str, set[str]] = {}
    for part in published("all"):
        paper = part.source.split(",")[0]
        for name in ("psnr", "psnr_y"):
            if part.beside([name]):
                found.setdefault(f"{paper} {name}", set()).add(part.dataset.split(",")[0])
    assert found == {
        "SATeCo psnr": {"REDS4"},
        "SATeCo psnr_y": {"Vid4"},
        "SDATC psnr_y": {"REDS4", "Vid4", "UDM10"},
        "DC-VSR psnr": {"REDS4", "UDM10"},
        "DC-VSR psnr_y": {"REDS4", "UDM10"},
    }
    reds4 = next(part for part in published("sateco") if part.dataset == "REDS4")
    assert dict(zip(reds4.methods, reds4.rows["PSNR (RGB)"], strict=True))["BasicVSR"] == "31.42"
    assert all("does not say" in part.source for part in published("dc-vsr"))
