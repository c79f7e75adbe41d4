"""Guidance: how the branches of one step become one estimate. Plain functions in a table, to be swapped.

All work on the denoised estimate x0 of the whole video. With eps = (x - x0)/sigma and both branches seeing the same x,
eps' + (1+s)(eps - eps') = (x - (x0' + (1+s)(x0 - x0')))/sigma: an equation for eps holds for x0 too.

To add a strategy: CONTRIBUTING, "A guidance".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..errors import SettingError
from .attention import SelfAttention, Tempered, identity

#: SAG's blur: deviation in latent pixels and kernel size, as the host's node has them.
SAG_BLUR_SIGMA, SAG_BLUR_SIZE = 2.0, 9


@dataclass(frozen=True)
class Branch:
    """One way to evaluate the model at a step. Banks are kept apart by `name`.

    `attention` replaces self-attention in the layers called `layers`, a name in LAYERS. `observe` asks for the saliency
    of the middle block.
    """

    name: str
    conditional: bool = True
    attention: SelfAttention | None = None
    layers: str = "ends"
    observe: bool = False


class Denoise(Protocol):
    """(x, branch) -> denoised estimate; at `observe` branches the second value is the saliency `(frames, 1, h, w)`
    in [0, 1], else None."""

    def __call__(self, x: Tensor, branch: Branch) -> tuple[Tensor, Tensor | None]: ...


@dataclass(frozen=True)
class GuidanceScale:
    """`cfg` 1 is off. `scale` is the s of DSSAG, PAG and SAG; 0 is off. `gamma` is this step's, see `gamma_at`."""

    cfg: float = 1.0
    scale: float = 0.0
    gamma: float = 0.0


COND = Branch("cond")
UNCOND = Branch("uncond", conditional=False)


def dssag_branch(gamma: float, layers: str = "ends") -> Branch:
    """DSSAG's perturbed branch: attention blurred by gamma."""
    return Branch("dssag", attention=Tempered(gamma), layers=layers)


def pag_branch(layers: str = "middle") -> Branch:
    """PAG's perturbed branch: each token sees itself alone."""
    return Branch("pag", attention=identity, layers=layers)


def gamma_at(sigma: float, sigma_max: float, sigma_min: float, rho: float = 0.5) -> float:
    """gamma of DC-VSR equation 10: ((ln s - ln s_min)/(ln s_max - ln s_min))^rho, clamped to [0, 1].

    1 at the schedule's first sigma, 0 at its last above zero. A schedule of one sigma gives 1.
    """
    if sigma <= 0:
        return 0.0
    if sigma_max <= sigma_min:
        return 1.0
    share = (math.log(sigma) - math.log(sigma_min)) / (math.log(sigma_max) - math.log(sigma_min))
    return min(max(share, 0.0), 1.0) ** rho


def extrapolate(weak: Tensor, strong: Tensor, weight: float) -> Tensor:
    """weak + weight * (strong - weak); weight 1 is `strong` itself, 0 `weak` itself, exactly."""
    if weight == 1:
        return strong
    if weight == 0:
        return weak
    return torch.lerp(weak.float(), strong.float(), weight).to(strong.dtype)


def add_guidance(guided: Tensor, strong: Tensor, weak: Tensor, scale: float) -> Tensor:
    """guided + scale * (strong - weak): a perturbed branch's share on top of whatever guided before; DC-VSR equation 4
    where nothing did, and `guided` is `strong`. Scale 0 is `guided` itself."""
    if scale == 0:
        return guided
    return (guided.float() + scale * (strong.float() - weak.float())).to(guided.dtype)


def sag_degrade(estimate: Tensor, saliency: Tensor) -> Tensor:
    """The estimate, blurred where `saliency` `(frames, 1, h, w)` says that the model attends (SAG, section 4)."""
    from kornia.filters import gaussian_blur2d  # slow to import

    base = estimate.float()
    blurred = gaussian_blur2d(base, (SAG_BLUR_SIZE, SAG_BLUR_SIZE), (SAG_BLUR_SIGMA, SAG_BLUR_SIGMA))
    return (base + saliency.to(base) * (blurred - base)).to(estimate.dtype)


def sag_renoise(x: Tensor, estimate: Tensor, degraded: Tensor) -> Tensor:
    """The degraded estimate with the noise of `x` on it."""
    return (degraded.float() + x.float() - estimate.float()).to(x.dtype)


# --- One formula each: what is added to the estimate of CFG's branches, also where a host has evaluated these ---------

#: (x, branch) -> denoised estimate.
Evaluate = Callable[[Tensor, Branch], Tensor]


def cfg_branches(gamma: float | None = None, layers: str = "ends", observe: bool = False) -> tuple[Branch, Branch]:
    """The conditional and the unconditional branch of CFG. With a `gamma` DSSAG blurs the second (DC-VSR, equation 9);
    `observe` asks both for their saliency, for SAG."""
    uncond = UNCOND if gamma is None else replace(UNCOND, attention=Tempered(gamma), layers=layers)
    return replace(COND, observe=observe), replace(uncond, observe=observe)


def add_dssag(
    evaluate: Evaluate, x: Tensor, guided: Tensor, cond: Tensor, gamma: float, scale: float, layers: str = "ends"
) -> Tensor:
    """Detail-suppression guidance without CFG (DC-VSR, equation 8): eps' + (1+s)(eps - eps') = eps + s (eps - eps')."""
    if scale == 0 or gamma == 0:
        # At gamma 0 the perturbed branch is the plain one: nothing to extrapolate from, no pass to spend.
        return guided
    weak = evaluate(x, dssag_branch(gamma, layers))
    return add_guidance(guided, cond, weak, scale)


def add_pag(
    evaluate: Evaluate, x: Tensor, guided: Tensor, cond: Tensor, scale: float, layers: str = "middle"
) -> Tensor:
    """Perturbed-attention guidance (DC-VSR, equation 6) on top of what guided before: each token sees itself alone."""
    if scale == 0:
        return guided
    weak = evaluate(x, pag_branch(layers))
    return add_guidance(guided, cond, weak, scale)


def add_sag(
    evaluate: Evaluate, x: Tensor, guided: Tensor, weak: Branch, estimate: Tensor, saliency: Tensor, scale: float
) -> Tensor:
    """Self-attention guidance (DC-VSR, equation 5) on top of what guided before.

    `estimate` is that of the branch `weak` (unconditional if CFG is on), which was observed: blurred where its middle
    block attends most, noise intact, and evaluated again. With D the blurred estimate and D' the model's answer to it,
    eps(x) - eps(b(x)) = (D' - D)/sigma, as both have the noise x - estimate on them.
    """
    if scale == 0:
        return guided
    degraded = sag_degrade(estimate, saliency)
    answer = evaluate(sag_renoise(x, estimate, degraded), Branch("sag", conditional=weak.conditional))
    return add_guidance(guided, degraded, answer, scale)


# --- The strategies: every branch of a step, evaluated and put together -----------------------------------------------


def _estimate(denoise: Denoise) -> Evaluate:
    return lambda x, branch: denoise(x, branch)[0]


def no_guidance(denoise: Denoise, x: Tensor, strength: GuidanceScale) -> Tensor:
    """The conditional branch alone."""
    return denoise(x, COND)[0]


def cfg(denoise: Denoise, x: Tensor, strength: GuidanceScale) -> Tensor:
    """Classifier-free guidance, DC-VSR equation 3 with cfg = 1 + s."""
    cond = denoise(x, COND)[0]
    if strength.cfg == 1:
        return cond
    return extrapolate(denoise(x, UNCOND)[0], cond, strength.cfg)


def dssag(denoise: Denoise, x: Tensor, strength: GuidanceScale) -> Tensor:
    """Detail-suppression guidance: DC-VSR equation 8, or 9 (with 1 + s = cfg) when cfg is on. Two passes either way."""
    cond = denoise(x, COND)[0]
    if strength.cfg == 1:
        return add_dssag(_estimate(denoise), x, cond, cond, strength.gamma, strength.scale)
    _, blurred = cfg_branches(strength.gamma)
    return extrapolate(denoise(x, blurred)[0], cond, strength.cfg)


def pag(denoise: Denoise, x: Tensor, strength: GuidanceScale) -> Tensor:
    """Perturbed-attention guidance in the middle block, on top of CFG."""
    cond = denoise(x, COND)[0]
    guided = cond if strength.cfg == 1 else extrapolate(denoise(x, UNCOND)[0], cond, strength.cfg)
    return add_pag(_estimate(denoise), x, guided, cond, strength.scale)


def sag(denoise: Denoise, x: Tensor, strength: GuidanceScale) -> Tensor:
    """Self-attention guidance on top of CFG. The weak branch is the one observed, as in the host."""
    if strength.scale == 0:
        return cfg(denoise, x, strength)
    weak = COND if strength.cfg == 1 else UNCOND
    estimate, saliency = denoise(x, replace(weak, observe=True))
    assert saliency is not None
    guided = estimate if weak is COND else extrapolate(estimate, denoise(x, COND)[0], strength.cfg)
    return add_sag(_estimate(denoise), x, guided, weak, estimate, saliency, strength.scale)


Predict = Callable[[Denoise, Tensor, GuidanceScale], Tensor]
"""(denoise, x, strength) -> the guided estimate of the whole video."""


@dataclass(frozen=True)
class Guide:
    """A strategy of the table: its function, the scale and cfg to use when none are given, and the branches of a step
    that see the step's x, which may be evaluated together. `follows`: whether it evaluates one more on what they give.
    """

    predict: Predict
    default_scale: float
    default_cfg: float
    branches: Callable[[GuidanceScale], tuple[Branch, ...]]
    follows: Callable[[GuidanceScale], bool] = lambda strength: False

    def passes(self, strength: GuidanceScale) -> int:
        """How many times a step evaluates the video."""
        return len(self.branches(strength)) + self.follows(strength)


def _plain_branches(strength: GuidanceScale) -> tuple[Branch, ...]:
    return (COND,) if strength.cfg == 1 else (COND, UNCOND)


def _dssag_branches(strength: GuidanceScale) -> tuple[Branch, ...]:
    if strength.cfg != 1:
        return cfg_branches(strength.gamma)
    return (COND, dssag_branch(strength.gamma)) if strength.scale != 0 and strength.gamma != 0 else (COND,)


def _pag_branches(strength: GuidanceScale) -> tuple[Branch, ...]:
    return (*_plain_branches(strength), *([pag_branch()] if strength.scale != 0 else []))


def _sag_branches(strength: GuidanceScale) -> tuple[Branch, ...]:
    *others, weak = _plain_branches(strength)
    return (*others, replace(weak, observe=strength.scale != 0))


GUIDANCE: dict[str, Guide] = {
    "none": Guide(no_guidance, 0.0, 1.0, lambda s: (COND,)),
    "cfg": Guide(cfg, 0.0, 2.0, _plain_branches),
    "dssag": Guide(dssag, 1.0, 1.0, _dssag_branches),
    "pag": Guide(pag, 1.0, 1.0, _pag_branches),
    "sag": Guide(sag, 0.5, 1.0, _sag_branches, lambda s: s.scale != 0),
}


def guide(name: str) -> Guide:
    """The strategy called `name`; raises SettingError with the known names for another."""
    if name not in GUIDANCE:
        raise SettingError(f"guidance is {name!r}: expected one of {', '.join(GUIDANCE)}")
    return GUIDANCE[name]


def resolve_scale(name: str, cfg: float | None = None, scale: float | None = None) -> GuidanceScale:
    """The strengths of a run, gaps filled with the strategy's defaults. Raises SettingError for what cannot combine."""
    chosen = guide(name)
    if name == "none" and cfg not in (None, 1.0):
        raise SettingError(f"cfg is {cfg} but guidance is none: choose --guidance cfg, or leave cfg out")
    if name in ("none", "cfg") and scale not in (None, 0.0):
        raise SettingError(f"guidance scale is {scale} but guidance {name} has none: choose dssag, pag or sag")
    for label, value in {"cfg": cfg, "guidance scale": scale}.items():
        if value is not None and not (math.isfinite(value) and 0 <= value <= 100):
            raise SettingError(f"{label} is {value}: expected a number from 0 to 100")
    if name == "dssag" and cfg not in (None, 1.0) and scale is not None:
        raise SettingError(
            f"DSSAG with cfg {cfg} has that one strength (DC-VSR equation 9: cfg = 1 + s), but a guidance scale of"
            f" {scale} was given too: leave one of the two out"
        )
    return GuidanceScale(
        cfg=chosen.default_cfg if cfg is None else cfg, scale=chosen.default_scale if scale is None else scale
    )
