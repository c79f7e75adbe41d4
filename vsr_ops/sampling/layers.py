"""Which self-attention layers a method acts in, by name, found from the order in which a UNet runs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import SettingError

#: Picks from the layers outside the middle block, in running order, and from those in it.
Choice = Callable[[Sequence[str], Sequence[str]], Sequence[str]]


def outermost(outer: Sequence[str], middle: Sequence[str]) -> Sequence[str]:
    """The paper's choice: the first two and last two layers (DC-VSR, sections 3.1 to 3.3)."""
    return (*outer[:2], *outer[-2:])


#: The choices by the names that widgets and options offer. "middle" is PAG's and SAG's.
LAYERS: dict[str, Choice] = {
    "ends": outermost,
    "first two": lambda outer, middle: outer[:2],
    "last two": lambda outer, middle: outer[-2:],
    "middle": lambda outer, middle: middle,
    "all": lambda outer, middle: (*outer, *middle),
}


@dataclass(frozen=True)
class Layer:
    """A spatial self-attention layer: its name in the UNet, and the choices of LAYERS it belongs to."""

    name: str
    places: frozenset[str]


def place_layers(names: Sequence[str], middle: Sequence[str]) -> dict[str, Layer]:
    """Every layer by name; `names` in running order, `middle` those of them in the middle block."""
    outer = [name for name in names if name not in middle]
    chosen = {choice: set(pick(outer, middle)) for choice, pick in LAYERS.items()}
    return {
        name: Layer(name, frozenset(choice for choice, members in chosen.items() if name in members)) for name in names
    }


def check_layers(name: str) -> str:
    """`name` itself; raises SettingError with the known names for one that is not in LAYERS."""
    if name not in LAYERS:
        raise SettingError(f"layers is {name!r}: expected one of {', '.join(LAYERS)}")
    return name
