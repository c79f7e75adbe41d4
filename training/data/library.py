"""Folders of videos, frames and photographs, read once into memory as clean pixels.

The rules:

- A folder of pictures whose names count up in one step (nine in ten of them) is a video, unless its first pictures
  look unlike one another, as in an album that a camera numbered; a gap or a scene cut starts another video. Any
  other folder holds photographs.
- Frames compressed with loss are halved, which hides the damage; frames of PNG or a lossless codec are not.
- A JPEG photograph is halved when it is coarser than libjpeg's quality 90; PNG photographs are not.
- Folders named as FOR_TESTS, and files and folders named in `held_out`, are left out.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vsr_ops.errors import VideoError
from vsr_ops.video.pictures import list_pictures, load_picture, read_header
from vsr_ops.video.reader import probe, read_frames
from vsr_ops.video.scenes import find_cuts

PICTURES = {".jpg", ".jpeg", ".png"}
VIDEOS = {".mp4", ".mkv", ".webm", ".mov", ".avi"}
LOSSLESS = {"ffv1", "huffyuv", "ffvhuff", "utvideo", "png", "rawvideo", "qtrle"}

HELD_OUT = frozenset(
    {"kite-surf", "car-shadow", "roman-colosseum", "motherboard-circuits", "tea-gardens", "budgie-branch"}
)
"""Kept out of training, so that validation sees nothing the weights were fitted to."""

FOR_TESTS = ("test", "test_*", "val", "val_*", "validation")
"""Names (with wildcards) of folders below the root that are never trained on."""

BROKEN_SHARE = 0.05
"""Of all clips and photographs; more unreadable ones stop the run."""

_ALIKE = 0.5
"""Correlation of neighbours at 16x16: 0.96 or more (median) in DAVIS, 0.25 or less among unrelated photographs."""

_FINE_STEP = 11.5
"""Mean luminance step of libjpeg's quality 90."""


@dataclass(frozen=True)
class Source:
    """One clip's or photograph's pixels, `(frames, 3, h, w)` uint8; a photograph has one frame, a clip no cut."""

    name: str
    pixels: Tensor


def load_sources(
    root: Path, video_limit: int = 120, held_out: Collection[str] = HELD_OUT
) -> tuple[list[Source], list[Source]]:
    """(photographs, videos) below `root`, in a fixed order; of each video the first `video_limit` frames.

    What cannot be read is named in a warning and skipped, with a count at the end. Raises VideoError when that is
    more than 5 % of all, and when nothing is left.
    """
    photos: list[Source] = []
    videos: list[Source] = []
    broken: list[str] = []
    found = list(_find(root, held_out))
    for kind, path in found:
        try:
            if kind == "photograph":
                photos.append(Source(path.stem, read_photograph(path)[None]))
            else:
                videos += scenes(path.stem if path.is_file() else path.name, *_read_runs(path, video_limit))
        except (VideoError, OSError) as error:
            broken.append(str(path))
            warnings.warn(f"skipped {kind}: {error}", stacklevel=2)
    if broken:
        warnings.warn(f"skipped {len(broken)} of {len(found)} clips and photographs below '{root}'", stacklevel=2)
    if len(broken) > BROKEN_SHARE * len(found):
        raise VideoError(
            f"{len(broken)} of {len(found)} clips and photographs below '{root}' cannot be read, the first of them"
            f" '{broken[0]}'; expected at most {BROKEN_SHARE:.0%}: repair or remove them"
        )
    if not photos and not videos:
        raise VideoError(f"'{root}' holds nothing to train on; expected videos, folders of frames or photographs")
    return photos, videos


def read_picture(path: Path) -> Tensor:
    """`(3, h, w)` uint8, the right way up. Raises VideoError."""
    return _bytes(load_picture(read_header(path))[0])


def read_photograph(path: Path) -> Tensor:
    """`read_picture`, halved if it is a coarse JPEG (see the module's rules)."""
    with Image.open(path) as image:
        tables: dict[int, list[int]] = getattr(image, "quantization", {})
    pixels = read_picture(path)
    coarse = bool(tables) and sum(tables[0]) / len(tables[0]) > _FINE_STEP
    return halve(pixels[None])[0] if coarse else pixels


def halve(pixels: Tensor) -> Tensor:
    """Mean of 2x2 blocks of `(frames, 3, h, w)` uint8: hides the compression damage of the source."""
    return F.avg_pool2d(pixels.float(), 2).round().to(torch.uint8)


def read_video(path: Path, every: int = 1, limit: int = 10**9) -> Tensor:
    """Each `every`-th frame of a video file, `(frames, 3, h, w)` uint8, halved unless lossless. Raises VideoError."""
    info = probe(path)
    keep: Callable[[Tensor], Tensor] = (lambda x: x) if info.codec in LOSSLESS else halve
    stop = min(info.frames, limit * every)
    frames = (frame.image for i, frame in enumerate(read_frames(info, 0, stop)) if i % every == 0)
    return torch.cat([keep(_bytes(image)[None]) for image in frames])


def scenes(name: str, *runs: Tensor) -> list[Source]:
    """A source per scene of each run of frames; the parts of a divided one are numbered."""
    parts: list[Tensor] = []
    for run in runs:
        cuts = find_cuts(frame.float() / 255 for frame in run)
        parts += [run[a:b] for a, b in pairwise((0, *cuts, len(run)))]
    return [Source(name if len(parts) == 1 else f"{name} {i}", part) for i, part in enumerate(parts, start=1)]


def counts_up(paths: list[Path]) -> bool:
    """Whether picture names number the frames of a video: one text around one number that grows by one step."""
    steps = _steps(paths)
    return bool(steps) and Counter(steps).most_common(1)[0][1] >= 0.9 * len(steps) and None not in steps


def look_alike(paths: list[Path]) -> bool:
    """Whether most neighbours among the first nine pictures do; also where one cannot be read."""
    try:
        small = [_thumbnail(path) for path in paths[:9]]
    except OSError:
        return True
    unlike = [float(F.cosine_similarity(a, b, dim=0)) < _ALIKE for a, b in pairwise(small)]
    return sum(unlike) <= len(unlike) / 2


def _thumbnail(path: Path) -> Tensor:
    """Luminance about its mean, `(256,)`; flat pictures are like one another."""
    with Image.open(path) as image:
        image.draft("L", (64, 64))
        grey = torch.tensor(list(image.convert("L").resize((16, 16), Image.Resampling.BOX).tobytes())).float()
    return grey - grey.mean() if grey.std() > 1 else torch.ones_like(grey)


def _steps(paths: list[Path]) -> list[int | None]:
    """By how much each name counts on from the one before; None where the text around the number differs."""
    parts = [re.fullmatch(r"(.*?)(\d+)(\D*)", path.stem) for path in paths]
    return [int(b[2]) - int(a[2]) if a and b and (a[1], a[3]) == (b[1], b[3]) else None for a, b in pairwise(parts)]


def _read_runs(path: Path, limit: int) -> list[Tensor]:
    if path.is_file():
        return [read_video(path, limit=limit)]
    paths = list_pictures(path)
    usual = Counter(_steps(paths)).most_common(1)[0][0]
    gaps = [i for i, step in enumerate(_steps(paths), start=1) if step != usual and i < limit]
    lossy = any(each.suffix.lower() != ".png" for each in paths)
    sizes: set[torch.Size] = set()
    frames: list[Tensor] = []
    for each in paths[:limit]:
        picture = read_picture(each)
        sizes.add(picture.shape)
        if len(sizes) > 1:
            raise VideoError(f"'{each}' has another size than '{paths[0].name}'; expected frames of one size")
        frames.append(halve(picture[None])[0] if lossy else picture)
    return [torch.stack(frames[a:b]) for a, b in pairwise((0, *gaps, len(frames)))]


def _find(root: Path, held_out: Collection[str]) -> Iterator[tuple[str, Path]]:
    """(kind, path) of everything to read."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    wanted = [path for path in files if not _left_out(path.relative_to(root), held_out)]
    for folder in sorted({path.parent for path in wanted if path.suffix.lower() in PICTURES}):
        paths = list_pictures(folder)
        if counts_up(paths) and look_alike(paths):
            yield "clip", folder
        else:
            yield from (("photograph", p) for p in wanted if p.parent == folder and p.suffix.lower() in PICTURES)
    yield from (("clip", path) for path in wanted if path.suffix.lower() in VIDEOS)


def _left_out(path: Path, held_out: Collection[str]) -> bool:
    folders = path.parent.parts
    named = any(name in held_out for name in (*folders, path.stem, path.name))
    return named or any(fnmatch(name, pattern) for name in folders for pattern in FOR_TESTS)


def _bytes(image: Tensor) -> Tensor:
    return (image * 255).round().to(torch.uint8)
