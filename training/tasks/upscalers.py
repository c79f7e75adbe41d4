"""Architectures of a DCM by name: spandrel's own, so that spandrel (and the host's upscale loader) read the files."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from training.data.patches import SCALE
from training.loop.recipe import from_table
from vsr_ops.errors import SettingError

Tensors = dict[str, Tensor]

MASK = "attn_mask"
"""How the names of SwinIR's attention masks end, which are no weights."""


class Upscaler(Protocol):
    """`[model]` of a recipe, but for what Common holds."""

    def build(self, size: int) -> nn.Module:
        """The x4 network with its first weights, for training on inputs of `size` pixels; others work too."""
        ...

    def continued(self, learnt: Tensors, fresh: Tensors) -> Tensors:
        """The tensors of one like it as this network takes them; `fresh` are this network's first ones."""
        ...

    def stored(self, model: nn.Module) -> tuple[dict[str, Any], Tensors]:
        """(arguments of the class, tensors) as they go into a file."""
        ...


@dataclass(frozen=True)
class SwinIR:
    """The paper's is 6 blocks of 6 layers of 180 channels, "pixelshuffle"; windows of 8."""

    embed_dim: int = 180
    depths: tuple[int, ...] = (6, 6, 6, 6, 6, 6)
    num_heads: tuple[int, ...] = (6, 6, 6, 6, 6, 6)
    window_size: int = 8
    mlp_ratio: float = 2.0
    upsampler: str = "pixelshuffle"
    checkpointing: bool = False

    def build(self, size: int) -> nn.Module:
        """Its attention masks are made beforehand for `size`."""
        # spandrel imports torchvision, which is slow.
        from spandrel.architectures.SwinIR import SwinIR as Network

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.meshgrid")  # spandrel's call, not ours
            arguments = self._arguments()
            return Network(img_size=size, drop_path_rate=0.0, **arguments, use_checkpoint=self.checkpointing)

    def continued(self, learnt: Tensors, fresh: Tensors) -> Tensors:
        """Masks belong to the size at hand."""
        masks = {name: value for name, value in fresh.items() if name.endswith(MASK)}
        return {**{name: value for name, value in learnt.items() if not name.endswith(MASK)}, **masks}

    def stored(self, model: nn.Module) -> tuple[dict[str, Any], Tensors]:
        """The masks kept are those of the smallest picture that has any."""
        size = 2 * self.window_size
        masks = {name: value for name, value in self.build(size).state_dict().items() if name.endswith(MASK)}
        return {**self._arguments(), "img_size": size}, {**model.state_dict(), **masks}

    def _arguments(self) -> dict[str, Any]:
        """Those that the weights depend on."""
        own = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items() if key != "checkpointing"}
        return {**own, "upscale": SCALE, "img_range": 1.0, "resi_connection": "1conv"}


@dataclass(frozen=True)
class Compact:
    """Real-ESRGAN's small network: `num_conv` convolutions of `num_feat` channels between the first and the last, which
    is added to the nearest neighbour's picture."""

    num_feat: int = 64
    num_conv: int = 16

    def build(self, size: int) -> nn.Module:
        """Starts near the nearest neighbour's picture, with signal in every layer."""
        from spandrel.architectures.Compact import Compact as Network

        # Channels last: much the quicker layout of convolutions on a CPU.
        model = Network(**self._arguments()).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
        # torch's own start shrinks the signal in every layer: eighteen on, nothing is left, and the network stays at
        # the nearest neighbour's picture for good.
        for layer in layers:
            nn.init.kaiming_normal_(layer.weight, a=0.25)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        layers[-1].weight.data *= 0.05
        return model

    def continued(self, learnt: Tensors, fresh: Tensors) -> Tensors:
        """A shallower network grows to `num_conv`: layers that change nothing yet, spread between its own."""
        old = sum(value.ndim == 4 for value in learnt.values()) - 2
        if not 0 < old < self.num_conv:
            return learnt
        place = {0: 0, old + 1: self.num_conv + 1, **{1 + i: 1 + i * self.num_conv // old for i in range(old)}}
        moved: Tensors = {}
        for name, value in learnt.items():
            # body.0 is a convolution, body.1 its activation, body.2 the next convolution.
            number, part = name.removeprefix("body.").split(".")
            layer, kind = divmod(int(number), 2)
            moved[f"body.{2 * place[layer] + kind}.{part}"] = value
        return {**{name: _idle(name, value) for name, value in fresh.items()}, **moved}

    def stored(self, model: nn.Module) -> tuple[dict[str, Any], Tensors]:
        return self._arguments(), dict(model.state_dict())

    def _arguments(self) -> dict[str, Any]:
        return {"num_in_ch": 3, "num_out_ch": 3, **asdict(self), "upscale": SCALE, "act_type": "prelu"}


def _idle(name: str, value: Tensor) -> Tensor:
    """What makes a convolution, its bias or its PReLU pass on what it gets."""
    if value.ndim == 4:
        return nn.init.dirac_(torch.empty_like(value))
    return torch.zeros_like(value) if name.endswith("bias") else torch.ones_like(value)


ARCHITECTURES: dict[str, type[SwinIR] | type[Compact]] = {"swinir": SwinIR, "compact": Compact}


@dataclass(frozen=True)
class Common:
    """What every architecture has in `[model]`: its name (the paper's SwinIR where there is none), and `start`, the
    file or run of one like it to go on from ("lite": the bundled one; empty: from nothing). A
    Compact may go on from one of fewer layers."""

    architecture: str = "swinir"
    start: str = ""


def upscaler_of(model: Mapping[str, Any]) -> tuple[Upscaler, str]:
    """(the architecture that `[model]` names and shapes, its start). Raises SettingError."""
    own = {item.name for item in fields(Common)}
    common = from_table(Common, {key: value for key, value in model.items() if key in own}, "model")
    if common.architecture not in ARCHITECTURES:
        raise SettingError(f"model.architecture is '{common.architecture}': expected one of {', '.join(ARCHITECTURES)}")
    shape = {key: value for key, value in model.items() if key not in own}
    return from_table(ARCHITECTURES[common.architecture], shape, "model"), common.start
