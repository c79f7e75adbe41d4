"""What the command line's options of motion stand for: by what the alignment estimates it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from ..errors import SettingError
from ..flow.raft import CLASSES, Estimator, load_raft, url_of
from ..flow.warp import dis_flow


def flow_of(args: argparse.Namespace, device: torch.device) -> Estimator:
    """The estimator asked for; DIS where nothing is aligned. Raises SettingError and CheckpointError."""
    if args.flow not in FLOWS:
        raise SettingError(f"flow is {args.flow!r}: expected one of {', '.join(FLOWS)}; choose one of them")
    made = FLOWS[args.flow](args.flow_weights, device)
    return dis_flow if args.align == 0 else made


def _dis(weights: str, device: torch.device) -> Estimator:
    if weights != "none":
        raise SettingError(f"flow weights are {weights} and flow is dis: expected raft, which takes them; set --flow")
    return dis_flow


def _raft(weights: str, device: torch.device) -> Estimator:
    if weights == "none":
        urls = " or ".join(url_of(name) for name in CLASSES)
        raise SettingError(
            f"flow is raft without weights: expected torchvision's file; give --flow-weights, from {urls}"
        )
    return load_raft(Path(weights), device)


FLOWS: dict[str, Callable[[str, torch.device], Estimator]] = {"dis": _dis, "raft": _raft}
"""By name: what makes an estimator, from the file of its weights or "none"."""
