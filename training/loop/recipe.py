"""Recipes: what a run trains and how, as one small TOML file. Every table is checked against a dataclass.

Top level `task` (a name in TASKS) and `seed`; `[model]`, `[data]` and `[loss]` belong to the task; `[train]`,
`[optimizer]` and `[run]` are read here.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from vsr_ops.errors import SettingError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

T = TypeVar("T")

#: Folder of the recipes that come with the pack.
BUNDLED = Path(__file__).parents[1] / "recipes"

PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
"""The pack's names and accelerate's."""


@dataclass(frozen=True)
class Train:
    """`steps` of the optimiser, each over `accumulation` batches of `batch` samples (on every device).

    `precision` is that of autocast, weights stay float32; `ema` the decay of the weights' mean, 0 for none (saves its
    memory); `clip` the largest gradient norm, 0 for any.
    """

    steps: int
    batch: int = 1
    accumulation: int = 1
    precision: str = "float32"
    ema: float = 0.999
    clip: float = 1.0


@dataclass(frozen=True)
class Optimizer:
    """`name` is one in OPTIMIZERS. The rate climbs to `lr` over `warmup` steps and falls along a cosine to
    `lr * floor` at the last one; a floor of 1 holds it."""

    name: str = "adamw"
    lr: float = 1e-4
    betas: tuple[float, ...] = (0.9, 0.99)
    weight_decay: float = 0.0
    warmup: int = 0
    floor: float = 1.0


@dataclass(frozen=True)
class RunOptions:
    """What changes no weight, and may differ when a run goes on: intervals in steps, `workers` that draw samples
    beside the training (0: none), `trained_on`, the line about data and licences that exported files carry."""

    save_every: int = 500
    sample_every: int = 1000
    workers: int = 0
    trained_on: str = ""


@dataclass(frozen=True)
class Recipe:
    """A whole recipe; the task's own tables are still plain."""

    task: str
    train: Train
    seed: int = 0
    optimizer: Optimizer = field(default_factory=Optimizer)
    run: RunOptions = field(default_factory=RunOptions)
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        low = {"train.steps": 1, "train.batch": 1, "train.accumulation": 1, "run.save_every": 1, "run.sample_every": 1}
        low |= {"optimizer.warmup": 0, "run.workers": 0, "train.clip": 0, "train.ema": 0, "optimizer.lr": 0, "seed": 0}
        values = self.flat()
        for key, least in low.items():
            if values[key] < least:
                raise SettingError(f"{key} is {values[key]}: expected at least {least}")
        if not self.train.ema < 1:
            raise SettingError(f"train.ema is {self.train.ema}: expected a decay below 1, such as 0.999, or 0 for none")
        if self.train.precision not in PRECISIONS:
            raise SettingError(f"train.precision is '{self.train.precision}': expected one of {', '.join(PRECISIONS)}")

    def flat(self) -> dict[str, Any]:
        """Every setting under its dotted name, the run's options last."""
        tables = asdict(self)
        values: dict[str, Any] = {key: tables.pop(key) for key in ("task", "seed")}
        for table, content in tables.items():
            values |= {f"{table}.{key}": _plain(value) for key, value in content.items()}
        return values


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe at `path`, with `overrides` such as "train.steps=100" on top. Raises SettingError."""
    try:
        tables = read_toml(path)
    except FileNotFoundError:
        known = ", ".join(sorted(file.name for file in BUNDLED.glob("*.toml")))
        raise SettingError(f"{path}: no such recipe; those of the pack, in {BUNDLED.name}/, are {known}") from None
    except (OSError, ValueError) as error:
        raise SettingError(f"{path}: not a TOML file that can be read ({error}); correct it there") from error
    for text in overrides:
        _override(tables, text)
    return to_recipe(tables)


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file's tables. Raises OSError, and ValueError for a file that is none."""
    return tomllib.loads(path.read_text(encoding="utf-8"))


def to_recipe(tables: Mapping[str, Any]) -> Recipe:
    """A checked recipe of plain tables. Raises SettingError."""
    content = dict(tables)
    for name, kind in (("train", Train), ("optimizer", Optimizer), ("run", RunOptions)):
        content[name] = from_table(kind, content.get(name, {}), name)
    return from_table(Recipe, content, "")


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Settings (as `Recipe.flat` gives them) that a run cannot change on its way, as "before -> now" by name.

    Those of `[run]` may change, and `train.steps` may grow.
    """
    changed: dict[str, str] = {}
    for key in [*before, *(key for key in now if key not in before)]:
        old, new = before.get(key, "(none)"), now.get(key, "(none)")
        longer = key == "train.steps" and new >= old
        if old != new and not key.startswith("run.") and not longer:
            changed[key] = f"{old} -> {new}"
    return changed


def learning_rate(step: int, steps: int, optimizer: Optimizer) -> float:
    """The rate of step 0, 1 ... `steps - 1`."""
    if step < optimizer.warmup:
        return optimizer.lr * (step + 1) / optimizer.warmup
    phase = (step - optimizer.warmup) / max(steps - 1 - optimizer.warmup, 1)
    return optimizer.lr * (optimizer.floor + (1 - optimizer.floor) * 0.5 * (1 + math.cos(math.pi * min(phase, 1.0))))


def from_table(kind: type[T], table: Mapping[str, Any], where: str) -> T:
    """The dataclass `kind` filled from a TOML table called `where`. Raises SettingError for an unknown, missing or
    mistyped key."""
    if not isinstance(table, Mapping):
        raise SettingError(f"{where} is {table!r}: expected a table, [{where}]")
    hints = get_type_hints(kind)
    known = {item.name: item for item in fields(kind)}  # type: ignore[arg-type]
    prefix = f"{where}." if where else ""
    if unknown := [key for key in table if key not in known]:
        names = ", ".join(prefix + key for key in unknown)
        raise SettingError(f"unknown setting {names}: expected {', '.join(known) or 'none'}")
    required = [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in required if name not in table]:
        raise SettingError(f"no {', '.join(prefix + name for name in missing)}: the recipe must say it")
    return kind(**{key: _typed(value, hints[key], prefix + key) for key, value in table.items()})


_KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text in quotes",
    bool: "true or false",
    tuple[int, ...]: "a list of whole numbers",
    tuple[float, ...]: "a list of numbers",
}


def _typed(value: Any, kind: Any, name: str) -> Any:
    if kind not in _KINDS:
        return value
    if kind in (tuple[int, ...], tuple[float, ...]):
        single = int if kind == tuple[int, ...] else float
        if isinstance(value, (list, tuple)) and value:
            return tuple(_typed(item, single, name) for item in value)
    elif kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    elif kind is not float and type(value) is kind:
        return value
    raise SettingError(f"{name} is {value!r}: expected {_KINDS[kind]}")


def _override(tables: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    *path, last = key.strip().split(".")
    if not equals or not last or len(path) > 1:
        raise SettingError(f"--set {text!r}: expected table.key=value, such as train.steps=2000")
    for name in path:
        tables = tables.setdefault(name, {})
    try:
        tables[last] = tomllib.loads(f"value = {value}")["value"]
    except ValueError:
        tables[last] = value.strip()


def _plain(value: Any) -> Any:
    """Lists and tuples alike, so that a recipe read back from a checkpoint compares equal."""
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
