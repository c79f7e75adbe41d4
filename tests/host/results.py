"""What a run saved, fetched as the page fetches it."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import av
import numpy as np
from PIL import Image, ImageSequence

if TYPE_CHECKING:
    from tests.host.conftest import Server

VIDEOS = (".mp4", ".webm", ".mkv")


def frames_of(content: bytes, video: bool) -> list[np.ndarray]:
    """The frames of a file, `(height, width, 3)` in [0, 1]."""
    if video:
        with av.open(io.BytesIO(content)) as container:
            return [frame.to_ndarray(format="rgb24") / 255 for frame in container.decode(video=0)]
    with Image.open(io.BytesIO(content)) as opened:
        return [np.asarray(frame.convert("RGB")) / 255 for frame in ImageSequence.Iterator(opened)]


def files_of(server: Server, history: dict[str, Any], node: str) -> list[np.ndarray]:
    """The frames that an output node saved in a run, by the run's history."""
    frames: list[np.ndarray] = []
    for one in history["outputs"][node]["images"]:
        status, content = server.request("/view?" + urlencode(one))
        assert status == 200, one
        frames += frames_of(content, one["filename"].endswith(VIDEOS))
    return frames
