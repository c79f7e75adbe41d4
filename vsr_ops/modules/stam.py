"""SDATC's spatio-temporal attention module (STAM): time beside the frozen spatial blocks of a VAE's decoder.

`F_s = Res(F)`, `F_t = F_s + TAB(Conv3D(F_s))`, `F' = a F_s + b F_t` (SDATC, equations 8 to 10), with TAB a
self-attention over time at each position and a, b learnt, here one number each. It acts on what a residual block gives,
so it stands behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from ..checkpoints.module_file import fill, read_module, write_module
from ..errors import CheckpointError, SettingError
from ..sampling.attention import fused_attention, in_chunks
from ..sampling.tiling import Core, cores
from ..weights import bundled

KIND = "stam"
#: The weights that come with the pack, made for its lite SVD's VAE.
LITE_STAM = bundled("stam_lite")
#: Positions of a strip of rows, which goes through by itself: what is made of it stays small beside the features.
POSITIONS = 16000


@dataclass(frozen=True)
class STAMShape:
    """The residual blocks that have one, by name, with their channels; `inner` channels inside (0: as many as the
    block's), `heads` of attention; `backbone` is sd or svd."""

    blocks: tuple[tuple[str, int], ...]
    inner: int = 0
    heads: int = 4
    backbone: str = "sd"


class STAMBlock(nn.Module):
    """The part beside one residual block. Its last projection starts at zero and a + b at one: the exact identity."""

    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        if inner < 1 or heads < 1 or inner % heads:
            raise SettingError(f"STAM has {inner} channels and {heads} heads: expected a multiple of its heads")
        self.heads = heads
        self.conv = nn.Conv3d(width, inner, 3, padding=1)
        self.norm = nn.LayerNorm(inner)
        self.qkv = nn.Linear(inner, 3 * inner)
        self.out = nn.Linear(inner, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.a = nn.Parameter(torch.tensor(0.5))
        self.b = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        """Frames `(t, c, h, w)` that may all see each other, to the same, in their dtype."""
        given, x = x, x.to(self.conv.weight)
        strips = cores(x.shape[-2], max(1, POSITIONS // x.shape[-1]), 1)
        return torch.cat([self._strip(x, rows) for rows in strips], -2).to(given)

    def _strip(self, x: Tensor, rows: Core) -> Tensor:
        """Some rows of the result."""
        seen = rearrange(x[..., rows.outer, :], "t c h w -> 1 c t h w")
        convolved = rearrange(self.conv(seen)[..., rows.inner, :], "1 c t h w -> (h w) t c")
        added = in_chunks(self._attend, POSITIONS, convolved)
        over_time = rearrange(added, "(h w) t c -> t c h w", w=x.shape[-1])
        # a F_s + b (F_s + TAB), in an order that keeps F_s to the last bit where a + b is 1 and TAB is 0.
        return (self.a + self.b) * x[..., rows.core, :] + self.b * over_time

    def _attend(self, x: Tensor) -> Tensor:
        """TAB: `(positions, t, c)` to what it adds there."""
        q, k, v = rearrange(self.qkv(self.norm(x)), "p t (three h d) -> three p h t d", three=3, h=self.heads)
        return self.out(rearrange(fused_attention(q, k, v), "p h t d -> p t (h d)"))


class STAM(nn.Module):
    """One block for each residual block of a decoder that has one."""

    def __init__(self, shape: STAMShape) -> None:
        super().__init__()
        self.shape = shape
        self.blocks = nn.ModuleDict(
            {name: STAMBlock(width, shape.inner or width, shape.heads) for name, width in shape.blocks}
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The residual blocks that have one."""
        return tuple(name for name, _ in self.shape.blocks)

    def block(self, name: str) -> STAMBlock:
        """The one beside the decoder's residual block called `name`."""
        return cast("STAMBlock", self.blocks[name])

    def check_fits(self, backbone: str, widths: Mapping[str, int]) -> None:
        """Raises SettingError unless the VAE is of its backbone and has its blocks at its widths."""
        if backbone != self.shape.backbone:
            raise SettingError(
                f"STAM is made for backbone {self.shape.backbone}, the VAE is {backbone}: give the VAE of its training"
            )
        for name, width in self.shape.blocks:
            if widths.get(name) != width:
                has = f"{widths[name]} channels" if name in widths else "no such block"
                raise SettingError(
                    f"STAM's block {name} has {width} channels, the VAE there {has}: give the VAE it was trained on"
                )


def load_stam(path: Path | str, device: torch.device | str = "cpu") -> STAM:
    """The STAM at `path` ("lite": the bundled one), float32. Raises CheckpointError."""
    file = LITE_STAM if str(path) == "lite" else Path(path)
    stored = read_module(file, KIND)
    try:
        config: dict[str, Any] = dict(stored.config)
        config["blocks"] = tuple((str(name), int(width)) for name, width in config["blocks"])
        model = STAM(STAMShape(**config))
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{file}: its configuration {stored.config} is no STAM's; get it again") from error
    fill(file, model, KIND, stored.tensors)
    return model.to(device).eval().requires_grad_(False)


def write_stam(path: Path, model: STAM, trained_on: str) -> None:
    """Writes `model` as a file that `load_stam` reads, float16. Raises CheckpointError."""
    write_module(path, KIND, asdict(model.shape), model.state_dict(), trained_on)
