"""What the one-node graph leaves to the MODEL, and CLIP's view of every scene."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.tensors import relative

from .conftest import NAME
from .test_dcvsr import lite_unet, load, place
from .test_latents import scenes
from .wiring import refused

__all__ = ["lite_unet", "place"]

SMALL = (12, 16)


def small(frames: int = 2) -> Tensor:
    return scenes((frames,), *SMALL)


def upscaled_video(nodes: dict[str, Any], lite: Any, image: Tensor, *sockets: Any, **given: Any) -> Tensor:
    """The one node's picture, on one step."""
    values = {
        **importlib.import_module(f"{NAME}.nodes.common").node_defaults(nodes["VSRTiledSVDSampler"]),
        **{"steps": 1, "propagation": "none", **given},
    }
    return nodes["VSRTiledSVDSampler"].execute(*lite, image, **values).args[1]


def test_lite_is_sampled_as_it_was_trained(nodes: dict[str, Any], lite: Any) -> None:
    """auto and 0 are what the command line takes: one step from the LR latent at noise level 3, without guidance, the
    DCM, detail's colours."""
    dcm = nodes["VSRLoadDCM"].execute("lite").args[0]
    own = upscaled_video(nodes, lite, small(), steps=0)
    said = {"guidance": "none", "color": "detail", "upscale_model": dcm}
    assert torch.equal(own, upscaled_video(nodes, lite, small(), steps=0, **said))
    for change in ({"steps": 5}, {"guidance": "dssag"}, {"color": "none"}, {"upscaler": "bicubic"}, {"cfg": 2.0}):
        assert relative(upscaled_video(nodes, lite, small(), **{"steps": 0, **change}), own) > 1e-4


def test_its_own_steps_are_those_of_the_host_from_that_noise_level(
    host: ModuleType, nodes: dict[str, Any], lite: Any
) -> None:
    """As a graph of the host's own KarrasScheduler and SamplerCustomAdvanced has it, and the headless pipeline."""
    custom = importlib.import_module("comfy_extras.nodes_custom_sampler")
    video = small().repeat_interleave(8, 1).repeat_interleave(8, 2)
    positive, negative, latent = (
        nodes["VSRSVDConditioning"].execute(*lite, video, 127, 8, 0.0, "LR latent", "one scene").args
    )
    guider = host.guider(lite[0], positive, negative, 1.0)
    for steps, scheduler in ((1, "exponential"), (3, "karras")):
        sigmas = custom.KarrasScheduler().get_sigmas(steps, 3.0, 0.002, 7.0)[0]
        noise, sampler = custom.RandomNoise().get_noise(5)[0], custom.KSamplerSelect().get_sampler("euler")[0]
        theirs = custom.SamplerCustomAdvanced().sample(noise, guider, sampler, sigmas, latent)[0]["samples"]
        found = host.sample(guider, latent, 5, steps, "euler", scheduler, 1.0, 3.0)["samples"]
        assert relative(found, theirs) < 1e-5


def test_a_video_of_the_results_size_is_not_enlarged(nodes: dict[str, Any], lite: Any) -> None:
    plain = upscaled_video(nodes, lite, small(), scale=1.0, upscaler="bicubic")
    assert torch.equal(upscaled_video(nodes, lite, small(), scale=1.0), plain)
    assert relative(upscaled_video(nodes, lite, small(), scale=1.0, upscaler="dcm"), plain) > 1e-3


def test_dc_vsr_is_sampled_as_the_paper_does(
    host: ModuleType,
    nodes: dict[str, Any],
    place: Any,
    lite_unet: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    lite_unet.save_pretrained(place("vsr/dcvsr_test"))
    model, vae, vision = load(nodes, "dcvsr_test")
    own = host.defaults_of(model)
    assert (own.steps, own.guidance, own.color, own.upscaler) == (25, "dssag", "none", "bicubic")
    # The bundled SVD has no image encoder, and is not asked for what it has not.
    found = upscaled_video(nodes, (model, vae), small(), clip_vision=vision)
    said = {"guidance": "dssag", "color": "none", "upscaler": "bicubic"}
    assert torch.equal(found, upscaled_video(nodes, (model, vae), small(), **said))
    assert "enlarged by" not in caplog.text
    upscaled_video(nodes, (model, vae), small(), upscaler="dcm")
    assert "enlarged by dcm, but the model was trained on pictures enlarged by bicubic" in caplog.text


# --- CLIP -----------------------------------------------------------------------------------------------------------


class Vision:
    """An image encoder that sees a picture's mean colour, as wide as lite's cross-attention."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def encode_image(self, image: Tensor, crop: bool = True) -> Any:
        assert not crop
        self.seen.append(image)
        return output(image.mean((1, 2)).repeat(1, 11)[:, :32])


def output(embeds: Tensor) -> Any:
    made = importlib.import_module("comfy.clip_vision").Output()
    made.image_embeds = embeds
    return made


def conditioned(nodes: dict[str, Any], lite: Any, image: Tensor, seen: Any = None, vision: Any = None) -> Any:
    values = (*lite, image, 127, 8, 0.0, "noise", "detect", seen, vision)
    return nodes["VSRSVDConditioning"].execute(*values).args


def test_every_scene_is_seen_by_itself(host: ModuleType, nodes: dict[str, Any], lite: Any) -> None:
    """Sampled, a scene is what it is alone; and the embeddings do reach the UNet."""
    image, vision = scenes((3, 5), 64, 64), Vision()
    model = nodes["VSRTiledDiffusion"].execute(lite[0], 8, 8, 3, 0.5, "none", "lagged", 0, 4, 1, "ends", 0.0, 1.0, 1)
    together = conditioned(nodes, lite, image, vision=vision)
    assert torch.equal(vision.seen[0], image[[0, 3]])
    context = together[0][0][0]
    assert context.shape == (8, 1, 32) and len(context.unique(dim=0)) == 2

    def sampled(wired: Any, frames: slice) -> Tensor:
        positive, negative, latent = wired
        noise = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(1))[frames]
        made = host.guider(model.args[0], positive, negative, 2.0)
        sampling = importlib.import_module("comfy.samplers")
        sigmas = sampling.calculate_sigmas(lite[0].get_model_object("model_sampling"), "karras", 2)
        return made.sample(noise, latent["samples"], sampling.sampler_object("euler"), sigmas, seed=0)

    whole = sampled(together, slice(0, 8))
    for frames in (slice(0, 3), slice(3, 8)):
        alone = sampled(conditioned(nodes, lite, image[frames], vision=Vision()), frames)
        assert relative(whole[frames], alone) < 1e-4
    assert relative(sampled(conditioned(nodes, lite, image), slice(0, 8)), whole) > 1e-3


def test_one_embedding_one_a_scene_or_one_a_frame(nodes: dict[str, Any], lite: Any) -> None:
    image = scenes((3, 5), 32, 32)
    each = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    for embeds, expected in (
        (each[:1], each[[0]]),
        (each[:2], each[[0] * 3 + [1] * 5]),
        (each, each[[0] * 3 + [3] * 5]),
    ):
        assert torch.equal(conditioned(nodes, lite, image, output(embeds))[0][0][0][:, 0], expected)
    with refused("of 3 pictures", "each of 2 scene", "each of 8 frames"):
        conditioned(nodes, lite, image, output(each[:3]))
    with refused("both wired", "unwire"):
        conditioned(nodes, lite, image, output(each[:1]), Vision())
