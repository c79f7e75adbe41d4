"""SATeCo's half for a VAE's decoder, as a kind of decoder module (SATeCo's third stage)."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from training.loop.state import weights_of
from training.loop.task import Batch
from training.tasks.decoder_module_kinds import (
    DecoderModuleModelSettings,
    Further,
    Module,
    changed,
    nothing_further,
    reference_features,
)
from vsr_ops.errors import SettingError
from vsr_ops.modules.sateco import SATeCo, SATeCoShape
from vsr_ops.modules.sateco_file import SATeCos, load_satecos, write_satecos
from vsr_ops.vae.layout import backbone_of, layout_of, level_widths, output_name, output_widths


@dataclass(frozen=True)
class SATeCoVAESettings(DecoderModuleModelSettings):
    """`levels` of the decoder (0: the picture's resolution) have adapters, with `inner` channels of TFA in heads of
    `head`, and `guide` channels of what the encoder sees there. `sateco`: a file or a run to go on from, whose half for
    a UNet joins what is written."""

    sateco: str = ""
    levels: tuple[int, ...] = (1, 2)
    inner: int = 64
    guide: int = 64
    head: int = SATeCoShape.head


def _before(settings: SATeCoVAESettings) -> SATeCos:
    return load_satecos(weights_of(settings.sateco)) if settings.sateco else SATeCos()


def _build(settings: SATeCoVAESettings, parts: nn.Module) -> SATeCo:
    if (known := _before(settings).vae) is not None:
        return known.requires_grad_(True)
    taps, widths = level_widths(parts), output_widths(parts)
    deepest = max(taps)
    if not settings.levels or any(level not in taps or level == deepest for level in settings.levels):
        raise SettingError(f"model.levels is {list(settings.levels)}: expected some of {sorted(taps)[:-1]}")
    names = {f"up_blocks.{deepest - level}": level for level in sorted(settings.levels, reverse=True)}
    shape = SATeCoShape(
        f"{backbone_of(parts)}-vae",
        {name: widths[name] for name in names},
        dict.fromkeys(names, settings.inner),
        settings.guide,
        settings.head,
        taps={name: taps[level] for name, level in names.items()},
    )
    return SATeCo(shape)


def _places(model: nn.Module) -> dict[str, tuple[nn.Module, int]]:
    """The last residual block of each level of the decoder, by the level's name, and that level's number."""
    steps = layout_of(model).decoder(cast(Any, model).decoder)
    return {output_name(steps[0].level, s): (s.modules[0], s.level) for s in steps if s.residual}


@contextmanager
def _beside(model: nn.Module, clip: Batch) -> Generator[Further, None, None]:
    sateco, places = cast(SATeCo, cast(Any, model).beside), _places(model)
    seen = reference_features(model, clip["guide"], max(places[name][1] for name in sateco.shape.widths))

    def adapting(name: str) -> Callable[[Tensor], Tensor]:
        guide = sateco.guide_of(name, seen[places[name][1]].to(sateco.part(name).sfa.keep.dtype))
        return lambda decoded: sateco(name, decoded, guide, len(decoded))

    with changed((places[name][0], adapting(name)) for name in sateco.shape.widths):
        yield nothing_further


def _settle(model: nn.Module, clip: Batch) -> None:
    """A new one is measured by what the decoder gives; one that goes on has the scales it learnt with."""
    parts, sateco, places = cast(Any, model), cast(SATeCo, cast(Any, model).beside), _places(model)
    if any(bool(sateco.part(name).tfa.leave.weight.any()) for name in sateco.shape.widths):
        return
    seen: dict[str, Tensor] = {}

    def look(name: str) -> Callable[[Tensor], Tensor]:
        def note(output: Tensor) -> Tensor:
            seen[name] = output
            return output

        return note

    z = clip["z"]
    with torch.no_grad(), changed((places[name][0], look(name)) for name in sateco.shape.widths):
        parts.decoder(z, torch.zeros(1, len(z), device=z.device), num_frames=len(z))
    sateco.settle(seen)


def _write(path: Path, settings: SATeCoVAESettings, module: SATeCo, trained_on: str) -> None:
    write_satecos(path, replace(_before(settings), vae=module), trained_on)


SATECO = Module(SATeCoVAESettings, _build, _beside, _write, {"with": {}}, _settle)
"""How it is made, run, settled and written."""
