"""The host's own samplers are the headless ones: SDATC's 50 steps of DDPM on the schedule "normal", and DPM++ 2M."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.tensors import randn, relative

from .conftest import NAME
from .small_sd import ALONE, CPU, wire
from .wiring import wrapped

STEPS, SEED = 50, 5


def module(name: str) -> ModuleType:
    return importlib.import_module(f"{NAME}.vsr_ops.{name}")


def host_sampled(
    host: ModuleType, model: Any, wired: Any, noise: Tensor, draw: Callable[[int], Tensor], scheduler: str = "normal"
) -> tuple[Tensor, list[float]]:
    """The host's sampler with our noise in each step's place, and its noise levels."""
    samplers = importlib.import_module("comfy.samplers")
    positive, negative, latent = wired
    sigmas = samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, STEPS)
    steps = iter(range(1, STEPS))
    sampler = samplers.ksampler("ddpm", {"noise_sampler": lambda sigma, following: draw(next(steps))})
    made = host.guider(model, positive, negative, 1.0)
    return made.sample(noise, latent["samples"], sampler, sigmas, disable_pbar=True, seed=SEED), sigmas.tolist()


def test_every_step_of_the_hosts_is_ours(host: ModuleType, sd: Any) -> None:
    """A small SD of random weights: from each x and estimate of the host's, our step leads to its next x."""
    calls: list[tuple[Tensor, Tensor]] = []

    def note(executor: Any, x: Tensor, *rest: Any, **more: Any) -> Tensor:
        out = executor(x, *rest, **more)
        calls.append((x.clone(), out.clone()))
        return out

    frame_noise, ddpm = module("sampling.noise").frame_noise, module("sampling.samplers").SAMPLERS["ddpm"]()

    def draw(stream: int) -> Tensor:
        return frame_noise(range(ALONE[0]), ALONE[1:], SEED, stream)

    wired = (*wire(ALONE)[:2], {"samples": torch.zeros(ALONE)})
    found, sigmas = host_sampled(host, wrapped(sd, "predict_noise", note), wired, draw(0), draw)
    assert len(calls) == STEPS and len(sigmas) == STEPS + 1
    scale = sd.model.latent_format.scale_factor
    following_x = [*(x for x, _ in calls[1:]), found * scale]
    for i, ((x, x0), (sigma, following), expected) in enumerate(
        zip(calls, pairwise(sigmas), following_x, strict=True), 1
    ):
        assert relative(ddpm(x, x0, sigma, following, lambda i=i: draw(i)), expected) < 1e-5


def test_the_whole_run_is_the_headless_one(host: ModuleType, nodes: dict[str, Any]) -> None:
    """The bundled Stable Diffusion, 50 steps, the same noises: the same latents; and on "simple" others."""
    sd, pipeline, tiling = (module(name) for name in ("backbones.sd", "pipeline.sampler", "sampling.tiling"))
    carried, noises = module("sampling.propagation"), module("sampling.noise")
    headless = sd.load_sd("lite", CPU, torch.float32)
    shape = (3, 4, 16, 24)
    plan = tiling.plan_tiles(3, 16, 24, tiling.TileSize(16, 24, 3))
    settings = pipeline.Settings(
        steps=STEPS, guidance="none", propagation=carried.Propagation(()), sampler="ddpm", seed=SEED
    )
    noise = randn(*shape, seed=1)
    expected = pipeline.sample(headless, torch.zeros(shape), plan, settings, noise=noise, first_frame=7)

    def draw(stream: int) -> Tensor:
        return noises.frame_noise(range(7, 10), shape[1:], SEED, stream)

    model = nodes["VSRLoadLite"].execute("sd_lite").args[0]
    null = host.null_prompt(model)
    wired = (null, null, {"samples": torch.zeros(shape)})
    found, sigmas = host_sampled(host, model, wired, noise, draw)
    assert sigmas == pytest.approx(headless.sigmas(STEPS), rel=1e-4)
    difference = relative(found * headless.scaling_factor, expected)
    print(f"host against headless, {STEPS} steps of ddpm: {difference:.1e}")
    assert difference < 1e-3
    other, simple = host_sampled(host, model, wired, noise, draw, "simple")
    # It leaves the last noise levels out, down to timestep 19.
    assert simple[-2] > 4 * sigmas[-2]
    assert relative(other, found) > 1e-3


def test_every_step_of_the_hosts_dpmpp_2m_is_ours(host: ModuleType, sd: Any) -> None:
    """And so is the whole run, started from a latent at a noise level, on the host's KarrasScheduler."""
    calls: list[tuple[Tensor, Tensor]] = []

    def note(executor: Any, x: Tensor, *rest: Any, **more: Any) -> Tensor:
        out = executor(x, *rest, **more)
        calls.append((x.clone(), out.clone()))
        return out

    samplers = importlib.import_module("comfy.samplers")
    sigmas = importlib.import_module("comfy.k_diffusion.sampling").get_sigmas_karras(8, 0.03, 5.0)
    made = host.guider(wrapped(sd, "predict_noise", note), *wire(ALONE)[:2], 1.0)
    start, noise = {"samples": randn(*ALONE, seed=2)}, randn(*ALONE, seed=3)
    sampler = samplers.sampler_object("dpmpp_2m")
    found = made.sample(noise, start["samples"], sampler, sigmas, disable_pbar=True, seed=SEED)
    scale, step = sd.model.latent_format.scale_factor, module("sampling.samplers").SAMPLERS["dpmpp_2m"]()
    assert relative(calls[0][0], start["samples"] * scale + 5.0 * noise) < 1e-5
    levels = sigmas.tolist()
    assert len(calls) == 8 and levels[-1] == 0
    following_x = [*(x for x, _ in calls[1:]), found * scale]
    for (x, x0), (sigma, following), expected in zip(calls, pairwise(levels), following_x, strict=True):
        assert relative(step(x, x0, sigma, following, lambda: noise), expected) < 1e-5
