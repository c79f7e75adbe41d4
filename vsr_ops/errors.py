"""The errors a user can cause. Each message is one line: what was wrong, what was expected, what to do."""

from __future__ import annotations


class VSRError(ValueError):
    """Base of every error that input can cause; the command line prints it and exits with 2."""


class SettingError(VSRError):
    """A setting has a value that cannot work (scale, steps, tile, overlap, an unknown name ...)."""


class VideoError(VSRError):
    """A video or picture cannot be read, or the result cannot be written."""


class CheckpointError(VSRError):
    """A weights file is of the wrong kind, damaged, or unsafe to load."""


class DeviceError(VSRError):
    """The asked device or precision is not there."""


class SamplingError(VSRError):
    """Sampling produced a value that is not finite; says at which step and tile."""
