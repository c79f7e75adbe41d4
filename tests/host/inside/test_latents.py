"""LATENTs that core's nodes cut, repeat, join, resize and crop between the pack's: right results, or why not."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from .test_decode_host import picture_vae
from .wiring import refused

#: Where a LATENT says what is known of its video.
KNOWN = "vsr_video"
#: A video of two scenes, of a size that is padded: frames, where the second begins, height and width in pixels.
FRAMES, CUT, HEIGHT, WIDTH = 10, 4, 76, 92


def core(name: str, *values: Any) -> Any:
    """What a node of core makes, of either kind."""
    # The first two import each other: in this order they can.
    extras = ("comfy_extras.nodes_post_processing", "comfy_extras.nodes_latent", "comfy_extras.nodes_rebatch")
    for module in ("nodes", *extras):
        node = getattr(importlib.import_module(module), name, None)
        if node is not None and hasattr(node, "define_schema"):
            return node.execute(*values)[0]
        if node is not None:
            return getattr(node(), node.FUNCTION)(*values)[0]
    raise LookupError(name)


def scenes(sizes: tuple[int, ...], height: int, width: int) -> Tensor:
    """An IMAGE of scenes that move, each of as many frames."""
    parts: list[Tensor] = []
    for seed, count in enumerate(sizes):
        rng = torch.Generator().manual_seed(seed)
        small = torch.rand(1, 3, height // 4 + count, width // 4 + 1, generator=rng) * 0.5 + 0.5 * (seed % 2)
        large = torch.nn.functional.interpolate(small, scale_factor=4, mode="bilinear")[0].clamp(0, 1)
        parts.append(torch.stack([large[:, i : i + height, :width] for i in range(count)]).movedim(1, -1))
    return torch.cat(parts)


def encoded(nodes: dict[str, Any], lite: Any, image: Tensor) -> Any:
    return nodes["VSREncode"].execute(lite[1], image, "LR latent", "detect").args[0]


@pytest.fixture(scope="module")
def latent(nodes: dict[str, Any], lite: Any) -> Any:
    """The LATENT of two scenes."""
    return encoded(nodes, lite, scenes((CUT, FRAMES - CUT), HEIGHT, WIDTH))


@pytest.fixture(scope="module")
def decode(nodes: dict[str, Any], lite: Any) -> Any:
    return lambda latent, **more: nodes["VSRDecode"].execute(lite[1], latent, 4, **more).args[0]


def each_by_itself(decode: Any, latent: Any, *parts: list[int]) -> Tensor:
    """Runs of frames decoded one by one, as scenes are, and cropped to the video's size."""
    alone = [{"samples": latent["samples"][frames]} for frames in parts]
    return torch.cat([decode(part)[:, :HEIGHT, :WIDTH] for part in alone])


def frames(first: int, end: int) -> list[int]:
    return list(range(first, end))


def test_the_law_bites(decode: Any, latent: Any) -> None:
    """The decoder sees across frames: a cut that is not kept shows."""
    whole, apart = decode(latent), each_by_itself(decode, latent, frames(0, CUT), frames(CUT, FRAMES))
    assert whole.shape == (FRAMES, HEIGHT, WIDTH, 3) and torch.equal(whole, apart)
    as_one = {**latent, KNOWN: dataclasses.replace(latent[KNOWN], cuts=())}
    assert (decode(as_one) - apart).abs().max() > 5 / 255


CHANGED: dict[str, tuple[Any, tuple[list[int], ...]]] = {
    "taken before the cut": (lambda z: core("LatentFromBatch", z, 0, 3), (frames(0, 3),)),
    "taken across the cut": (lambda z: core("LatentFromBatch", z, 2, 6), (frames(2, CUT), frames(CUT, 8))),
    "taken after the cut": (lambda z: core("LatentFromBatch", z, 6, 3), (frames(6, 9),)),
    "taken twice": (
        lambda z: core("LatentFromBatch", core("LatentFromBatch", z, 1, 8), 1, 5),
        (frames(2, CUT), frames(CUT, 7)),
    ),
    "repeated": (
        lambda z: core("RepeatLatentBatch", z, 2),
        (frames(0, CUT), frames(CUT, FRAMES), frames(0, CUT), frames(CUT, FRAMES)),
    ),
    "all taken and repeated": (
        lambda z: core("RepeatLatentBatch", core("LatentFromBatch", z, 0, FRAMES), 2),
        (frames(0, CUT), frames(CUT, FRAMES), frames(0, CUT), frames(CUT, FRAMES)),
    ),
    "parts joined in another order": (
        lambda z: core("LatentBatch", core("LatentFromBatch", z, 6, 3), core("LatentFromBatch", z, 1, 3)),
        (frames(6, 9), frames(1, CUT)),
    ),
    "neighbours joined": (
        lambda z: core("LatentBatch", core("LatentFromBatch", z, 1, 2), core("LatentFromBatch", z, 3, 4)),
        (frames(1, CUT), frames(CUT, 7)),
    ),
    "rescaled in value": (lambda z: core("LatentMultiply", z, 1.0), (frames(0, CUT), frames(CUT, FRAMES))),
}


@pytest.mark.parametrize("name", CHANGED)
def test_frames_that_were_taken_decode_as_their_scenes(decode: Any, latent: Any, name: str) -> None:
    change, parts = CHANGED[name]
    assert torch.equal(decode(change(latent)), each_by_itself(decode, latent, *parts))


def test_a_rebatched_latent_has_its_cut_found_again(decode: Any, latent: Any) -> None:
    """Rebatch Latents drops what it does not know: cuts are seen in the latents, and the padding stays."""
    (whole,) = core("LatentRebatch", [latent], [FRAMES])
    assert KNOWN not in whole
    expected = [{"samples": latent["samples"][part]} for part in (frames(0, CUT), frames(CUT, FRAMES))]
    assert torch.equal(decode(whole), torch.cat([decode(part) for part in expected]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda z: core("LatentBatch", z, z), ("joins videos", "decode first")),
        (
            lambda z: core("LatentBatch", z, {"samples": z["samples"][:5]}),
            ("joins videos", "only the first one's", "decode first"),
        ),
        (lambda z: {**z, "samples": z["samples"][:7]}, ("holds 7 frames, but 10", "Latent From Batch", "decode first")),
        (
            lambda z: core("RepeatLatentBatch", core("LatentFromBatch", z, 2, 3), 4),
            ("12 frames numbered 2, 3, 4, 5, 6, 7, ... 13", "0 to 9", "decode first"),
        ),
    ],
    ids=["one video twice", "another video behind it", "cut by a node that does not say so", "repeated many times"],
)
def test_frames_that_cannot_be_told_are_refused(decode: Any, latent: Any, change: Any, words: tuple[str, ...]) -> None:
    with refused(*words):
        decode(change(latent))


def test_a_picture_vae_has_no_scenes(nodes: dict[str, Any], latent: Any) -> None:
    """Where frames do not see each other it does not matter which they are: nothing is refused."""
    vae = picture_vae()
    twice = core("LatentBatch", latent, latent)
    once = nodes["VSRDecode"].execute(vae, latent, 4).args[0]
    assert torch.allclose(nodes["VSRDecode"].execute(vae, twice, 4).args[0], torch.cat([once, once]), atol=1e-5)


RESIZED: dict[str, Any] = {
    "upscaled": lambda z: core("LatentUpscale", z, "bilinear", 144, 120, "disabled"),
    "upscaled by": lambda z: core("LatentUpscaleBy", z, "nearest-exact", 1.5),
    "cropped": lambda z: core("LatentCrop", z, 64, 64, 16, 8),
}


@pytest.mark.parametrize("name", RESIZED)
def test_another_size_is_refused_only_where_padding_is(
    nodes: dict[str, Any], lite: Any, decode: Any, latent: Any, name: str
) -> None:
    changed = RESIZED[name](latent)
    with refused("was made of pictures of 92x76", "padding", "decode first"):
        decode(changed)
    pixels = tuple(8 * side for side in changed["samples"].shape[-2:])
    known = decode(changed, reference=torch.zeros(FRAMES, *pixels, 3))
    assert known.shape == (FRAMES, *pixels, 3)
    whole = encoded(nodes, lite, scenes((CUT, FRAMES - CUT), 80, 96))
    assert torch.equal(decode(RESIZED[name](whole)), each_of(decode, RESIZED[name](whole)))


def each_of(decode: Any, latent: Any) -> Tensor:
    """The two scenes of a LATENT of whole cells, decoded one by one."""
    samples = latent["samples"]
    return torch.cat([decode({"samples": part}) for part in (samples[:CUT], samples[CUT:])])


def test_match_latent_and_preview_keep_to_the_frames_that_are_there(
    nodes: dict[str, Any], lite: Any, latent: Any
) -> None:
    part = core("LatentFromBatch", latent, 1, 8)
    shifted = {**part, "samples": part["samples"] * 1.5}
    found = nodes["VSRMatchLatent"].execute(shifted, part, 1.0, 2.0).args[0]["samples"]
    apart = [
        nodes["VSRMatchLatent"].execute({"samples": 1.5 * z}, {"samples": z}, 1.0, 2.0).args[0]["samples"]
        for z in (part["samples"][:3], part["samples"][3:])
    ]
    assert torch.allclose(found, torch.cat(apart), atol=1e-6)
    model = (
        nodes["VSRTiledDiffusion"]
        .execute(lite[0], *(16, 16, 4, 0.5, "none", "lagged", 0, 4, 1, "ends", 0.0, 1.0, 1))
        .args[0]
    )
    assert "2 scene(s)" in nodes["VSRTilePreview"].execute(model, 4, 1, latent=part).args[1]


def test_sampling_another_count_than_the_prompt_knows_is_refused(
    host: Any, nodes: dict[str, Any], lite: Any, latent: Any
) -> None:
    sd = nodes["VSRLoadLite"].execute("sd_lite").args[0]
    prompt = nodes["VSRNullPrompt"].execute(sd, scenes((CUT, FRAMES - CUT), HEIGHT, WIDTH)).args[0]
    model = nodes["VSRDSSAG"].execute(sd, 1.0, 0.5, "ends").args[0]
    part = core("LatentFromBatch", latent, 0, 6)
    with refused("scene cuts of 10 frames, the LATENT has 6", "same video", "cut the pictures"):
        host.sample(host.guider(model, prompt, None, 1.0), part, 0, 1, "euler", "karras", 1.0)


def test_a_latent_for_another_vae_is_refused(nodes: dict[str, Any], lite: Any) -> None:
    with refused("16 channels", "decodes 4", "wire that one"):
        nodes["VSRDecode"].execute(lite[1], {"samples": torch.zeros(2, 16, 8, 8)}, 0)


def test_what_is_known_survives_sampling(host: Any, nodes: dict[str, Any], lite: Any, latent: Any) -> None:
    """Core's KSampler and ours copy the LATENT's dictionary."""
    sd = nodes["VSRLoadLite"].execute("sd_lite").args[0]
    prompt = nodes["VSRNullPrompt"].execute(sd).args[0]
    part = core("LatentFromBatch", latent, 3, 4)
    sampled = core("KSampler", sd, 0, 1, 1.0, "euler", "karras", prompt, prompt, part, 0.2)
    ours = host.sample(host.guider(sd, prompt, None, 1.0), part, 0, 1, "euler", "karras", 0.2)
    for each in (sampled, ours):
        assert each[KNOWN] == latent[KNOWN] and each["batch_index"] == [3, 4, 5, 6]
