"""CAPM in the host: off is off, the host's UNet and decoder agree with diffusers', and other patches live beside it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.tensors import relative

from .conftest import NAME, SIZE, part
from .test_decode_host import filled, module
from .test_flow import tiled
from .test_parity import headless, pipeline
from .wiring import host_noise

__all__ = ["headless", "pipeline"]

SEED = 5
FRAMES, HEIGHT, WIDTH = SIZE
LEVELS = torch.linspace(0.1, 0.9, FRAMES)


def node(file: str, name: str) -> Any:
    """A node's class, whether or not it is registered."""
    return getattr(importlib.import_module(f"{NAME}.nodes.{file}"), name)


@pytest.fixture(scope="session")
def capm(host: ModuleType) -> ModuleType:
    return module("vsr_ops.modules.capm")


def half(capm: ModuleType, backbone: str, widths: dict[str, int], fresh: bool = False) -> Any:
    torch.manual_seed(0)
    made = capm.CAPM(capm.CAPMShape(backbone, widths, code=8, prompt=8, size=4)).eval().requires_grad_(False)
    return made if fresh else filled(made)


@pytest.fixture(scope="session")
def unets(capm: ModuleType) -> Any:
    """CAPM of lite SVD's UNet, with random weights."""
    return half(capm, capm.SVD_UNET, capm.decoder_widths([64] * 4))


@pytest.fixture(scope="session")
def vaes(capm: ModuleType) -> Any:
    """CAPM of its VAE."""
    return half(capm, capm.SVD_VAE, capm.decoder_widths([32, 32, 64, 128]))


def sampled(host: ModuleType, model: Any, wired: Any, cfg: float = 2.0, steps: int = 1) -> Tensor:
    positive, negative, latent = wired
    return host.sample(host.guider(model, positive, negative, cfg), latent, SEED, steps, "euler", "karras", 1.0)[
        "samples"
    ]


@pytest.fixture(scope="session")
def small(wired: Any) -> Any:
    """Four frames of 16 x 16 latents."""
    return part(wired, 4, 16, 16)


def test_a_fresh_one_and_strength_zero_change_nothing(
    host: ModuleType, lite: Any, small: Any, capm: ModuleType, unets: Any
) -> None:
    model = lite[0]
    plain = sampled(host, model, small)
    fresh = half(capm, capm.SVD_UNET, capm.decoder_widths([64] * 4), fresh=True)
    for levels in (None, torch.tensor(0.5), LEVELS[:4]):
        assert torch.equal(sampled(host, host.patch_capm(model, capm.HostCAPM(fresh, levels, 1.0)), small), plain)
    assert host.patch_capm(model, capm.HostCAPM(unets, None, 0.0)) is model
    assert host.patch_capm(model, capm.HostCAPM(None, None, 1.0)) is model
    on = host.patch_capm(model, capm.HostCAPM(unets, None, 1.0))
    changed = sampled(host, on, small)
    assert relative(changed, plain) > 1e-2
    off = host.patch_capm(on, capm.HostCAPM(unets, None, 0.0))
    assert torch.equal(sampled(host, off, small), plain) and not off.get_nested_additional_models()
    assert torch.equal(sampled(host, model, small), plain), "nothing stays"
    again = host.patch_capm(on, capm.HostCAPM(unets, None, 1.0))
    assert torch.equal(sampled(host, again, small), changed), "the last one counts, once"


@pytest.mark.parametrize("hint", [None, LEVELS[:4]])
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_the_hosts_unet_and_diffusers_agree(
    host: ModuleType,
    lite: Any,
    small: Any,
    capm: ModuleType,
    unets: Any,
    headless: Any,
    hint: Tensor | None,
    cfg: float,
) -> None:
    """In what the UNet gives for the same input, conditional and unconditional."""
    calls: list[tuple[Any, Tensor]] = []

    def spy(executor: Any, *given: Any, **rest: Any) -> Tensor:
        calls.append((given[:3], executor(*given, **rest)))
        return calls[-1][1]

    on = host.patch_capm(lite[0], capm.HostCAPM(unets, hint, 1.5))
    on.add_wrapper_with_key("diffusion_model", "spy", spy)
    sampled(host, on, small, cfg)
    conditions = torch.tensor([module("vsr_ops.backbones.svd").MICRO_CONDITIONS])
    for (x, timesteps, context), found in calls:
        videos = x.shape[0] // 4
        given = (x.unflatten(0, (videos, 4)), timesteps[0], context[::4], conditions.expand(videos, -1))
        with capm.attached(unets, headless.unet, hint, 1.5):
            expected = headless.unet(*given, return_dict=False)[0].flatten(0, 1)
        assert relative(found, expected) < 1e-5
        assert relative(headless.unet(*given, return_dict=False)[0].flatten(0, 1), expected) > 1e-2
    assert sum(x.shape[0] for (x, *_), _ in calls) == (4 if cfg == 1 else 8)


def test_levels_go_with_the_frames_of_their_tiles(
    host: ModuleType, lite: Any, wired: Any, capm: ModuleType, unets: Any, headless: Any, pipeline: ModuleType
) -> None:
    """Windows of four frames in six, tiles of 16 x 16 in 24 x 24, one at a time or several."""
    tiling, lr = module("vsr_ops.sampling.tiling"), wired[0][0][1]["concat_latent_image"]
    plan = tiling.plan_tiles(*SIZE, tiling.TileSize(16, 16, 4), 0.5)
    propagation = module("vsr_ops.sampling.propagation").Propagation.named("none")
    settings = pipeline.Settings(steps=1, propagation=propagation, seed=SEED, guidance="none")

    def in_diffusers(hint: Tensor) -> Tensor:
        current: list[Any] = []
        with capm.attached(unets, headless.unet, lambda: hint[plan.windows[current[-1].window].span.slice], 1.5):
            out = pipeline.sample(headless, lr, plan, settings, noise=host_noise(lr), tick=current.append)
        return out / headless.scaling_factor

    expected = in_diffusers(LEVELS)
    on = host.patch_capm(lite[0], capm.HostCAPM(unets, LEVELS, 1.5))
    for batch in (1, 3):
        values = (16, 16, 4, 0.5, "none", "lagged", 0, 4, 1, "ends", 0.0, 1.0, batch)
        found = sampled(host, node("patches", "TiledDiffusion").execute(on, *values).args[0], wired, 1.0)
        # Without CAPM they are 4e-5 apart here.
        assert relative(found, expected) < 1e-4
    assert relative(in_diffusers(LEVELS.flip(0)), expected) > 1e-3


def test_any_order_of_wiring_is_the_same(
    host: ModuleType, nodes: dict[str, Any], lite: Any, wired: Any, capm: ModuleType, unets: Any
) -> None:
    wide = part(wired, FRAMES, 16, 24)

    def on(model: Any) -> Any:
        return host.patch_capm(model, capm.HostCAPM(unets, LEVELS, 1.0))

    def others(model: Any) -> Any:
        return tiled(nodes, host.patch_perturbed(model, "pag", 1.0, "middle"))

    first, last = sampled(host, others(on(lite[0])), wide), sampled(host, on(others(lite[0])), wide)
    assert torch.equal(first, last)
    assert relative(first, sampled(host, others(lite[0]), wide)) > 1e-3


def test_other_packs_patches_of_the_same_blocks_act_after_it(
    host: ModuleType, lite: Any, small: Any, capm: ModuleType, unets: Any
) -> None:
    blocks: list[int] = []

    def other(h: Tensor, skip: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        blocks.append(options["block"][1])
        return 0.9 * h, skip

    def with_other(model: Any) -> Any:
        m = model.clone()
        m.set_model_output_block_patch(other)
        return m

    def on(model: Any) -> Any:
        return host.patch_capm(model, capm.HostCAPM(unets, None, 1.0))

    first, last = sampled(host, on(with_other(lite[0])), small), sampled(host, with_other(on(lite[0])), small)
    assert torch.equal(first, last) and set(blocks) == set(range(8))
    assert relative(first, sampled(host, on(lite[0]), small)) > 1e-3
    assert relative(first, sampled(host, with_other(lite[0]), small)) > 1e-3


def test_tiles_of_a_whole_window_share_their_weights(host: ModuleType, capm: ModuleType, unets: Any) -> None:
    hook, run = importlib.import_module(f"{NAME}.nodes.host.capm"), importlib.import_module(f"{NAME}.nodes.session.run")
    plan = module("vsr_ops.sampling.tiling").plan_tiles(
        4, 24, 24, module("vsr_ops.sampling.tiling").TileSize(16, 16, 4), 0.5
    )

    class Running:
        pass

    made = Running()
    made.plan = plan  # type: ignore[attr-defined]
    for tiles, shared in ((4, 4), (2, 1)):
        options = {"cond_or_uncond": [0], run.KEY: {"run": made, "call": (slice(0, 4), tiles)}}
        assert hook._told(capm.HostCAPM(unets, None, 1.0), torch.zeros(tiles * 4, 8, 16, 16), options) == (None, shared)


def test_what_does_not_fit_is_said_in_one_line(
    host: ModuleType, lite: Any, small: Any, capm: ModuleType, unets: Any, vaes: Any
) -> None:
    narrow = half(capm, capm.SVD_UNET, {"up_blocks.0": 32})
    other = half(capm, capm.SD_UNET, capm.decoder_widths([64] * 4))
    for model, words in ((narrow, "'up_blocks.0': 32.*'up_blocks.0': 64"), (other, "sd-unet, this model is svd-unet")):
        with pytest.raises(ValueError, match=words) as caught:
            host.patch_capm(lite[0], capm.HostCAPM(model, None, 1.0))
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="strength is 3"):
        host.patch_capm(lite[0], capm.HostCAPM(unets, None, 3.0))
    with pytest.raises(ValueError, match="3 compression levels for 4 frames"):
        sampled(host, host.patch_capm(lite[0], capm.HostCAPM(unets, LEVELS[:3], 1.0)), small)


def test_a_picture_models_unet_takes_its_own_alone(host: ModuleType, capm: ModuleType, unets: Any) -> None:
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    shape = {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": [1, 2]}
    shape |= {"num_res_blocks": [1, 1], "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1]}
    shape |= {"transformer_depth_middle": 1, "context_dim": 16, "use_spatial_transformer": True, "num_heads": 2}
    config = comfy.supported_models.SD15({**shape, "use_linear_in_transformer": True, "legacy": False})
    base = filled(config.get_model({}, device=torch.device("cpu")))
    model = comfy.model_patcher.ModelPatcher(base, torch.device("cpu"), torch.device("cpu"))
    with pytest.raises(ValueError, match="svd-unet, this model is sd-unet"):
        host.patch_capm(model, capm.HostCAPM(unets, None, 1.0))
    on = host.patch_capm(
        model, capm.HostCAPM(half(capm, capm.SD_UNET, {"up_blocks.0": 64, "up_blocks.1": 32}), LEVELS, 1.0)
    )
    prompt = [[torch.randn(1, 3, 16), {}]]
    wired = (prompt, [[torch.zeros(1, 3, 16), {}]], {"samples": torch.zeros(FRAMES, 4, 8, 8)})
    plain, changed = sampled(host, model, wired), sampled(host, on, wired)
    apart = (changed - plain).flatten(1).norm(dim=1)
    assert float(apart.min()) > 0


# --- Decode -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def latent(wired: Any) -> dict[str, Any]:
    return {"samples": wired[0][0][1]["concat_latent_image"][:3, :, :7, :5]}


def decoded(nodes: dict[str, Any], lite: Any, latent: dict[str, Any], **named: Any) -> Tensor:
    return nodes["VSRDecode"].execute(lite[1], latent, 0, **named).args[0]


@pytest.mark.parametrize("levels", [None, LEVELS[:3], torch.tensor(0.4)])
def test_the_hosts_decoder_and_diffusers_agree(
    nodes: dict[str, Any],
    lite: Any,
    latent: dict[str, Any],
    capm: ModuleType,
    vaes: Any,
    headless: Any,
    levels: Tensor | None,
) -> None:
    prompted = capm.HostCAPM(vaes, levels, 1.0)
    with capm.attached(vaes, headless.vae.decoder, prompted.hint(3)):
        expected = headless.decode(latent["samples"]).clamp(0, 1).movedim(1, -1)
    assert float((expected - decoded(nodes, lite, latent)).abs().max()) > 0.05, "it acts"
    assert float((decoded(nodes, lite, latent, capm=prompted) - expected).abs().max()) < 1e-4
    assert float((decoded(nodes, lite, latent, capm=prompted, tile=4) - expected).abs().max()) < 2 / 255


def test_a_fresh_decoders_half_and_strength_zero_change_nothing(
    nodes: dict[str, Any], lite: Any, latent: dict[str, Any], capm: ModuleType, vaes: Any
) -> None:
    fresh = half(capm, capm.SVD_VAE, dict(vaes.shape.widths), fresh=True)
    for tile in (0, 4):
        plain = decoded(nodes, lite, latent, tile=tile)
        assert torch.equal(decoded(nodes, lite, latent, tile=tile, capm=capm.HostCAPM(vaes, None, 0.0)), plain)
        if tile:
            assert torch.equal(decoded(nodes, lite, latent, tile=tile, capm=capm.HostCAPM(fresh, None, 1.0)), plain)


def test_a_decoder_without_its_half_or_levels_says_so(
    nodes: dict[str, Any], lite: Any, latent: dict[str, Any], capm: ModuleType, unets: Any, vaes: Any
) -> None:
    for prompted, words in (
        (capm.HostCAPM(None, None, 1.0), "holds no half for a VAE"),
        (capm.HostCAPM(vaes, LEVELS, 1.0), "6 compression levels for 3 frames"),
        (capm.HostCAPM(unets, None, 1.0), "svd-unet, this model is svd-vae"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            decoded(nodes, lite, latent, capm=prompted)
        assert "\n" not in str(caught.value)


# --- Nodes ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def own(capm: ModuleType, unets: Any, vaes: Any) -> Iterator[str]:
    """An artist's file with both halves."""
    place = Path(importlib.import_module("folder_paths").models_dir) / "vsr_capm"
    place.mkdir(parents=True, exist_ok=True)
    file = module("vsr_ops.modules.capm_file")
    file.write_capms(place / "own.safetensors", file.CAPMs(unets, vaes), "nothing")
    yield "own.safetensors"
    (place / "own.safetensors").unlink()


def test_the_node_hands_both_halves_on(
    host: ModuleType, nodes: dict[str, Any], lite: Any, small: Any, latent: dict[str, Any], own: str
) -> None:
    prompts = node("capm", "CompressionPrompts")
    inputs = {item.id: item for item in prompts.define_schema().inputs}
    assert own in inputs["which"].options
    taken = {item.id: item.io_type for item in nodes["VSRDecode"].define_schema().inputs}
    assert prompts.define_schema().outputs[1].io_type == taken["capm"]
    estimate = node("capm", "CompressionEstimate").define_schema().outputs[0]
    assert estimate.io_type == inputs["levels"].io_type
    for named, told in (({}, None), ({"levels": LEVELS[:4]}, LEVELS[:4]), ({"levels": LEVELS, "crf": 25.5}, 0.5)):
        model, prompted = prompts.execute(lite[0], own, 1.0, **named).args
        assert told is prompted.levels is None or torch.equal(prompted.levels, torch.as_tensor(told))
        assert bool(torch.isfinite(sampled(host, model, small)).all())
    assert prompts.execute(lite[0], own, 0.0).args[0] is lite[0]
    with pytest.raises(ValueError, match="crf is 60"):
        prompts.execute(lite[0], own, 1.0, crf=60.0)
    with pytest.raises(ValueError, match=r"models/vsr_capm"):
        prompts.execute(lite[0], "other.safetensors", 1.0)


def test_levels_are_estimated_drawn_and_told(host: ModuleType) -> None:
    compression = module("vsr_ops.modules.compression")
    place = Path(importlib.import_module("folder_paths").models_dir) / "vsr_compression"
    place.mkdir(parents=True, exist_ok=True)
    head = compression.CompressionHead(compression.HeadShape((8,), (1,)))
    compression.write_compression(place / "own.safetensors", head, "nothing")
    video = torch.rand(3, 32, 48, 3, generator=torch.Generator().manual_seed(0))
    try:
        estimate = node("capm", "CompressionEstimate")
        levels, plot, text = estimate.execute(video, "own.safetensors", -1.0).args
        assert levels.shape == (3,) and plot.ndim == 4 and plot.shape[-1] == 3 and "over 3 frames" in text
        levels, _, text = estimate.execute(video, "own.safetensors", 25.5).args
        assert torch.equal(levels, torch.full((3,), 0.5)) and text.startswith("CRF 25.5 on average, 25.5 to 25.5")
    finally:
        (place / "own.safetensors").unlink()
