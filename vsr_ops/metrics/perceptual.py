"""Metrics that follow what people see, from packages that are installed beside this one or not.

VMAF (vmaf-torch), GMSD and HaarPSI (piq) bring their weights or need none. The learned ones come through pyiqa, whose
licence (PolyForm Noncommercial) allows no commercial use, so that it is no dependency; nor are its weights downloaded
unless `FETCH` allows it. Each function takes (result, truth), (frames, 3, h, w) RGB in [0, 1], and raises SettingError
with one line on what is missing.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import SettingError
from .pixels import check_equal, luma, said

FETCH = "VSR_FETCH_WEIGHTS"
"""Environment variable: set to 1, pyiqa may download the weights it lacks."""

SMALLEST = 32
"""Fewest pixels a side for VMAF's and HaarPSI's pyramids."""

_VMAF_CHUNK = 8

_WEIGHTS: dict[str, tuple[str, ...]] = {
    "lpips": ("pyiqa/LPIPS_v0.1_alex-*", "checkpoints/alexnet-*"),
    "dists": ("pyiqa/DISTS_weights-*", "checkpoints/vgg16-*"),
    "niqe": ("pyiqa/niqe_modelparameters.mat",),
    "musiq": ("pyiqa/musiq_koniq_ckpt-*",),
    "maniqa": ("pyiqa/ckpt_koniq10k.pt", "models--timm--vit_base_patch8_224*"),
    "clipiqa": ("clip/RN50.pt",),
}
"""What each of pyiqa's metrics loads: patterns under torch.hub's folder, or under Hugging Face's for `models--`."""

_SOURCE = "https://huggingface.co/chaofengc/IQA-PyTorch-Weights"


def missing_package(package: str, install: str) -> str:
    """One line on a package that is not installed; empty where it is."""
    if importlib.util.find_spec(package) is not None:
        return ""
    return f"package {package} is not installed: pip install {install}"


def missing_pyiqa(name: str) -> str:
    """One line on what one of pyiqa's metrics lacks on this machine; empty where nothing."""
    if line := missing_package("pyiqa", "pyiqa (its licence allows no commercial use)"):
        return line
    try:
        known: dict[str, Any] = importlib.import_module("pyiqa.default_model_configs").DEFAULT_CONFIGS
        if name not in known:
            return f"the installed pyiqa has no metric {name!r}: expected another version"
        absent = [pattern for pattern in _WEIGHTS[name] if not _found(pattern)]
        if absent and os.environ.get(FETCH) != "1":
            return (
                f"weights {' and '.join(absent)} are not in '{torch.hub.get_dir()}': set {FETCH}=1 and pyiqa downloads"
                f" them, or put them there; most are at {_SOURCE}"
            )
        _pyiqa(name, "cpu")
    except Exception as error:  # whatever another project's package raises while it loads
        return f"pyiqa cannot load it ({' '.join(str(error).split())[:200]}): mend its installation"
    return ""


def _found(pattern: str) -> bool:
    if not pattern.startswith("models--"):
        return any(Path(torch.hub.get_dir()).glob(pattern))
    constants: Any = importlib.import_module("huggingface_hub.constants")
    return any(Path(constants.HF_HUB_CACHE).glob(pattern))


def missing_dover(_: str = "dover") -> str:
    """DOVER judges whole videos with a package of its own, which pyiqa does not have."""
    return "pyiqa has no DOVER: run https://github.com/VQAssessment/DOVER on the written videos"


def vmaf(result: Tensor, truth: Tensor) -> Tensor:
    """VMAF v0.6.1 per frame, 0 to 100: (n,). Netflix's model of how people rate compressed video.

    On 8-bit studio-swing luma, as the vmaf tool reads a video. The truth's motion counts: neighbouring frames are
    part of a frame's value, and the first frame has none. Sharpening raises it: see `vmaf_neg`.
    """
    return _vmaf(result, truth, neg=False)


def vmaf_neg(result: Tensor, truth: Tensor) -> Tensor:
    """VMAF without credit for enhancement ("no enhancement gain"): sharpening alone does not raise it; else `vmaf`."""
    return _vmaf(result, truth, neg=True)


def gmsd(result: Tensor, truth: Tensor) -> Tensor:
    """Deviation of gradient magnitude similarity per frame (Xue et al., IEEE TIP 23, 2014): (n,), 0 where equal.

    On the luma of YIQ, halved, as its authors compute it: piq takes it from RGB.
    """
    return _piq("gmsd", result, truth)


def haarpsi(result: Tensor, truth: Tensor) -> Tensor:
    """Haar wavelet perceptual similarity per frame (Reisenhofer et al., SPIC 61, 2018): (n,), 1 where equal.

    On RGB: its third part compares colour (the I and Q of YIQ).
    """
    return _piq("haarpsi", result, truth)


def with_truth(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A metric of pyiqa's that compares each frame with the truth's: (result, truth) -> (n,)."""

    def metric(result: Tensor, truth: Tensor) -> Tensor:
        check_equal(result, truth)
        network = _network(name, result)
        pairs = zip(result.clamp(0, 1).float(), truth.clamp(0, 1).float(), strict=True)
        return _scores([network(r[None], t[None]) for r, t in pairs])

    return metric


def without_truth(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A metric of pyiqa's that judges each frame by itself: (result, ignored) -> (n,)."""

    def metric(result: Tensor, _: Tensor) -> Tensor:
        network = _network(name, result)
        return _scores([network(frame[None]) for frame in result.clamp(0, 1).float()])

    return metric


def tlp(result: Tensor, truth: Tensor) -> Tensor:
    """Temporal perceptual error (DC-VSR, equation 14), times 100 as in its table: (n - 1,).

    |LPIPS(r[k], r[k+1]) - LPIPS(t[k], t[k+1])|: whether neighbouring frames look as different as the truth's do.
    """
    check_equal(result, truth)
    distance = with_truth("lpips")
    return 100 * (distance(result[:-1], result[1:]) - distance(truth[:-1], truth[1:])).abs()


def no_dover(_: Tensor, __: Tensor) -> Tensor:
    """Raises SettingError: see `missing_dover`."""
    raise SettingError(f"dover: {missing_dover()}")


def _scores(values: list[Any]) -> Tensor:
    return torch.tensor([float(value) for value in values], dtype=torch.float64)


def _network(name: str, frames: Tensor) -> Any:
    if line := missing_pyiqa(name):
        raise SettingError(f"{name}: {line}")
    return _pyiqa(name, str(frames.device))


@lru_cache(maxsize=8)
def _pyiqa(name: str, device: str) -> Any:
    return importlib.import_module("pyiqa").create_metric(name, device=torch.device(device))


def _piq(name: str, result: Tensor, truth: Tensor) -> Tensor:
    _check(name, result, truth)
    metric = getattr(_module(name, "piq", "piq"), name)
    # Overshoot beyond black and white is cut, as it is where a picture is stored or shown.
    working = torch.float32 if result.device.type == "mps" else torch.float64
    pairs = zip(result.clamp(0, 1), truth.clamp(0, 1), strict=True)
    return _scores([metric(r[None].to(working), t[None].to(working), data_range=1.0) for r, t in pairs])


def _vmaf(result: Tensor, truth: Tensor, neg: bool) -> Tensor:
    """In chunks with a frame of the neighbours on each side, so that the value is that of the whole clip."""
    _check("vmaf_neg" if neg else "vmaf", result, truth)
    model = _vmaf_model(neg, str(result.device))
    parts: list[Tensor] = []
    for start in range(0, len(result), _VMAF_CHUNK):
        stop = min(start + _VMAF_CHUNK, len(result))
        first, last = max(0, start - 1), min(stop + 1, len(result))
        with torch.no_grad():
            values = model(_levels(truth[first:last]), _levels(result[first:last]))[:, 0]
        parts.append(values[start - first : stop - first])
    return torch.cat(parts).double().cpu()


def _levels(x: Tensor) -> Tensor:
    return (luma(x.clamp(0, 1).float()) * 255).round()


@lru_cache(maxsize=4)
def _vmaf_model(neg: bool, device: str) -> Any:
    return _module("vmaf", "vmaf_torch", "vmaf-torch").VMAF(NEG=neg, clip_score=True).to(device).eval()


def _module(metric: str, package: str, install: str) -> Any:
    if line := missing_package(package, install):
        raise SettingError(f"{metric}: {line}")
    return importlib.import_module(package)


def _check(metric: str, result: Tensor, truth: Tensor) -> None:
    check_equal(result, truth)
    if result.ndim != 4 or result.shape[1] != 3 or min(result.shape[-2:]) < SMALLEST:
        raise SettingError(
            f"{metric} got {said(result)}: expected RGB (frames, 3, height, width) of at least {SMALLEST}x{SMALLEST}"
            " pixels; leave it out for frames this small"
        )
