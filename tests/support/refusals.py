"""What a refusal is: one line that begins with the file and has the words that help."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from vsr_ops.errors import CheckpointError


def refused(read: Callable[[Path], object], path: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(path)
    text = str(caught.value)
    assert "\n" not in text and text.startswith(str(path)) and all(word in text for word in words), text
