"""The weights that come with the pack, and where they are."""

from __future__ import annotations

from pathlib import Path


def bundled(name: str) -> Path:
    """The file of bundled weights of this name, such as "dcm_lite"; it may be missing from an incomplete copy."""
    return Path(__file__).parent / f"{name}.safetensors"
