"""What the pack writes down of a LATENT's video, and what of it still holds when other nodes have cut the LATENT.

Core's nodes copy a LATENT's dictionary and change its samples. Which frames were taken they say in `batch_index`:
`LatentFromBatch` the frames' numbers; `RepeatLatentBatch` nothing, or the numbers raised by their span for each
repetition; `LatentBatch` both numbers in a row. (Frames taken first and repeated then look like the frames that follow:
that alone cannot be seen.) `RebatchLatents` drops what it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...vsr_ops.errors import SettingError

#: Where it stands in a LATENT. (A conditioning, which nobody cuts, has `vsr_cuts` and `vsr_frames`.)
KNOWN = "vsr_video"

_DECODE_FIRST = "decode first, and cut or join the pictures instead"


@dataclass(frozen=True)
class KnownVideo:
    """A video as it was encoded: frames, rows and columns of its latents, height and width in pixels (under a latent's
    padding less), and the first frames of new scenes."""

    latents: tuple[int, int, int]
    size: tuple[int, int]
    cuts: tuple[int, ...]

    @staticmethod
    def of(frames: Tensor, samples: Tensor, cuts: tuple[int, ...]) -> KnownVideo:
        """Of pictures `(n, 3, height, width)` and their latents `(n, 4, h, w)`."""
        (height, width), (rows, cols) = frames.shape[-2:], samples.shape[-2:]
        return KnownVideo((samples.shape[0], rows, cols), (height, width), cuts)


def cuts_of(latent: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The first frames of new scenes among the frames that a LATENT holds now, or nothing for a LATENT of which nothing
    is known. Raises SettingError where they cannot be told."""
    known: KnownVideo | None = latent.get(KNOWN)
    if known is None:
        return None
    frames = _kept(latent, known)
    scene = [sum(cut <= frame for cut in known.cuts) for frame in range(known.latents[0])]
    return tuple(
        i for i in range(1, len(frames)) if frames[i] != frames[i - 1] + 1 or scene[frames[i]] != scene[frames[i - 1]]
    )


def size_of(latent: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width in pixels of the picture in a LATENT, or nothing where all of it is picture, as far as known.
    Raises SettingError where a node has resized or cropped it, so that its padding may be anywhere."""
    known: KnownVideo | None = latent.get(KNOWN)
    if known is None:
        return None
    there, was = tuple(latent["samples"].shape[-2:]), known.latents[1:]
    if there == was:
        return known.size
    cells = {pixels / cells for pixels, cells in zip(known.size, was, strict=True)}
    if len(cells) == 1 and cells.pop().is_integer():
        # No padding: there is none in any part of it, nor at any other size.
        return None
    raise SettingError(
        f"the LATENT is {there[1]}x{there[0]} (width x height), but {was[1]}x{was[0]} when it was made of pictures of"
        f" {known.size[1]}x{known.size[0]} pixels with padding: expected it uncropped and unresized, for where the"
        f" padding lies now is unknown; {_DECODE_FIRST}, or wire a reference of the result's size"
    )


def frames_of(latent: Mapping[str, Any]) -> list[int]:
    """The numbers of the frames that a LATENT holds, in the video that was encoded; where nothing is known of that, as
    the nodes that took them say, else from 0. Raises SettingError where they cannot be told."""
    known: KnownVideo | None = latent.get(KNOWN)
    if known is not None:
        return _kept(latent, known)
    count = latent["samples"].shape[0]
    index: list[int] = latent.get("batch_index") or list(range(count))
    return index if len(index) == count else list(range(count))


def _kept(latent: Mapping[str, Any], known: KnownVideo) -> list[int]:
    """The numbers of the frames that a LATENT holds, in the video that was encoded."""
    count, total = latent["samples"].shape[0], known.latents[0]
    index: list[int] | None = latent.get("batch_index")
    if index is None:
        times, rest = divmod(count, total)
        if times and not rest:
            return list(range(total)) * times
        raise SettingError(
            f"the LATENT holds {count} frames, but {total} when its scene cuts were found, and the node that changed it"
            f" did not say which: expected Latent From Batch, Repeat Latent Batch or Latent Batch; {_DECODE_FIRST}"
        )
    index = _first_of_repeated(index, total)
    if count % len(index) or not all(0 <= frame < total for frame in index):
        raise SettingError(
            f"the LATENT holds {count} frames numbered {_short(index)}, its scene cuts are known of frames 0 to"
            f" {total - 1}: expected frames of that one video; {_DECODE_FIRST}"
        )
    if len(set(index)) < len(index):
        raise SettingError(
            f"the LATENT joins videos (frames numbered {_short(index)}), and only the first one's scene cuts are known:"
            f" expected frames of one video, each once; {_DECODE_FIRST}"
        )
    return index * (count // len(index))


def _first_of_repeated(index: list[int], total: int) -> list[int]:
    """The numbers before Repeat Latent Batch raised them, where it did and only one count of repetitions can have led
    to these: it leaves the video's range."""
    if max(index) < total:
        return index
    found: list[list[int]] = []
    for period in range(1, len(index) // 2 + 1):
        first = index[:period]
        span = max(first) - min(first) + 1
        raised = [frame + i * span for i in range(len(index) // period) for frame in first]
        if max(first) < total and raised == index:
            found.append(first)
    whole = list(range(total))
    return whole if whole in found else found[0] if len(found) == 1 else index


def _short(index: list[int]) -> str:
    return ", ".join(map(str, index)) if len(index) <= 8 else f"{', '.join(map(str, index[:6]))}, ... {index[-1]}"
