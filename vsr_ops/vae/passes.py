"""A part of the picture through a VAE's steps, and tiles run again until their group norms stand still."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..modules.windows import Place
from .capm_tiles import TiledCAPM
from .group_norm import Statistics
from .layout import DecoderOp
from .places import Box, Tap, at_level, crop, resized

#: Passes end when no group's mean or deviation moves by more than this share of the deviation: 4 or 5 passes, and a
#: picture within 1e-3 of that of one pass. Measured with decoders of random weights, six sizes: to 2e-3 the same passes
#: and at most 7.3e-4; at 3e-3 one pass less for some, and up to 3.1e-3; at 1e-2 up to 6.8e-3. The bundled decoder's
#: picture moves by a tenth of what its statistics do.
TOLERANCE = 1e-3

Features = Mapping[str, Tensor]
"""What the encoder makes of the reference, by the steps that it goes into."""


def walk(
    steps: Sequence[DecoderOp],
    x: Tensor,
    boxes: Sequence[Box],
    features: Features,
    statistics: Statistics,
    extent: tuple[int, int],
    own: Box | None = None,
    taps: Mapping[str, Tap] | None = None,
    hint: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One tile through `steps`: what comes out over the last of `boxes`, and the features over `taps`.

    `extent` is the whole picture's size, `own` the part of it that is this tile's alone, for the statistics to be
    gathered from; `hint` the frames' compression levels, for CAPM.
    """
    tapped: dict[str, Tensor] = {}
    for index, step in enumerate(steps):
        have = boxes[index]
        if taps and step.resize < 0:
            tapped.update({name: crop(x, have, tap.box) for name, tap in taps.items() if tap.level == step.level})
        statistics.inner = None
        if own is not None:
            rows, cols = (
                slice(o.start - h.start, o.stop - h.start) for o, h in zip(at_level(own, step.level), have, strict=True)
            )
            statistics.inner = (rows, cols)
        place = Place(have[0].start, have[1].start, extent[0] >> step.level, extent[1] >> step.level)
        alone = None if own is None else at_level(own, step.level)
        if step.placed is not None:
            x = step.placed(x, place, alone, hint)
        else:
            x = step.run(x) if step.guided is None else step.guided(features[step.name], x, place, alone)
        rows, cols = (resized(span, step.resize) for span in have)
        x = crop(x, (rows, cols), boxes[index + 1])
    return x, tapped


def run_passes(
    statistics: Statistics,
    sketch: Callable[[], object],
    run: Callable[[], object],
    tolerance: float,
    prompts: TiledCAPM | None = None,
) -> None:
    """`run` over all tiles, each time after `sketch` over the mosaic, until no statistics move by more than
    `tolerance`; at the latest when the last norm's are exact."""
    gathered: list[Statistics | TiledCAPM] = [statistics] if prompts is None else [statistics, prompts]
    unknown = len(statistics.norms) + (0 if prompts is None else len(prompts.model.shape.widths))
    with statistics.applied():
        for _ in range(unknown + 1):
            for part in gathered:
                part.sketching = True
            sketch()
            for part in gathered:
                part.sketching = False
            run()
            moved = [each for part in gathered for each in part.settle()]
            # The one number that a pass waits for; NaN ends here, too, and is refused where frames are.
            if not moved or not float(torch.stack(moved).amax()) > tolerance:
                return
