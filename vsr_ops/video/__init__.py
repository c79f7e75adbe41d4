"""Videos, folders of pictures and single pictures, in and out, streamed frame by frame: the front door.

`probe` once, `read_frames` as often as needed, `check_output` before the work, then `with open_writer(...)`.
"""

from __future__ import annotations

from .reader import Frame, VideoInfo, glance, made_info, probe, read_frames
from .sinks import CODECS, OutputFormat
from .writer import Writer, check_output, open_writer

__all__ = [
    "CODECS",
    "Frame",
    "OutputFormat",
    "VideoInfo",
    "Writer",
    "check_output",
    "glance",
    "made_info",
    "open_writer",
    "probe",
    "read_frames",
]
