"""A MODEL wired with the pack's nodes and others', and sampled the host's three ways."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from torch import Tensor

SEED, STEPS = 5, 2
#: Of one tile: latents and frames.
TILE = (16, 16, 4)


def tiled(
    nodes: dict[str, Any],
    model: Any,
    propagation: str = "sap+tap",
    mode: str = "lagged",
    batch: int = 1,
    latent: Any = None,
) -> Any:
    values = (*TILE, 0.5, propagation, mode, 0, 4, 1, "ends", 0.0, 1.0, batch)
    return nodes["VSRTiledDiffusion"].execute(model, *values, latent=latent).args[0]


def dssag(nodes: dict[str, Any], model: Any, scale: float = 1.0) -> Any:
    return nodes["VSRDSSAG"].execute(model, scale, 0.5, "ends").args[0]


def sampled(
    host: ModuleType, model: Any, wired: Any, cfg: float = 2.0, steps: int = STEPS, sampler: str = "euler"
) -> Tensor:
    positive, negative, latent = wired
    made = host.guider(model, positive, negative, cfg)
    return host.sample(made, latent, SEED, steps, sampler, "karras", 1.0)["samples"]


def ksampled(model: Any, wired: Any, cfg: float = 2.0) -> Tensor:
    """The host's own KSampler node."""
    node = importlib.import_module("nodes").KSampler()
    return node.sample(model, SEED, STEPS, cfg, "euler", "karras", *wired)[0]["samples"]


def custom_sampled(model: Any, guider: Any, latent: Any) -> Tensor:
    """The host's own SamplerCustomAdvanced, with the nodes it is wired to."""
    custom = importlib.import_module("comfy_extras.nodes_custom_sampler")
    noise = custom.RandomNoise().get_noise(SEED)[0]
    sampler = custom.KSamplerSelect().get_sampler("euler")[0]
    sigmas = custom.BasicScheduler().get_sigmas(model, "karras", STEPS, 1.0)[0]
    return custom.SamplerCustomAdvanced().sample(noise, guider, sampler, sigmas, latent)[0]["samples"]


def host_noise(samples: Tensor, seed: int = SEED) -> Tensor:
    """What the host starts from: one generator for the whole video, where the pack has one a frame."""
    return importlib.import_module("comfy.sample").prepare_noise(samples, seed)


def wrapped(model: Any, kind: str, wrapper: Callable[..., Any]) -> Any:
    """A MODEL with another pack's wrapper."""
    m = model.clone()
    m.add_wrapper_with_key(kind, "another pack", wrapper)
    return m


def overridden(model: Any, override: Callable[..., Tensor]) -> Any:
    """A MODEL with another pack's attention."""
    m = model.clone()
    m.model_options["transformer_options"]["optimized_attention_override"] = override
    return m


def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the host evaluates cond and uncond one after the other."""
    management = importlib.import_module("comfy.model_management")
    monkeypatch.setattr(management, "get_free_memory", lambda dev=None, torch_free_too=False: 0)


def block_patches(model: Any) -> Any:
    """The kinds of patches that FreeU and its like set."""
    m = model.clone()
    m.set_model_output_block_patch(lambda h, skip, options: (h * 1.05, skip))
    m.set_model_attn1_patch(lambda q, k, v, options: (q, k * 1.05, v))
    m.set_model_attn1_output_patch(lambda out, options: out * 1.05)
    return m


def host_pag(model: Any) -> Any:
    return importlib.import_module("comfy_extras.nodes_pag").PerturbedAttentionGuidance.execute(model, 100.0).args[0]


def refused(*words: str) -> Any:
    """A ValueError on one line with all of `words`, one of which says what was expected."""
    every = "".join(f"(?=.*{word})" for word in words)
    return pytest.raises(ValueError, match=rf"(?i)^{every}(?=.*(expected|must be|need)).*\Z")
