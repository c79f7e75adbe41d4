"""SDATC's distortion control module (DCM, equation 4), which cleans and enlarges the low-resolution video.

The paper's is a SwinIR; any upscaler of one picture that spandrel knows will do, and the bundled one is its Compact.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.safefile import PICKLE_SUFFIXES, Source, open_safely, read_pickle
from ..errors import CheckpointError
from ..image.upscale import of_factor
from ..sampling.tiling import Merger, Span, TilePlan, Window, cut_tile, spans
from ..weights import bundled
from .compact import load_compact

UpscaleFn = Callable[[Tensor], Tensor]
"""Frames `(n, 3, h, w)` RGB in [0, 1] to `(n, 3, s*h, s*w)` in [0, 1]; a Restorer where s is 1."""

#: The weights that come with the pack: x4.
LITE_DCM = bundled("dcm_lite")
#: Larger pictures go through in equal tiles of at most this many LR pixels a side, which share this part of it with
#: their neighbours: memory is flat in area.
TILE, OVERLAP = 512, 3 / 32
_ANY = re.compile("")


def read_dcm(path: Path | str) -> Any:
    """spandrel's descriptor of the upscale model at `path` ("lite": the bundled one), float32 on the CPU.

    A pickle (SwinIR's .pth) is read as tensors alone. Raises CheckpointError for a file that is missing, damaged, or no
    model of one picture in and out that spandrel knows.
    """
    import spandrel as library  # type: ignore[import-untyped]  # imports every architecture it knows

    spandrel: Any = library

    file = LITE_DCM if str(path) == "lite" else Path(path)
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; give lite, or the file of a SwinIR or another upscaler")
    state = _state(file)
    try:
        with warnings.catch_warnings():
            # SwinIR's own, about torch.meshgrid: nothing that an artist could change.
            warnings.simplefilter("ignore", UserWarning)
            model: Any = spandrel.ModelLoader().load_from_state_dict(state)
    except spandrel.UnsupportedModelError as error:
        raise CheckpointError(
            f"{file}: not an upscale model that spandrel knows; give a SwinIR or another single-image upscaler"
        ) from error
    except (RuntimeError, KeyError, ValueError) as error:
        why = " ".join(str(error).split())[:160]
        raise CheckpointError(f"{file}: its tensors make no whole model ({why}); use an unmodified file") from error
    if not isinstance(model, spandrel.ImageModelDescriptor) or model.scale < 1:
        raise CheckpointError(f"{file}: a {model.purpose} model; expected one that takes and gives one picture")
    if (channels := (int(model.input_channels), int(model.output_channels))) != (3, 3):
        raise CheckpointError(
            f"{file}: takes {channels[0]} channels and gives {channels[1]}; expected 3 (RGB), use a colour model"
        )
    return model.eval()


def _state(file: Path) -> dict[str, Tensor]:
    """The state dict of a file. Of a pickle it is the whole content, or what BasicSR puts the weights under."""
    if file.suffix.lower() in PICKLE_SUFFIXES:
        return read_pickle(file, _ANY, ("params_ema", "params", "state_dict"))
    with open_safely(file) as source:
        return {key: _tensor(source, key) for key in source.shapes}


def _tensor(source: Source, key: str) -> Tensor:
    """A weight in float32; whole numbers and masks, which some architectures store, as they are."""
    stored = source.get(key)
    return stored if stored.dtype in (torch.int64, torch.bool) else source.tensor(key, torch.float32)


def tile_spans(extent: int) -> tuple[Span, ...]:
    """An axis in as few tiles as there can be, no longer than they must be; multiples of 8, as many models' windows."""
    shared = round(TILE * OVERLAP)
    parts = max(1, math.ceil((extent - shared) / (TILE - shared)))
    side = 8 * math.ceil((extent + (parts - 1) * shared) / (8 * parts))
    return spans(extent, side, shared / side)


def load_dcm(path: Path | str, device: torch.device, dtype: torch.dtype = torch.float32) -> UpscaleFn:
    """The upscale model at `path` ("lite": the bundled one) as a function of frames, tiled. Errors as `read_dcm`."""
    model: Any = load_compact(LITE_DCM) if str(path) == "lite" else read_dcm(path)
    model, scale = model.to(device=device, dtype=dtype), int(model.scale)

    @torch.no_grad()
    def enlarge(frames: Tensor) -> Tensor:
        count, _, height, width = frames.shape
        plan = TilePlan(count, height, width, tile_spans(height), tile_spans(width), (Window(Span(0, count), 0),))
        merger = Merger(plan.magnified(scale))
        for m in range(len(plan.spatial)):
            part = model(cut_tile(plan, 0, m, frames).to(device, dtype))
            merger.add(0, m, part.float().to(frames.device))
        return merger.result().clamp(0, 1).to(frames.dtype)

    return of_factor(enlarge, scale)
