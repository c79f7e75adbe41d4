"""Decoding in tiles waits for the device once a pass over them, not at every norm of every tile."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.small_vaes import noise, picture_vae, stream, video_vae
from tests.support.waits import Waits


@pytest.mark.parametrize("make", [picture_vae, video_vae])
def test_a_pass_over_the_tiles_reads_one_value(make: Any) -> None:
    vae, z = make(), noise(2, 4, 9, 14)
    tiles: list[int] = []
    with Waits() as waits:
        frames = list(stream(vae, z, tile=7, kept=0.0, check_interrupted=lambda: tiles.append(1)))
    # Four tiles and the mosaic a pass; a decoder that sees no time takes the frames one by one.
    passes = len(tiles) // 5
    assert len(frames) == 2 and passes >= 4
    assert waits.reads == passes
