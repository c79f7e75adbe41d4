"""Guidance against the paper's equations written for eps, exact identities, and the passes each strategy takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from tests.support.tensors import randn, relative
from vsr_ops.errors import SettingError
from vsr_ops.sampling.attention import Tempered, identity
from vsr_ops.sampling.guidance import (
    COND,
    GUIDANCE,
    Branch,
    GuidanceScale,
    add_guidance,
    extrapolate,
    gamma_at,
    guide,
    resolve_scale,
    sag_degrade,
    sag_renoise,
)

SIGMA = 3.0
SHAPE = (2, 4, 12, 16)


def draw(seed: int) -> Tensor:
    return randn(*SHAPE, seed=seed)


X = draw(0)
#: What each kind of pass answers.
ANSWERS = {
    ("cond", True): draw(1),
    ("uncond", False): draw(2),
    ("perturbed", True): draw(3),
    ("perturbed", False): draw(4),
}


def kind(branch: Branch) -> str:
    """Of a pass: SAG perturbs its input, the others their attention."""
    return "perturbed" if branch.attention is not None or branch.name == "sag" else branch.name


class Model:
    """Answers by a branch's name and condition, whatever x is, and keeps what it was asked."""

    def __init__(
        self, saliency: Tensor | float = 0.0, answer: Callable[[Tensor, Branch], Tensor] | None = None
    ) -> None:
        self.asked: list[tuple[Tensor, Branch]] = []
        self._saliency = torch.as_tensor(saliency).expand(2, 1, 12, 16)
        self._answer = answer or (lambda x, branch: ANSWERS[kind(branch), branch.conditional].to(x.dtype))

    def __call__(self, x: Tensor, branch: Branch) -> tuple[Tensor, Tensor | None]:
        self.asked.append((x, branch))
        return self._answer(x, branch), self._saliency if branch.observe else None


def guided(name: str, strength: GuidanceScale, model: Model | None = None, x: Tensor = X) -> Tensor:
    return guide(name).predict(model or Model(), x, strength)


def eps(x0: Tensor, x: Tensor = X) -> Tensor:
    return (x.double() - x0.double()) / SIGMA


def test_gamma_runs_from_one_to_zero_and_only_falls() -> None:
    sigmas = [700 * (0.002 / 700) ** (i / 24) for i in range(25)]
    for rho in (0.25, 0.5, 1.0, 2.0):
        gammas = [gamma_at(sigma, sigmas[0], sigmas[-1], rho) for sigma in sigmas]
        assert gammas[0] == 1.0 and gammas[-1] == 0.0
        assert all(a > b for a, b in pairwise(gammas))
        # Equation 10: these sigmas are even in ln, so gamma^(1/rho) falls along a straight line.
        assert all(math.isclose(g ** (1 / rho), 1 - i / 24, abs_tol=1e-9) for i, g in enumerate(gammas))


def test_gamma_at_the_edges() -> None:
    assert gamma_at(5.0, 5.0, 5.0) == 1.0
    assert gamma_at(0.0, 700.0, 0.002) == 0.0
    assert gamma_at(1000.0, 700.0, 0.002) == 1.0
    assert gamma_at(0.001, 700.0, 0.002) == 0.0
    # Partial denoise: below the model's own first sigma gamma starts lower.
    assert 0.0 < gamma_at(10.0, 700.0, 0.002) < gamma_at(100.0, 700.0, 0.002) < 1.0


def test_gamma_falls_with_rho_where_it_is_neither_end() -> None:
    found = [gamma_at(3.0, 700.0, 0.002, rho) for rho in (0.25, 0.5, 1.0, 2.0)]
    assert found == sorted(found, reverse=True) and len(set(found)) == 4


def test_extrapolation_is_linear_and_exact_at_its_ends() -> None:
    weak, strong = draw(5), draw(6)
    assert extrapolate(weak, strong, 1) is strong and extrapolate(weak, strong, 0) is weak
    for weight in (0.3, 0.9, 1.1, 2.0, 7.5):
        expected = weak.double() + weight * (strong.double() - weak.double())
        assert relative(extrapolate(weak, strong, weight), expected) < 1e-6
    half = extrapolate(weak.half(), strong.half(), 4.0)
    assert half.dtype == torch.float16
    assert relative(half, extrapolate(weak.half().float(), strong.half().float(), 4.0)) < 1e-3


@pytest.mark.parametrize("name", GUIDANCE)
def test_strength_off_is_no_guidance_exactly_in_one_pass(name: str) -> None:
    plain = guided("none", GuidanceScale())
    for gamma in (0.0, 0.5, 1.0):
        model = Model(0.5)
        assert torch.equal(guided(name, GuidanceScale(1.0, 0.0, gamma), model), plain)
        assert [branch for _, branch in model.asked] == [COND]


def test_dssag_at_gamma_zero_is_no_guidance_exactly() -> None:
    model = Model()
    assert torch.equal(guided("dssag", GuidanceScale(1.0, 3.0, 0.0), model), guided("none", GuidanceScale()))
    assert len(model.asked) == 1


@pytest.mark.parametrize("name", ["cfg", "pag", "sag"])
def test_with_its_scale_off_a_strategy_is_cfg_exactly(name: str) -> None:
    assert torch.equal(guided(name, GuidanceScale(2.5, 0.0)), guided("cfg", GuidanceScale(2.5)))


def test_cfg_is_equation_3() -> None:
    s = 1.5
    uncond, cond = eps(ANSWERS["uncond", False]), eps(ANSWERS["cond", True])
    assert relative(eps(guided("cfg", GuidanceScale(1 + s))), uncond + (1 + s) * (cond - uncond)) < 1e-6


def test_dssag_is_equation_8_and_with_cfg_equation_9() -> None:
    s, gamma = 1.5, 0.4
    cond = eps(ANSWERS["cond", True])
    for power, conditional in ((GuidanceScale(1.0, s, gamma), True), (GuidanceScale(1 + s, 1.0, gamma), False)):
        model = Model()
        weak = eps(ANSWERS["perturbed", conditional])
        assert relative(eps(guided("dssag", power, model)), weak + (1 + s) * (cond - weak)) < 1e-6
        assert [branch for _, branch in model.asked] == [
            COND,
            Branch("dssag" if conditional else "uncond", conditional, Tempered(gamma), "ends"),
        ]


def test_pag_is_equation_6_on_top_of_cfg() -> None:
    s = 1.5
    cond, weak = eps(ANSWERS["cond", True]), eps(ANSWERS["perturbed", True])
    model = Model()
    assert relative(eps(guided("pag", GuidanceScale(1.0, s), model)), weak + (1 + s) * (cond - weak)) < 1e-6
    assert model.asked[-1][1] == Branch("pag", True, identity, "middle")
    both = eps(guided("cfg", GuidanceScale(3.0))) + s * (cond - weak)
    assert relative(eps(guided("pag", GuidanceScale(3.0, s))), both) < 1e-6


def blur(image: Tensor) -> Tensor:
    """A 9x9 Gaussian of deviation 2 with mirrored borders, tap by tap in float64."""
    taps = torch.tensor([math.exp(-(i**2) / 8) for i in range(-4, 5)], dtype=torch.float64)
    taps = taps / taps.sum()
    height, width = image.shape[-2:]

    def mirrored(index: int, size: int) -> int:
        index = abs(index)
        return 2 * (size - 1) - index if index >= size else index

    rows, out = torch.zeros(2, *image.shape, dtype=torch.float64)
    for i in range(-4, 5):
        rows += taps[i + 4] * image.double()[:, :, [mirrored(y + i, height) for y in range(height)]]
    for i in range(-4, 5):
        out += taps[i + 4] * rows[..., [mirrored(x + i, width) for x in range(width)]]
    return out


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_sag_is_equation_5_on_top_of_cfg(cfg: float) -> None:
    s = 0.7
    saliency = torch.zeros(2, 1, 12, 16)
    saliency[:, :, 3:7, 5:14] = 1.0
    saliency[1, :, 9] = 0.25
    model = Model(saliency)
    found = guided("sag", GuidanceScale(cfg, s), model)
    weak = ("cond", True) if cfg == 1 else ("uncond", False)
    estimate = ANSWERS[weak].double()
    # b(x): the estimate is blurred where the mask says, the noise x - estimate stays.
    blurred = X.double() - estimate + (1 - saliency) * estimate + saliency * blur(estimate)
    asked_x, asked = model.asked[-1]
    assert relative(asked_x, blurred) < 1e-6
    assert asked.name == "sag" and asked.conditional == weak[1] and asked.attention is None and not asked.observe
    assert [branch.observe for _, branch in model.asked].count(True) == 1
    weak_eps, degraded_eps = eps(ANSWERS[weak]), (blurred - ANSWERS["perturbed", weak[1]].double()) / SIGMA
    guided_eps = weak_eps + cfg * (eps(ANSWERS["cond", True]) - weak_eps)
    assert relative(eps(found), guided_eps + s * (weak_eps - degraded_eps)) < 1e-6


@pytest.mark.parametrize("saliency", [0.0, 1.0])
def test_sag_finds_nothing_to_add_where_nothing_is_blurred(saliency: float) -> None:
    """No salient token, or a flat estimate: b(x) is x, and so is the answer to it."""
    flat = torch.full(SHAPE, 0.3)
    estimate = draw(1) if saliency == 0 else flat

    def answer(x: Tensor, branch: Branch) -> Tensor:
        return estimate + 0.01 * x

    model = Model(saliency, answer if saliency == 0 else lambda x, branch: flat)
    found = guided("sag", GuidanceScale(1.0, 0.7), model)
    assert relative(found, guided("none", GuidanceScale(), Model(saliency, model._answer))) < 1e-6


@pytest.mark.parametrize("name", GUIDANCE)
def test_passes_are_what_runs(name: str) -> None:
    for cfg, scale, gamma in product((0.0, 1.0, 2.0), (0.0, 0.5), (0.0, 0.5)):
        model, power = Model(0.5), GuidanceScale(cfg, scale, gamma)
        guided(name, power, model)
        assert len(model.asked) == GUIDANCE[name].passes(power)


def test_two_passes_where_pag_and_sag_need_three() -> None:
    with_cfg = {name: GUIDANCE[name].passes(GuidanceScale(2.0, 1.0, 0.5)) for name in GUIDANCE}
    assert with_cfg == {"none": 1, "cfg": 2, "dssag": 2, "pag": 3, "sag": 3}


@pytest.mark.parametrize("name", GUIDANCE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_inputs_dtype_comes_out(name: str, dtype: torch.dtype) -> None:
    assert guided(name, GuidanceScale(2.0, 0.5, 0.5), Model(0.5), X.to(dtype)).dtype == dtype


@pytest.mark.parametrize("name", GUIDANCE)
def test_x_is_left_as_it_was(name: str) -> None:
    x = X.clone()
    guided(name, GuidanceScale(2.0, 0.5, 0.5), Model(0.5), x)
    assert torch.equal(x, X)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    for ask in (guide, resolve_scale):
        with pytest.raises(SettingError, match="'ddsag'") as caught:
            ask("ddsag")
        assert all(name in str(caught.value) for name in GUIDANCE)


def test_strengths_are_filled_in_and_refused() -> None:
    assert resolve_scale("cfg") == GuidanceScale(GUIDANCE["cfg"].default_cfg, 0.0)
    assert resolve_scale("pag", 2.0, 3.0) == GuidanceScale(2.0, 3.0)
    assert resolve_scale("dssag", 3.0).cfg == 3.0 and resolve_scale("dssag", None, 3.0).scale == 3.0
    assert resolve_scale("dssag", 1.0, 2.0) == GuidanceScale(1.0, 2.0)
    for bad in (-1.0, 101.0, math.nan, math.inf):
        with pytest.raises(SettingError, match=str(bad)):
            resolve_scale("cfg", bad)
        with pytest.raises(SettingError, match=str(bad)):
            resolve_scale("pag", None, bad)
    with pytest.raises(SettingError, match="equation 9"):
        resolve_scale("dssag", 2.0, 1.0)


@pytest.mark.parametrize(("name", "cfg", "scale"), [("none", 3.0, None), ("none", None, 1.0), ("cfg", None, 2.0)])
def test_a_strength_without_effect_is_refused(name: str, cfg: float | None, scale: float | None) -> None:
    with pytest.raises(SettingError, match=name):
        resolve_scale(name, cfg, scale)


def test_push_adds_the_perturbed_share_and_nothing_at_zero() -> None:
    guided, strong, weak = (torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(i)) for i in range(3))
    assert add_guidance(guided, strong, weak, 0) is guided
    assert torch.allclose(add_guidance(strong, strong, weak, 1.5), extrapolate(weak, strong, 2.5), atol=1e-5)
    assert add_guidance(guided.half(), strong, weak, 1.0).dtype == torch.float16


def test_nothing_salient_degrades_nothing_and_renoising_is_then_the_input() -> None:
    x, estimate = (torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(2))
    degraded = sag_degrade(estimate, torch.zeros(2, 1, 16, 16))
    assert torch.equal(degraded, estimate)
    assert torch.allclose(sag_renoise(x, estimate, degraded), x, atol=1e-6)
    everywhere = sag_degrade(estimate, torch.ones(2, 1, 16, 16))
    assert float(everywhere.std()) < 0.5 * float(estimate.std())
