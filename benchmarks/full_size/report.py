"""The one table: its lines, as they are found and all together."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from statistics import median

from benchmarks.common import MIB, table
from benchmarks.full_size.rows import PLAIN, ROWS, Row, Taken

#: Steps of a whole run, by which a frame's time and the VAE's share are told.
STEPS = 25
GIB = 1024 * MIB

COLUMNS = {
    "what": "",
    "passes": "passes",
    "seconds": "s",
    "ratio": "of plain",
    "frame": "s a frame",
    "share": "VAE",
    "peak": "peak GiB",
    "traffic": "MiB to and from",
    "error": "error",
}
LEGEND = f"""s: of a step of the whole video, or to encode or decode it. of plain: beside plain tiles' step.
s a frame, VAE: of a whole run of {STEPS} such steps, encoded and decoded; the VAE's share of it.
peak GiB: most held, weights included. MiB to and from: the device, in a step. error: relative, against float32."""


@dataclass(frozen=True)
class Line:
    """One line, text by text; `failed` where the benchmark is to end with an error for it."""

    what: str
    passes: str = ""
    seconds: str = ""
    ratio: str = ""
    frame: str = ""
    share: str = ""
    peak: str = ""
    traffic: str = ""
    error: str = ""
    failed: bool = False

    @property
    def cells(self) -> list[str]:
        """In the order of the columns."""
        return [str(getattr(self, name)) for name in COLUMNS]

    def tell(self) -> Line:
        """Says it at once, for a run that may be cut off."""
        print("  ".join(cell for cell in self.cells if cell), file=sys.stderr, flush=True)
        return self


assert [each.name for each in fields(Line)] == [*COLUMNS, "failed"]


@dataclass(frozen=True)
class VAETaken:
    """Seconds to encode and to decode a whole video, and the most bytes held by each."""

    encode: float
    decode: float
    encode_peak: int
    decode_peak: int

    def lines(self, label: str, frames: int) -> list[Line]:
        """Encoding and decoding: seconds of the video, and of one frame."""
        each = {"encode": (self.encode, self.encode_peak), "decode": (self.decode, self.decode_peak)}
        return [
            Line(f"{label}: {name}", seconds=f"{s:.2f}", frame=f"{s / frames:.2f}", peak=f"{held / GIB:.2f}").tell()
            for name, (s, held) in each.items()
        ]


def of_plain(times: dict[str, list[Taken]], name: str) -> str:
    """Median over rounds of a row's time by plain tiles' in the same round."""
    pairs = zip(times[name], times[PLAIN], strict=False)
    return f"{median(a.seconds / b.seconds for a, b in pairs):.3f}"


def row_line(label: str, row: Row, taken: Sequence[Taken], ratio: str, frames: int, vae: VAETaken | None) -> Line:
    """A row's line. A frame's time and the VAE's share are of a run of STEPS such steps, encoded and decoded."""
    seconds = median(each.seconds for each in taken)
    most = max(taken, key=lambda each: each.peak)
    whole = STEPS * seconds + (0.0 if vae is None else vae.encode + vae.decode)
    note = ", did not fit: in parts" if any(each.parted for each in taken) else ""
    moved = max((each.moved for each in taken if each.moved is not None), key=sum, default=None)
    return Line(
        f"{label}: {row.title}{note}",
        str(most.passes),
        f"{seconds:.2f}",
        ratio,
        "" if vae is None else f"{whole / frames:.2f}",
        "" if vae is None else f"{(vae.encode + vae.decode) / whole:.3f}",
        f"{most.peak / GIB:.2f}",
        "" if moved is None else f"{moved[0] / MIB:.0f} + {moved[1] / MIB:.0f}",
    ).tell()


def row_lines(label: str, times: dict[str, list[Taken]], frames: int, vae: VAETaken | None) -> list[Line]:
    """The lines of the rows that were timed, in the table's order."""
    timed = [name for name in ROWS if times.get(name)]
    return [row_line(label, ROWS[name], times[name], of_plain(times, name), frames, vae) for name in timed]


def failure(what: str, error: BaseException) -> Line:
    """A line for what did not work, and why."""
    reason = str(error).splitlines()[0] if str(error) else ""
    return Line(what, error=f"FAILED: {type(error).__name__} {reason}"[:160], failed=True).tell()


def left_out(what: str) -> Line:
    """A line for what there was no time for."""
    return Line(what, seconds="no time left").tell()


def show(lines: Sequence[Line]) -> None:
    """Prints the table; columns in which nothing stands are left out."""
    used = [i for i, title in enumerate(COLUMNS.values()) if not title or any(line.cells[i] for line in lines)]
    titles = list(COLUMNS.values())
    table([titles[i] for i in used], [[line.cells[i] for i in used] for line in lines])
    print(LEGEND)
