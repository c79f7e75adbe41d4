"""Noise by Frame in the host's sampler: the headless noise, and the same for a frame wherever its video is cut."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.tensors import relative

from .conftest import NAME, SIZE
from .test_latents import core, encoded, scenes
from .test_parity import headless, pipeline
from .wiring import SEED, STEPS, refused, tiled

__all__ = ["headless", "pipeline"]


def noise_of(nodes: dict[str, Any], latent: Any, first_frame: int = 0, seed: int = SEED) -> Tensor:
    return nodes["VSRNoiseByFrame"].execute(seed, first_frame).args[0].generate_noise(latent)


@pytest.fixture(scope="module")
def latent(nodes: dict[str, Any], lite: Any) -> Any:
    return encoded(nodes, lite, scenes((4, 6), 32, 40))


def test_the_host_samples_as_the_headless_job(
    host: ModuleType, nodes: dict[str, Any], lite: Any, wired: Any, headless: Any, pipeline: ModuleType
) -> None:
    positive, _, latent = wired
    custom = importlib.import_module("comfy_extras.nodes_custom_sampler")
    model = tiled(nodes, lite[0])
    noise, guider = nodes["VSRNoiseByFrame"].execute(SEED, 48).args[0], host.guider(model, positive, None, 1.0)
    sampler = custom.KSamplerSelect().get_sampler("euler")[0]
    sigmas = custom.BasicScheduler().get_sigmas(model, "karras", STEPS, 1.0)[0]
    found = custom.SamplerCustomAdvanced().sample(noise, guider, sampler, sigmas, latent)[0]["samples"]
    tiling, propagation = (
        importlib.import_module(f"{NAME}.vsr_ops.sampling.{name}") for name in ("tiling", "propagation")
    )
    plan = tiling.plan_tiles(*SIZE, tiling.TileSize(16, 16, 4), 0.5)
    own = propagation.Propagation.named("sap+tap", sap_lagged=True)
    settings = pipeline.Settings(steps=STEPS, guidance="none", propagation=own, seed=SEED)
    lr = positive[0][1]["concat_latent_image"]
    expected = pipeline.sample(headless, lr, plan, settings, first_frame=48) / headless.scaling_factor
    assert relative(found, expected) < 1e-3


def test_frames_keep_their_noise_when_core_takes_some(nodes: dict[str, Any], latent: Any) -> None:
    whole = noise_of(nodes, latent)
    part = core("LatentFromBatch", latent, 3, 4)
    assert torch.equal(noise_of(nodes, part), whole[3:7])
    assert torch.equal(noise_of(nodes, encoded_part := {"samples": part["samples"]}, first_frame=3), whole[3:7])
    assert not torch.equal(noise_of(nodes, encoded_part), whole[3:7])


def test_a_frame_that_is_repeated_gets_noise_of_its_own(nodes: dict[str, Any], latent: Any) -> None:
    twice = noise_of(nodes, core("RepeatLatentBatch", latent, 2))
    assert torch.equal(twice[:10], noise_of(nodes, latent))
    assert torch.equal(twice[10:], noise_of(nodes, latent, seed=SEED + 1))


def test_what_is_no_batch_of_frames_is_refused(nodes: dict[str, Any]) -> None:
    with refused(r"of shape \(1, 16, 3, 8, 8\)", "Random Noise"):
        noise_of(nodes, {"samples": torch.zeros(1, 16, 3, 8, 8)})
