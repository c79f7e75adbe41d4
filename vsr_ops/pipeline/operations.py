"""Operations of a network by the size of its tile, counted while it runs one: torch's own counter takes seconds."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

from torch import Tensor, nn

from ..modules.idle import Nothing
from ..sampling.tiling import TileSize

Growth = Callable[[float, float], float]
#: How operations of each kind grow from tile to tile, by how often its area and its frames hold those of another.
GROWTH: dict[str, Growth] = {
    "features": lambda area, frames: area * frames,
    "embeddings": lambda area, frames: frames,
    "spatial": lambda area, frames: area**2 * frames,
    "temporal": lambda area, frames: area * frames**2,
}


class Operations:
    """Multiplications of `networks`, UNets and controls of diffusers' blocks: in convolutions and linear layers, and
    in self-attention, within a frame and over time."""

    def __init__(self, *networks: nn.Module) -> None:
        self._networks = networks
        self._tile: TileSize | None = None
        self._found: dict[str, float] = dict.fromkeys(GROWTH, 0.0)

    @contextmanager
    def counted(self, tile: TileSize) -> Generator[None]:
        """Within, the networks run a `tile` (or several of its size), which is counted the first time alone."""
        with ExitStack() as hooks:
            if self._tile is None:
                self._tile = tile
                for network in self._networks:
                    for name, module in cast("Iterable[tuple[str, nn.Module]]", network.named_modules()):
                        self._count(hooks, name, module)
            yield

    def _count(self, hooks: ExitStack, name: str, module: Any) -> None:
        def layer(_: nn.Module, __: object, out: Tensor) -> None:
            kind = "embeddings" if out.ndim == 2 else "features"
            self._found[kind] += out.numel() * module.weight[0].numel()

        def attention(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            sequences, tokens = given[0].shape[:2]
            width = module.to_k.out_features + module.to_v.out_features
            self._found["temporal" if "temporal" in name else "spatial"] += sequences * tokens**2 * width

        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):
            hooks.callback(module.register_forward_hook(layer).remove)
        elif name.endswith(".attn1") and not isinstance(module, Nothing):
            hooks.callback(module.register_forward_pre_hook(attention).remove)

    def of(self, tile: TileSize) -> float:
        """Of a tile of any size, as the counted one says: one that has run within `counted`."""
        assert self._tile is not None
        return grown(self._found, self._tile, tile)


def grown(found: Mapping[str, float], counted: TileSize, tile: TileSize) -> float:
    """Operations of a `tile`, of those by kind `found` in the one `counted`."""
    area = tile.height * tile.width / (counted.height * counted.width)
    return sum(GROWTH[kind](area, tile.frames / counted.frames) * each for kind, each in found.items())
