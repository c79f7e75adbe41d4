"""The samplers' steps against diffusers' own schedulers, and the laws of the chain that they walk."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor

from tests.support.tensors import generator, randn, relative
from vsr_ops.backbones.sd import model_sigmas, sigma_at, timestep_of
from vsr_ops.errors import SettingError
from vsr_ops.sampling.align import SCALES
from vsr_ops.sampling.samplers import SAMPLERS, check_sampler, ddpm, dpmpp_2m, euler, step_variance

BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPE = (3, 4, 5, 6)
STEPS = [10, 50]


def spaced(steps: int) -> DDPMScheduler:
    """The chain of SDATC's betas, respaced as DiffBIR and StableSR do: timesteps round(999 i / (n - 1))."""
    scheduler = DDPMScheduler(
        **BETAS, timestep_spacing="linspace", variance_type="fixed_small", prediction_type="epsilon", clip_sample=False
    )
    scheduler.set_timesteps(steps)
    return scheduler


def sigmas_of(scheduler: DDPMScheduler) -> list[float]:
    kept = scheduler.alphas_cumprod[scheduler.timesteps.long()].double()
    return [*((1 - kept) / kept).sqrt().tolist(), 0.0]


def linear_epsilon(z: Tensor, level: Tensor | float) -> Tensor:
    """A fixed linear model, of Stable Diffusion's own z and timestep."""
    return 0.6 * z - 0.25 * z.roll(1, -1) + 0.1 * z.flip(1) + 0.001 * level


def never() -> Tensor:
    raise AssertionError("no noise is asked for")


@pytest.mark.parametrize("steps", STEPS)
def test_ddpm_is_diffusers_on_the_respaced_chain(steps: int) -> None:
    """The same linear model and the same noises, over the whole chain."""
    scheduler, start = spaced(steps), randn(*SHAPE, seed=1)
    z, theirs, ours = start.clone(), generator(2), generator(2)
    schedule = sigmas_of(scheduler)
    x = start * (1 + schedule[0] ** 2) ** 0.5
    for t, (sigma, following) in zip(scheduler.timesteps, pairwise(schedule), strict=True):
        z = scheduler.step(linear_epsilon(z, float(t)), int(t), z, generator=theirs).prev_sample
        x0 = x - sigma * linear_epsilon(x / (1 + sigma**2) ** 0.5, float(t))
        x = ddpm(x, x0, sigma, following, lambda: torch.randn(SHAPE, generator=ours))
        assert relative(x / (1 + following**2) ** 0.5, z) < 1e-5
    # The chain's own noise matters: another is another result.
    assert relative(euler(x, x0, 1.0, 0.0, never), start) > 1e-2


@pytest.mark.parametrize("steps", [*STEPS, 100])
def test_stable_diffusions_own_schedule_is_that_chain(steps: int) -> None:
    """The UNet is told the very timesteps; the noise levels, spaced before rounding, are within a hundredth."""
    told = [timestep_of(sigma_at(999 - 999 * i / (steps - 1))) for i in range(steps)]
    assert told == spaced(steps).timesteps.tolist() == [round(999 * i / (steps - 1)) for i in reversed(range(steps))]
    for i, timestep in enumerate(told):
        assert sigma_at(999 - 999 * i / (steps - 1)) == pytest.approx(float(model_sigmas()[timestep]), rel=0.01)


@pytest.mark.parametrize("steps", STEPS)
def test_its_variance_and_alignments_scale_are_diffusers_variance(steps: int) -> None:
    """SDATC, equation 13: aligning the estimate by the scale "ddpm" moves the z that a DDPM step leads to by its
    variance; x0's own share of the step is as the scheduler has it."""
    scheduler = spaced(steps)
    for t, (sigma, following) in zip(scheduler.timesteps[:-1], pairwise(sigmas_of(scheduler)[:-1]), strict=True):
        variance = float(scheduler._get_variance(int(t)))
        assert step_variance(sigma, following) / (1 + following**2) == pytest.approx(variance, rel=1e-3)
        gradient, x, still = (randn(*SHAPE, seed=seed).double() for seed in (3, 4, 5))
        x0, v = randn(*SHAPE, seed=6).double(), SCALES["ddpm"](sigma, following)
        draw = partial(still.clone)
        before, after = (ddpm(x, value, sigma, following, draw) for value in (x0, x0 - 0.3 * v * gradient))
        moved = (after - before) / (1 + following**2) ** 0.5
        assert relative(moved, -0.3 * variance * gradient) < 1e-3
    assert SCALES["ddpm"](sigma, 0.0) == 0


def test_bounded_stays_between_nothing_and_one_on_every_schedule() -> None:
    levels = [0.0, 0.002, 0.03, 1.0, 14.6, 700.0]
    found = [SCALES["bounded"](sigma, sigma / 2) for sigma in levels]
    assert found == sorted(found) and found[0] == 0 and found[3] == 0.5 and found[-1] <= 1


@pytest.mark.parametrize("steps", STEPS)
def test_euler_is_diffusers(steps: int) -> None:
    scheduler = EulerDiscreteScheduler(**BETAS, timestep_spacing="linspace", prediction_type="epsilon")
    scheduler.set_timesteps(steps)
    x = randn(*SHAPE, seed=1) * float(scheduler.sigmas[0])
    theirs = x.clone()
    for t, (sigma, following) in zip(scheduler.timesteps, pairwise(scheduler.sigmas.tolist()), strict=True):
        scaled = theirs / (1 + sigma**2) ** 0.5
        assert relative(scheduler.scale_model_input(theirs, t), scaled) < 1e-6
        theirs = scheduler.step(linear_epsilon(scaled, 0.0), t, theirs).prev_sample
        x = euler(x, x - sigma * linear_epsilon(x / (1 + sigma**2) ** 0.5, 0.0), sigma, following, never)
        assert relative(x, theirs) < 1e-5


def run(
    sampler: str, x: Tensor, schedule: list[float], estimate: Callable[[Tensor, float], Tensor], seed: int
) -> Tensor:
    rng, step = generator(seed), SAMPLERS[sampler]()
    for sigma, following in pairwise(schedule):
        draw = partial(torch.randn, x.shape, generator=rng, dtype=x.dtype)
        x = step(x, estimate(x, sigma), sigma, following, draw)
    return x


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_point_mass_is_where_the_chain_ends(sampler: str) -> None:
    point = randn(*SHAPE, seed=7)
    found = run(sampler, point + 14.6 * randn(*SHAPE, seed=8), sigmas_of(spaced(50)), lambda x, sigma: point, 1)
    assert torch.equal(found, point)


def test_ddpm_keeps_every_levels_noise_around_a_point() -> None:
    """Of a point mass at 0 the chain is at each level what diffusion makes of it: deviation sigma."""
    schedule, rng = sigmas_of(spaced(20))[:-1], generator(9)
    x = schedule[0] * torch.randn(200_000, generator=rng)
    for sigma, following in pairwise(schedule):
        x = ddpm(x, torch.zeros_like(x), sigma, following, partial(torch.randn, x.shape, generator=rng))
        assert float(x.std()) == pytest.approx(following, rel=0.01)


@pytest.mark.parametrize(("steps", "sampler"), [(50, "ddpm"), (200, "ddpm"), (50, "euler")])
def test_normal_data_stay_normal(steps: int, sampler: str) -> None:
    """The exact estimate of N(0, 1) is x / (1 + sigma^2). The DDPM step's "fixed small" variance is that of a point
    mass, a little low for data that are spread: the result's falls short by a share that goes with the steps."""
    schedule = sigmas_of(spaced(steps))
    x = (1 + schedule[0] ** 2) ** 0.5 * randn(200_000, seed=10).double()
    found = run(sampler, x, schedule, lambda x, sigma: x / (1 + sigma**2), 11)
    variance = chain_variance(schedule, sampler)
    print(f"{sampler}, {steps} steps: variance {float(found.var()):.4f}, by the recurrence {variance:.4f}")
    assert abs(float(found.mean())) < 4 / math.sqrt(len(found))
    assert float(found.var()) == pytest.approx(variance, rel=0.015)
    assert float((found**4).mean()) == pytest.approx(3 * variance**2, rel=0.04)
    assert (1 - {50: 0.2, 200: 0.06}[steps]) < variance < 1.001


def chain_variance(schedule: list[float], sampler: str) -> float:
    """The variance that the linear recurrence has, exactly."""
    variance = 1 + schedule[0] ** 2
    for sigma, following in pairwise(schedule):
        ratio = following / sigma if sampler == "euler" else following**2 / sigma**2
        share = 1 / (1 + sigma**2)
        variance *= (share + (1 - share) * ratio) ** 2
        variance += step_variance(sigma, following) if sampler == "ddpm" else 0.0
    return variance


def test_euler_and_the_last_step_draw_nothing() -> None:
    x, x0 = randn(*SHAPE, seed=12), randn(*SHAPE, seed=13)
    assert torch.equal(euler(x, x0, 2.0, 1.0, never), x0 + (x - x0) * 0.5)
    for made in SAMPLERS.values():
        step = made()
        assert torch.equal(step(x, x0, 2.0, 0.0, never), x0)


def formula(before: tuple[Tensor, float] | None, x: Tensor, x0: Tensor, sigma: float, following: float) -> Tensor:
    """Lu et al.'s algorithm 2 as k-diffusion writes it, in t = -ln sigma."""
    if following == 0:
        return x0
    h = math.log(sigma) - math.log(following)
    towards = x0
    if before is not None:
        r = (math.log(before[1]) - math.log(sigma)) / h
        towards = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * before[0]
    return (following / sigma) * x - math.expm1(-h) * towards


def test_dpmpp_2m_is_its_formula_and_remembers_one_run_alone() -> None:
    schedule = [700.0, 250.0, 30.0, 2.0, 0.9, 0.03, 0.002, 0.0]
    runs = [dpmpp_2m(), dpmpp_2m()]
    for seed, step in enumerate(runs):
        x, before = schedule[0] * randn(*SHAPE, seed=seed).double(), None
        for sigma, following in pairwise(schedule):
            x0 = 0.3 * x / (1 + sigma) + randn(*SHAPE, seed=7).double()
            found = step(x, x0, sigma, following, never)
            assert relative(found, formula(before, x, x0, sigma, following)) < 1e-12
            x, before = found, (x0, sigma)


@pytest.mark.parametrize("steps", [5, 20])
def test_dpmpp_2m_is_diffusers(steps: int) -> None:
    """DPMSolverMultistepScheduler's second order on Stable Diffusion's chain; its last step to 0 is of first order."""
    scheduler = DPMSolverMultistepScheduler(
        **BETAS, timestep_spacing="linspace", final_sigmas_type="zero", euler_at_final=True
    )
    scheduler.set_timesteps(steps)
    schedule = [float(sigma) for sigma in scheduler.sigmas]
    z, step = randn(*SHAPE, seed=1), dpmpp_2m()
    x = z * (1 + schedule[0] ** 2) ** 0.5
    for t, (sigma, following) in zip(scheduler.timesteps, pairwise(schedule), strict=True):
        x0 = x - sigma * linear_epsilon(x / (1 + sigma**2) ** 0.5, 0.0)
        z = scheduler.step(linear_epsilon(z, 0.0), t, z).prev_sample
        x = step(x, x0, sigma, following, never)
        assert relative(x / (1 + following**2) ** 0.5, z) < 1e-5


def test_orders_on_a_flow_that_is_known() -> None:
    """The flow of N(0, 1)'s diffusion goes from x at sigma a to x sqrt((1 + b^2) / (1 + a^2)) at b: halving the steps
    of ln sigma quarters DPM++ 2M's error and halves Euler's."""
    above, below, x = 20.0, 0.05, randn(*SHAPE, seed=3).double()
    exact = x * math.sqrt((1 + below**2) / (1 + above**2))

    def error(sampler: str, steps: int) -> float:
        schedule = [above * (below / above) ** (i / steps) for i in range(steps + 1)]
        return relative(run(sampler, x, schedule, lambda x, sigma: x / (1 + sigma**2), 1), exact)

    for sampler, order in (("euler", 1), ("dpmpp_2m", 2)):
        errors = [error(sampler, steps) for steps in (40, 80, 160)]
        found = [math.log2(a / b) for a, b in pairwise(errors)]
        print(f"{sampler}: errors {', '.join(f'{each:.1e}' for each in errors)}, orders {found}")
        assert all(each == pytest.approx(order, abs=0.15) for each in found)
    assert error("dpmpp_2m", 20) < error("euler", 160)


def test_another_sampler_is_refused() -> None:
    with pytest.raises(SettingError, match=r"sampler is 'heun': expected one of euler, ddpm"):
        check_sampler("heun")
