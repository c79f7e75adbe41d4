"""The kinds of decoder modules that can be trained, by name: how each is made, run beside the decoder, and written.

`vsr_ops.vae.stream` runs the same functions at the same places, tile by tile.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from training.loop.state import weights_of
from training.loop.task import Batch
from training.tasks.capm import capm_shape, disagreement, settling, watched
from vsr_ops.errors import SettingError
from vsr_ops.modules.capm import CAPM, SVD_VAE, CAPMShape, attached
from vsr_ops.modules.capm_file import CAPMs, load_capms, write_capms
from vsr_ops.modules.cfw import CFW, CFWShape, write_cfw
from vsr_ops.modules.stam import STAM, STAMShape, write_stam
from vsr_ops.vae.layout import backbone_of, layout_of, level_widths, output_widths


@dataclass(frozen=True)
class DecoderModuleModelSettings:
    """`module` is the name of a kind. `start`: the SVD, a file or folder, "lite", or a run; `refiner`: a file, "lite",
    or a run; empty: the decoded clip is the result."""

    module: str = ""
    start: str = "lite"
    refiner: str = "lite"


@dataclass(frozen=True)
class CFWSettings(DecoderModuleModelSettings):
    """`levels` are fused (0: the picture's resolution), with `blocks` RRDBs that grow by `grow`."""

    levels: tuple[int, ...] = CFWShape.levels
    blocks: int = CFWShape.blocks
    grow: int = CFWShape.grow


@dataclass(frozen=True)
class STAMSettings(DecoderModuleModelSettings):
    """Every residual block of these `levels` of the decoder has one, of `inner` channels (0: its own) and `heads`."""

    levels: tuple[int, ...] = (0, 1, 2, 3)
    inner: int = 0
    heads: int = 4


@dataclass(frozen=True)
class CAPMSettings(DecoderModuleModelSettings):
    """As `vsr_ops.modules.capm.CAPMShape`. `capm`: the CAPM to go on from, a file, "lite", or a run, whose half for
    the UNet stays as it is; where it is empty or lacks the VAE's half: a new one of the other settings."""

    capm: str = ""
    components: int = CAPMShape.components
    code: int = CAPMShape.code
    prompt: int = CAPMShape.prompt
    size: int = CAPMShape.size
    weighing: str = CAPMShape.weighing


Further = Callable[[], Tensor]
"""What else is to be lowered, once the clip is decoded."""


@dataclass(frozen=True)
class Module:
    """How one kind of module is made by its settings for the VAE's encoder and decoder, set beside the decoder for one
    clip, and written; `shown` are what it is tried with on held-out clips, by name: changes of the clip. `settle` sees
    one clip before the first step."""

    settings: type[DecoderModuleModelSettings]
    build: Callable[[Any, nn.Module], nn.Module]
    beside: Callable[[nn.Module, Batch], AbstractContextManager[Further]]
    write: Callable[[Path, Any, Any, str], None]
    shown: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    settle: Callable[[nn.Module, Batch], None] = lambda model, clip: None


def nothing_further() -> Tensor:
    """For modules that have no loss of their own."""
    return torch.zeros(())


@contextmanager
def changed(changes: Iterable[tuple[nn.Module, Callable[[Tensor], Tensor]]]) -> Generator[None, None, None]:
    """Within, what each of these modules gives goes through its function."""

    def hook(change: Callable[[Tensor], Tensor]) -> Any:
        return lambda module, inputs, output: change(output)

    handles = [module.register_forward_hook(hook(change)) for module, change in changes]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _build_cfw(settings: CFWSettings, parts: nn.Module) -> CFW:
    known = level_widths(parts)
    if unknown := [level for level in settings.levels if level not in known or level == max(known)]:
        raise SettingError(f"model.levels names {unknown}: expected some of {sorted(known)[:-1]}")
    widths = tuple(known[level] for level in settings.levels)
    return CFW(CFWShape(settings.levels, widths, settings.blocks, settings.grow, backbone_of(parts)))


@contextmanager
def _beside_cfw(model: nn.Module, clip: Batch) -> Generator[Further, None, None]:
    parts = cast(Any, model)
    cfw, w = cast(CFW, parts.beside), float(clip["w"])
    seen = reference_features(model, clip["guide"], max(cfw.shape.levels))
    # The last residual block of a level comes last.
    last = {step.level: step.modules[0] for step in layout_of(model).decoder(parts.decoder) if step.residual}

    def fusing(level: int) -> Callable[[Tensor], Tensor]:
        return lambda decoded: cfw.fuse(level, seen[level], decoded, w)

    with changed((last[level], fusing(level)) for level in cfw.shape.levels):
        yield nothing_further


def _write_cfw(path: Path, settings: CFWSettings, module: CFW, trained_on: str) -> None:
    write_cfw(path, module, trained_on)


@torch.no_grad()
def reference_features(model: nn.Module, guide: Tensor, deepest: int) -> dict[int, Tensor]:
    """What the encoder makes of a clip in [0, 1], by level to the `deepest`, after each level's last residual block."""
    x, features = 2 * guide - 1, dict[int, Tensor]()
    for step in layout_of(model).encoder(cast(Any, model).encoder):
        if step.level > deepest or (deepest in features and step.resize < 0):
            break
        x = step.run(x)
        if step.residual:
            features[step.level] = x
    return features


def _build_stam(settings: STAMSettings, parts: nn.Module) -> STAM:
    steps = [step for step in layout_of(parts).decoder(cast(Any, parts).decoder) if step.residual]
    known = sorted({step.level for step in steps})
    if unknown := [level for level in settings.levels if level not in known]:
        raise SettingError(f"model.levels names {unknown}: expected some of {known}")
    blocks = tuple((s.name, int(s.norms[-1].num_channels)) for s in steps if s.level in settings.levels)
    return STAM(STAMShape(blocks, settings.inner, settings.heads, backbone_of(parts)))


@contextmanager
def _beside_stam(model: nn.Module, clip: Batch) -> Generator[Further, None, None]:
    parts = cast(Any, model)
    stam, steps = cast(STAM, parts.beside), layout_of(model).decoder(parts.decoder)
    with changed((step.modules[0], stam.block(step.name)) for step in steps if step.name in stam.names):
        yield nothing_further


def _write_stam(path: Path, settings: STAMSettings, module: STAM, trained_on: str) -> None:
    write_stam(path, module, trained_on)


def _before(settings: CAPMSettings) -> CAPMs:
    return load_capms(weights_of(settings.capm)) if settings.capm else CAPMs()


def _build_capm(settings: CAPMSettings, parts: nn.Module) -> CAPM:
    widths = output_widths(parts)
    if (capm := _before(settings).vae) is not None:
        capm.check_fits(SVD_VAE, widths)
        return capm
    return CAPM(capm_shape(SVD_VAE, widths, settings))


@contextmanager
def _beside_capm(model: nn.Module, clip: Batch) -> Generator[Further, None, None]:
    parts, frames = cast(Any, model), clip["z"].shape[0]
    capm, level = cast(CAPM, parts.beside), clip["level"].expand(frames)

    def apart() -> Tensor:
        return disagreement(capm, features, level).mean()

    with watched(capm, parts.decoder) as features, attached(capm, parts.decoder, clip["hint"].expand(frames)):
        yield apart


def _settle_capm(model: nn.Module, clip: Batch) -> None:
    parts, z = cast(Any, model), clip["z"]
    if any(parts.beside.acts(level) for level in parts.beside.shape.widths):
        return  # it goes on, by the scales it learnt with
    with settling(parts.beside, parts.decoder):
        parts.decoder(z, torch.zeros(1, len(z), device=z.device), num_frames=len(z))


def _write_capm(path: Path, settings: CAPMSettings, module: CAPM, trained_on: str) -> None:
    write_capms(path, replace(_before(settings), vae=module), trained_on)


SDATC: dict[str, Module] = {
    "cfw": Module(CFWSettings, _build_cfw, _beside_cfw, _write_cfw, {f"w {w:g}": {"w": w} for w in (0.5, 1.0)}),
    "stam": Module(STAMSettings, _build_stam, _beside_stam, _write_stam, {"with": {}}),
    "capm": Module(
        CAPMSettings,
        _build_capm,
        _beside_capm,
        _write_capm,
        {"told": {}, "not told": {"hint": float("nan")}},
        _settle_capm,
    ),
}
"""SDATC's kinds by name."""
