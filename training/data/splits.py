"""Which clips the papers train and test on, and whether a downloaded folder has them.

python -m training splits                       # the lists
python -m training splits --check reds4 DIR     # DIR holds a folder of frames for each clip
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.loop.recipe import read_toml
from vsr_ops.errors import SettingError, VideoError, VSRError
from vsr_ops.video.pictures import list_pictures, read_header

LISTS = Path(__file__).with_suffix(".toml")
LR = 4
"""How many times smaller a side of LR frames may be."""


@dataclass(frozen=True)
class Expected:
    """Of one clip: frames, and (width, height); None: not known."""

    frames: int | None
    size: tuple[int, int] | None


@dataclass(frozen=True)
class Split:
    """A list of clips by name. `frames` may be fewer where they are `at_most` so many; a clip's frames may lie in its
    folder `inside`; `without` are clips of the same data that must not be there; `unchecked` names what no source that
    we could read says."""

    about: str
    source: str
    clips: dict[str, Expected]
    at_most: bool = False
    inside: str = ""
    without: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """One clip of a folder: what there is of it in words, and what is wrong with it, empty where nothing is."""

    name: str
    text: str
    wrong: str = ""


def splits() -> dict[str, Split]:
    """The lists that come with the pack, by name."""
    return {name: _split(table) for name, table in read_toml(LISTS).items()}


def _split(table: dict[str, Any]) -> Split:
    without = tuple(table.get("without", ()))
    if "first" in table:
        first, last = table["first"], table["last"]
        numbered = (f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1))
        names = [name for name in numbered if name not in without]
    else:
        names = table["clips"]
    size = tuple(table["size"]) if "size" in table else None
    each = [Expected(frames, (w, h)) for frames, w, h in table.get("each", ())]
    clips = dict(zip(names, each or [Expected(table["frames"], size)] * len(names), strict=True))
    inside, unchecked = table.get("inside", ""), tuple(table.get("unchecked", ()))
    return Split(table["about"], table["source"], clips, table.get("at_most", False), inside, without, unchecked)


def checked(split: Split, folder: Path) -> Iterator[Found]:
    """Every clip of the list, as it is below `folder`, then those that must not be there. Raises SettingError where
    there is no such folder."""
    if not folder.is_dir():
        raise SettingError(f"{folder}: no such folder; expected one that holds a folder of frames for each clip")
    for name, expected in split.clips.items():
        yield _found(split, name, expected, folder / name)
    for name in split.without:
        if (folder / name).is_dir():
            advice = "training would learn from it: move it into a folder named test, which is never trained on"
            yield Found(name, "is there, and belongs to another list", advice)


def _found(split: Split, name: str, expected: Expected, place: Path) -> Found:
    if not place.is_dir():
        return Found(name, "missing", "missing")
    inner = place / split.inside if split.inside else place
    try:
        pictures = list_pictures(inner if inner.is_dir() else place)
        sizes = Counter((header.width, header.height) for header in map(read_header, pictures))
    except VideoError as error:
        return Found(name, "cannot be read", str(error))
    text = f"{len(pictures)} frames of {' and '.join(f'{w}x{h}' for w, h in sizes)}"
    wrong: list[str] = []
    notes: list[str] = []
    if expected.frames is not None and _other_count(split, len(pictures), expected.frames):
        said = f"expected {'at most ' if split.at_most else ''}{expected.frames}"
        (notes if "frames" in split.unchecked else wrong).append(said)
    if len(sizes) > 1:
        wrong.append("expected frames of one size")
    elif expected.size is not None:
        (size,), (width, height) = sizes, expected.size
        small = (width // LR, height // LR)
        if size == small:
            text += ": LR frames"
        elif size != expected.size:
            said = f"expected {width}x{height}, or {small[0]}x{small[1]} of LR frames"
            (notes if "size" in split.unchecked else wrong).append(said)
    return Found(name, text + "".join(f" ({note}, which is unchecked)" for note in notes), "; ".join(wrong))


def _other_count(split: Split, count: int, expected: int) -> bool:
    return count > expected if split.at_most else count != expected


def described(split: Split) -> str:
    """A list in two lines."""
    names = list(split.clips)
    shown = ", ".join(names) if len(names) <= 10 else f"{names[0]}, {names[1]} ... {names[-1]}"
    unchecked = f"; unchecked: {', '.join(split.unchecked)}" if split.unchecked else ""
    return f"{split.about}\n  {len(names)} clips: {shown} ({split.source}{unchecked})"


def main(arguments: list[str]) -> int:
    """Exit codes: 0 all as expected, 2 not so (one line says what)."""
    parser = argparse.ArgumentParser(
        prog="python -m training splits", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", nargs=2, metavar=("LIST", "DIR"), help="whether DIR has the clips of LIST")
    options = parser.parse_args(arguments)
    try:
        known = splits()
        if not options.check:
            for name, split in known.items():
                print(f"{name}: {described(split)}")
            return 0
        _check(known, *options.check)
    except VSRError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _check(known: dict[str, Split], name: str, folder: str) -> None:
    if name not in known:
        raise SettingError(f"unknown list '{name}': expected one of {', '.join(known)}")
    found = list(checked(known[name], Path(folder)))
    for clip in found:
        print(f"{clip.name}: {clip.text}{f': {clip.wrong}' if clip.wrong not in ('', clip.text) else ''}")
    missing = [clip.name for clip in found if clip.wrong == "missing"]
    others = [clip.name for clip in found if clip.wrong not in ("", "missing")]
    if missing or others:
        what = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has {', '.join(others)} otherwise"] * bool(others)
        count = len(known[name].clips)
        raise SettingError(
            f"{folder} {' and '.join(what)}: expected the {count} clips of {name} as listed; get them again"
        )
    print(f"{folder} has all {len(known[name].clips)} clips of {name}")
