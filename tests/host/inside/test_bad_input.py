"""What the nodes refuse, and whether the artist reads what is wrong, what was expected, and what to do."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch

from .conftest import NAME, part
from .node_values import COMBOS, IMAGES, inputs_of, values_for
from .wiring import refused

TILES = (16, 16, 4, 0.5, "sap+tap", "lagged", 0, 4, 1, "ends", 0.0, 1.0, 1)


@pytest.fixture(scope="session")
def small(wired: Any) -> Any:
    """One tile of 4 frames."""
    return part(wired, 4, 16, 16)


def tiny_sd(depth: int, middle: int) -> Any:
    """A MODEL of SD 1.5's kind, without weights; `depth` transformer blocks outside the middle."""
    config = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "channel_mult": [1, 2],
        "num_res_blocks": [1, 1],
        "transformer_depth": [depth] * 2,
        "transformer_depth_output": [depth] * 4,
        "transformer_depth_middle": middle,
        "context_dim": 16,
        "num_heads": 2,
        "use_spatial_transformer": True,
        "legacy": False,
    }
    made = importlib.import_module("comfy.supported_models").SD15(config)
    made.set_inference_dtype(torch.float32, None)
    cpu = torch.device("cpu")
    patcher = importlib.import_module("comfy.model_patcher").ModelPatcher
    return patcher(made.get_model({}, device=cpu), load_device=cpu, offload_device=cpu)


def tiny_flux() -> Any:
    """A MODEL of Flux's kind, without weights."""
    config: dict[str, Any] = {
        "image_model": "flux",
        "in_channels": 16,
        "out_channels": 16,
        "vec_in_dim": 8,
        "context_in_dim": 8,
        "hidden_size": 32,
        "mlp_ratio": 2.0,
        "num_heads": 2,
        "depth": 1,
        "depth_single_blocks": 1,
        "axes_dim": [4, 6, 6],
        "theta": 10000,
        "patch_size": 2,
        "qkv_bias": True,
        "guidance_embed": False,
    }
    # Newer hosts ask for it, older ones know none.
    if "txt_ids_dims" in importlib.import_module("comfy.ldm.flux.model").FluxParams.__dataclass_fields__:
        config["txt_ids_dims"] = []
    made = importlib.import_module("comfy.supported_models").Flux(config)
    made.set_inference_dtype(torch.float32, None)
    cpu = torch.device("cpu")
    patcher = importlib.import_module("comfy.model_patcher").ModelPatcher
    return patcher(made.get_model({}, device=cpu), load_device=cpu, offload_device=cpu)


def tiled(nodes: dict[str, Any], model: Any, *values: Any) -> Any:
    return nodes["VSRTiledDiffusion"].execute(model, *(values or TILES)).args[0]


def run(host: ModuleType, model: Any, wired: Any) -> Any:
    positive, negative, latent = wired
    made = host.guider(model, positive, negative, 2.0)
    return host.sample(made, latent, 0, 1, "euler", "karras", 1.0)["samples"]


def changed(conditioning: Any, **values: Any) -> Any:
    return [[conditioning[0][0], {**conditioning[0][1], **values}]]


# --- MODEL ----------------------------------------------------------------------------------------------------------


def test_a_model_of_another_kind(nodes: dict[str, Any], lite: Any) -> None:
    picture = torch.zeros(1, 16, 16, 3)
    with refused("Flux MODEL", "UNet with spatial self-attention", "Stable Video Diffusion", "wire"):
        tiled(nodes, tiny_flux())
    with refused("BaseModel MODEL", "UNet with spatial self-attention", "wire"):
        tiled(nodes, tiny_sd(0, -1))
    prompt = importlib.import_module(f"{NAME}.nodes.latent").NullPrompt
    with refused("Flux MODEL", "UNet with cross-attention", "empty text"):
        prompt.execute(tiny_flux())
    with refused("BaseModel", "Stable Video Diffusion", "wire"):
        nodes["VSRSVDConditioning"].execute(tiny_sd(1, 1), lite[1], picture, 127, 8, 0.0, "noise", "one scene")


@pytest.mark.parametrize("node", ["VSRDSSAG", "VSRDSSAGGuider", "VSRPAGGuider", "VSRSAGGuider"])
def test_guidance_without_spatial_self_attention(nodes: dict[str, Any], small: Any, node: str) -> None:
    model = tiny_sd(0, -1)
    rest: dict[str, tuple[Any, ...]] = {
        "VSRDSSAG": (1.0, 0.5, "ends"),
        "VSRDSSAGGuider": (small[0], 1.0, 0.5, "ends"),
        "VSRPAGGuider": (small[0], 1.0, 1.0, "middle"),
        "VSRSAGGuider": (small[0], 1.0, 1.0),
    }
    with refused("spatial self-attention", "BaseModel", "choose"):
        nodes[node].execute(model, *rest[node])


def test_guidance_in_layers_that_a_unet_has_not(nodes: dict[str, Any]) -> None:
    nodes["VSRDSSAG"].execute(tiny_sd(1, 0), 1.0, 0.5, "ends")
    with refused("spatial self-attention", "'middle'", "choose other layers"):
        nodes["VSRDSSAG"].execute(tiny_sd(1, 0), 1.0, 0.5, "middle")


def test_context_windows(host: ModuleType, nodes: dict[str, Any], lite: Any, small: Any) -> None:
    windows = importlib.import_module("comfy.context_windows")
    handler = windows.IndexListContextHandler(
        windows.get_matching_context_schedule("standard_static"),
        windows.get_matching_fuse_method("flat"),
        context_length=2,
        context_overlap=0,
    )
    before = lite[0].clone()
    guided = nodes["VSRDSSAG"].execute(lite[0], 1.0, 0.5, "ends").args[0]
    after = tiled(nodes, lite[0])
    for model in (before, guided, after):
        model.model_options["context_handler"] = handler
    for model in (tiled(nodes, before), guided, after):
        with refused("context windows", "remove"):
            run(host, model, small)


@pytest.mark.parametrize("name", ["dssag", "sag"])
def test_guidance_under_a_guider_of_three_conditionings(host: ModuleType, lite: Any, small: Any, name: str) -> None:
    positive, negative, latent = small
    model = host.patch_perturbed(lite[0], name, 1.0, "middle")
    node = importlib.import_module("comfy_extras.nodes_custom_sampler").DualCFGGuider()
    made = node.get_guider(model, positive, positive, negative, 2.0, 1.5, "regular")[0]
    with refused(name, "3 conditionings", "use"):
        host.sample(made, latent, 0, 1, "euler", "karras", 1.0)


# --- Tiles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (0, 12, ("12x16x4", "multiples of 8")),
        (1, 20, ("16x20x4", "multiples of 8")),
        (0, -8, ("-8x16x4", "positive")),
        (3, 0.9, ("overlap is 0.9", "0 to 0.75")),
        (3, float("nan"), ("overlap is nan", "0 to 0.75")),
        (6, -1, ("SAP rate is -1", "from 1")),
        (7, 0, ("TAP frames is 0", "from 1")),
        (8, 0, ("TAP rate is 0", "from 1")),
    ],
)
def test_tiles_that_cannot_be(
    nodes: dict[str, Any], lite: Any, place: int, value: float, words: tuple[str, ...]
) -> None:
    with refused(*words):
        tiled(nodes, lite[0], *TILES[:place], value, *TILES[place + 1 :])


def test_a_tile_larger_than_the_video_is_one_tile(
    host: ModuleType, nodes: dict[str, Any], lite: Any, small: Any
) -> None:
    large = tiled(nodes, lite[0], 64, 64, 14, *TILES[3:])
    assert torch.equal(run(host, large, small), run(host, tiled(nodes, lite[0]), small))


# --- Conditioning and LATENT ----------------------------------------------------------------------------------------


def test_positive_without_concat_latents(host: ModuleType, nodes: dict[str, Any], lite: Any, small: Any) -> None:
    bare = {key: value for key, value in small[0][0][1].items() if key != "concat_latent_image"}
    with refused("positive", "concat latents", "wire"):
        run(host, tiled(nodes, lite[0]), ([[small[0][0][0], bare]], *small[1:]))


@pytest.mark.parametrize("which", ["positive", "negative"])
def test_frame_counts_that_disagree(
    host: ModuleType, nodes: dict[str, Any], lite: Any, wired: Any, small: Any, which: str
) -> None:
    other = part(wired, 6, 16, 16)
    wrong = (other[0], *small[1:]) if which == "positive" else (small[0], other[1], small[2])
    with refused(which, "6 frames", "LATENT 4", "take both"):
        run(host, tiled(nodes, lite[0]), wrong)


def test_sizes_that_disagree(host: ModuleType, nodes: dict[str, Any], lite: Any, wired: Any, small: Any) -> None:
    with refused("24x16", "16x16", "take both"):
        run(host, tiled(nodes, lite[0]), (part(wired, 4, 24, 16)[0], *small[1:]))


def test_disagreement_without_tiles(host: ModuleType, nodes: dict[str, Any], lite: Any, wired: Any, small: Any) -> None:
    model = nodes["VSRDSSAG"].execute(lite[0], 1.0, 0.5, "ends").args[0]
    with refused("positive", "6 frames", "LATENT 4", "take both"):
        run(host, model, (part(wired, 6, 16, 16)[0], *small[1:]))


def test_a_conditioning_of_a_part_of_the_frame(host: ModuleType, nodes: dict[str, Any], lite: Any, wired: Any) -> None:
    positive, *rest = part(wired, 4, 24, 16)
    half = importlib.import_module("nodes").ConditioningSetArea().append(positive, 128, 128, 0, 0, 1.0)[0]
    with refused("16x16 latents of 24x16", "remove"):
        run(host, tiled(nodes, lite[0]), (half, *rest))


def test_sag_with_a_conditioning_of_some_steps(host: ModuleType, lite: Any, small: Any) -> None:
    late = importlib.import_module("nodes").ConditioningSetTimestepRange().set_range(small[1], 0.9, 1.0)[0]
    with refused("SAG", "timestep range off"):
        run(host, host.patch_perturbed(lite[0], "sag", 1.0, "middle"), (small[0], late, small[2]))


def test_nan_latents(host: ModuleType, nodes: dict[str, Any], lite: Any, small: Any) -> None:
    samples = small[2]["samples"].clone()
    samples[1, 2, 3, 4] = float("nan")
    with refused("LATENT", "NaN", "check"):
        run(host, tiled(nodes, lite[0]), (*small[:2], {"samples": samples}))


def test_nan_concat_latents(host: ModuleType, nodes: dict[str, Any], lite: Any, small: Any) -> None:
    concat = small[0][0][1]["concat_latent_image"].clone()
    concat[1, 2, 3, 4] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        run(host, tiled(nodes, lite[0]), (changed(small[0], concat_latent_image=concat), *small[1:]))


def test_cfg_without_a_negative(nodes: dict[str, Any], lite: Any, small: Any) -> None:
    for node, rest in (("VSRPAGGuider", (2.0, 1.0, "middle")), ("VSRSAGGuider", (2.0, 1.0))):
        with refused("cfg is 2.0", "negative", "wire it"):
            nodes[node].execute(lite[0], small[0], *rest)


def test_clip_vision_of_another_width(nodes: dict[str, Any], lite: Any) -> None:
    output = importlib.import_module("comfy.clip_vision").Output()
    output.image_embeds = torch.zeros(1, 1024)
    values = (*lite, torch.zeros(1, 16, 16, 3), 127, 8, 0.0, "noise", "one scene", output)
    with refused("1024 wide", "takes 32", "unwired"):
        nodes["VSRSVDConditioning"].execute(*values)


# --- IMAGE ----------------------------------------------------------------------------------------------------------


def test_a_reference_of_another_size(nodes: dict[str, Any]) -> None:
    with refused("16x16", "24x16", "resize"):
        nodes["VSRColorMatch"].execute(torch.zeros(2, 16, 16, 3), torch.zeros(2, 24, 16, 3), "wavelet", 1.0, 0.0)
    with refused("reference", "frames"):
        nodes["VSRColorMatch"].execute(torch.zeros(2, 16, 16, 3), torch.zeros(3, 16, 16, 3), "adain", 1.0, 0.0)


def test_videos_of_two_sizes_for_a_refiner(nodes: dict[str, Any]) -> None:
    refiner = nodes["VSRLoadRefiner"].execute("lite").args[0]
    for other in (torch.zeros(2, 24, 16, 3), torch.zeros(3, 16, 16, 3)):
        with refused("decoded", "upscaled", "one size"):
            nodes["VSRRefine"].execute(torch.zeros(2, 16, 16, 3), other, refiner, 0.0)
    with refused("w is 1.5", "0", "1"):
        nodes["VSRRefine"].execute(torch.zeros(2, 16, 16, 3), torch.zeros(2, 16, 16, 3), refiner, 1.5)


def test_a_preview_of_nothing(nodes: dict[str, Any], lite: Any) -> None:
    picture = torch.zeros(1, 16, 16, 3)
    with refused("neither image nor latent", "wire"):
        nodes["VSRTilePreview"].execute(tiled(nodes, lite[0]), 10, 2)
    with refused("no tiles", "wire"):
        nodes["VSRTilePreview"].execute(lite[0], 10, 2, image=picture)


def test_the_tables_of_inputs_are_complete(nodes: dict[str, Any]) -> None:
    combos = {id: inputs_of(node, "COMBO") for id, node in nodes.items()}
    assert {id: names for id, names in combos.items() if names} == COMBOS
    images = {id: inputs_of(node, "IMAGE") for id, node in nodes.items()}
    assert {id: names for id, names in images.items() if names} == IMAGES


@pytest.mark.parametrize(("node", "name"), [(node, name) for node, names in COMBOS.items() for name in names])
def test_an_unknown_choice(nodes: dict[str, Any], lite: Any, small: Any, node: str, name: str) -> None:
    with refused("'no such choice'"):
        nodes[node].execute(**{**values_for(nodes[node], lite, small), name: "no such choice"})
