"""Controllable feature wrapping (CFW): the VAE encoder's view of the reference in its decoder, as much as is wanted.

`F_d' = F_d + w C([F_e ; F_d])` after the last residual block of the decoder's middle levels, F_e from the encoder at
the same level (StableSR's; SDATC, equation 11). Modules and names are StableSR's, so that its files load.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoints.module_file import fill, read_module, write_module
from ..checkpoints.safefile import PICKLE_SUFFIXES, open_safely, read_pickle
from ..errors import CheckpointError, SettingError
from ..weights import bundled

KIND = "cfw"
#: The weights that come with the pack, made for its lite SVD's VAE.
LITE_CFW = bundled("cfw_lite")
_KEY = re.compile(r"(?:^|\.)fusion_layer_(\d+)\.(.+)$")


@dataclass(frozen=True)
class CFWShape:
    """The levels that are fused (0 is the picture's resolution, 1 half of it ...) and their channels; `blocks` RRDBs
    with `grow` channels more at each of their convolutions. The defaults are StableSR's; `backbone` is sd or svd."""

    levels: tuple[int, ...] = (1, 2)
    widths: tuple[int, ...] = (256, 512)
    blocks: int = 2
    grow: int = 32
    backbone: str = "sd"


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(32, width), width, eps=1e-6)


class _Residual(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm1 = _norm(width)
        self.conv1 = nn.Conv2d(width, out, 3, padding=1)
        self.norm2 = _norm(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.conv_out = nn.Conv2d(width, out, 1) if width != out else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (x if self.conv_out is None else self.conv_out(x))


class _Dense(nn.Module):
    """ESRGAN's dense block: each convolution sees all before it."""

    def __init__(self, width: int, grow: int) -> None:
        super().__init__()
        for index in range(1, 6):
            self.add_module(
                f"conv{index}", nn.Conv2d(width + (index - 1) * grow, width if index == 5 else grow, 3, padding=1)
            )

    def forward(self, x: Tensor) -> Tensor:
        seen = x
        for index in range(1, 5):
            more = F.leaky_relu(self.get_submodule(f"conv{index}")(seen), 0.2)
            seen = torch.cat([seen, more], 1)
        return x + 0.2 * self.get_submodule("conv5")(seen)


class _RRDB(nn.Module):
    def __init__(self, width: int, grow: int) -> None:
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (_Dense(width, grow) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.2 * self.rdb3(self.rdb2(self.rdb1(x)))


class FuseLayer(nn.Module):
    """C of SDATC equation 11. It starts at exactly zero: the first block gives nothing and the others keep it so."""

    def __init__(self, width: int, blocks: int, grow: int) -> None:
        super().__init__()
        self.encode_enc_1 = _Residual(2 * width, width)
        self.encode_enc_2 = nn.Sequential(*(_RRDB(width, grow) for _ in range(blocks)))
        self.encode_enc_3 = _Residual(width, width)
        for name, parameter in self.named_parameters():
            silent = name.startswith(("encode_enc_1.conv2", "encode_enc_1.conv_out", "encode_enc_3.conv2"))
            if silent or ("conv" in name and name.endswith("bias")):
                nn.init.zeros_(parameter)

    def forward(self, encoded: Tensor, decoded: Tensor) -> Tensor:
        """Features `(t, c, h, w)` twice, to what is added to `decoded`."""
        return self.encode_enc_3(self.encode_enc_2(self.encode_enc_1(torch.cat([encoded, decoded], 1))))


class CFW(nn.Module):
    """A fuse layer for each of the shape's levels."""

    def __init__(self, shape: CFWShape | None = None) -> None:
        super().__init__()
        self.shape = shape or CFWShape()
        for level, width in zip(self.shape.levels, self.shape.widths, strict=True):
            self.add_module(f"fusion_layer_{level}", FuseLayer(width, self.shape.blocks, self.shape.grow))

    def layer(self, level: int) -> FuseLayer:
        """The layer of one level; its module moves between devices with this one."""
        return cast("FuseLayer", self.get_submodule(f"fusion_layer_{level}"))

    def fuse(self, level: int, encoded: Tensor, decoded: Tensor, w: float) -> Tensor:
        """`decoded + w C([encoded ; decoded])` in the dtype of `decoded`; at w = 0 `decoded` itself."""
        if w == 0:
            return decoded
        layer = self.layer(level)
        weight = layer.encode_enc_1.conv1.weight
        return decoded + (w * layer(encoded.to(weight), decoded.to(weight))).to(decoded)

    def check_fits(self, backbone: str, widths: Mapping[int, int]) -> None:
        """Raises SettingError unless the VAE is of its backbone and `widths` by level are its own."""
        if backbone != self.shape.backbone:
            raise SettingError(
                f"CFW is made for backbone {self.shape.backbone}, the VAE is {backbone}: give the VAE it was trained on"
            )
        top = max(widths)
        for level, width in zip(self.shape.levels, self.shape.widths, strict=True):
            if widths.get(level) != width or level == top:
                has = f"{widths[level]} channels" if level in widths else "no such level"
                what = f"CFW fuses level {level} at {width} channels, the VAE has there {has} and {top} as its deepest"
                raise SettingError(f"{what}: give the VAE it was trained on")


def check_w(w: float) -> None:
    """Raises SettingError for a `w` outside [0, 1]."""
    if not 0 <= w <= 1:
        raise SettingError(f"w is {w}: expected a share from 0 (the plain decoder) to 1 (closest to the reference)")


# --- Files ------------------------------------------------------------------------------------------------------------


def load_cfw(path: Path | str, device: torch.device | str = "cpu") -> CFW:
    """The CFW at `path` ("lite": the bundled one), float32: this pack's, or StableSR's, alone or in an autoencoder.

    StableSR's may be a pickle, which is read as tensors only. Raises CheckpointError for a file that is missing,
    damaged, of another kind, or has no or no whole fuse layers.
    """
    file = LITE_CFW if str(path) == "lite" else Path(path)
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; give a CFW's .safetensors, or StableSR's file")
    if file.suffix.lower() in PICKLE_SUFFIXES:
        model = from_stablesr(file, read_pickle(file, _KEY))
    else:
        with open_safely(file) as source:
            if "vsr.kind" in source.metadata:
                model = _own(file)
            else:
                picked = {key: source.tensor(key, torch.float32) for key in source.shapes if _KEY.search(key)}
                model = from_stablesr(file, picked)
    return model.to(device).eval().requires_grad_(False)


def write_cfw(path: Path, model: CFW, trained_on: str) -> None:
    """Writes `model` as a file that `load_cfw` reads, float16. Raises CheckpointError."""
    write_module(path, KIND, asdict(model.shape), model.state_dict(), trained_on)


def _own(path: Path) -> CFW:
    stored = read_module(path, KIND)
    try:
        config: dict[str, Any] = dict(stored.config)
        for key in ("levels", "widths"):
            config[key] = tuple(int(n) for n in config[key])
        model = CFW(CFWShape(**config))
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: its configuration {stored.config} is no CFW's; get it again") from error
    fill(path, model, KIND, stored.tensors)
    return model


def from_stablesr(path: Path, tensors: Mapping[str, Tensor]) -> CFW:
    """The CFW in StableSR's tensors, whose fuse layers are told by name under any prefix. `path` is for messages.

    Raises CheckpointError where there are none, or not all of one shape.
    """
    found = {f"fusion_layer_{m[1]}.{m[2]}": tensors[key] for key in tensors if (m := _KEY.search(key))}
    levels = tuple(sorted({int(key.split(".")[0].rpartition("_")[2]) for key in found}))
    if not levels:
        what = f"{path}: holds no fuse layers (fusion_layer_1 ...), so it is another kind of weights than {KIND}"
        raise CheckpointError(f"{what}; give StableSR's CFW (vqgan_cfw_00011) or a file of this pack")
    blocks = {key.split(".")[2] for key in found if ".encode_enc_2." in key}
    try:
        widths = tuple(found[f"fusion_layer_{level}.encode_enc_3.conv1.weight"].shape[0] for level in levels)
        grow = found[f"fusion_layer_{levels[0]}.encode_enc_2.0.rdb1.conv1.weight"].shape[0]
    except KeyError as error:
        raise CheckpointError(f"{path}: {KIND} tensors lack {error.args[0]}; use an unmodified file") from error
    model = CFW(CFWShape(levels, widths, len(blocks), grow))
    fill(path, model, KIND, found)
    return model
