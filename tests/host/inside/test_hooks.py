"""The pack's hooks among the host's own: off is off, order does not matter, nothing outlives a run."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.tensors import relative

from .conftest import BEFORE, NAME, comfy_now, part
from .wiring import (
    SEED,
    STEPS,
    TILE,
    block_patches,
    custom_sampled,
    dssag,
    host_pag,
    ksampled,
    no_memory,
    overridden,
    sampled,
    tiled,
    wrapped,
)


@pytest.fixture(scope="session")
def wide(wired: Any) -> Any:
    """Two tiles in two windows."""
    return part(wired, 6, 24, 16)


@pytest.fixture(scope="session")
def alone(wired: Any) -> Any:
    """One tile."""
    return part(wired, *TILE[::-1])


# --- Off is off -----------------------------------------------------------------------------------------------------


def test_loading_the_pack_changes_nothing_in_the_host(lite: Any) -> None:
    assert len(BEFORE) > 100
    now = comfy_now()
    grown = {"_cache", "current_loaded_models", "__warningregistry__"}
    for place, values in BEFORE.items():
        for name, value in values.items():
            assert name in grown or now[place].get(name) is value or now[place].get(name) == value, f"{place}.{name}"
        assert not callable(next((now[place][name] for name in now[place].keys() - values.keys()), None)), place


def test_guidance_of_scale_0_is_the_host_without_the_pack(
    host: ModuleType, nodes: dict[str, Any], lite: Any, alone: Any
) -> None:
    model, (positive, negative, latent) = lite[0], alone
    assert torch.equal(ksampled(dssag(nodes, model, 0.0), alone, 1.0), ksampled(model, alone, 1.0))
    plain = sampled(host, model, alone)
    for node, rest in (("VSRPAGGuider", (2.0, 0.0, "middle")), ("VSRSAGGuider", (2.0, 0.0))):
        made = nodes[node].execute(model, positive, *rest, negative=negative).args[0]
        assert torch.equal(custom_sampled(model, made, latent), plain), node
    made = nodes["VSRDSSAGGuider"].execute(model, positive, 0.0, 0.5, "ends").args[0]
    assert torch.equal(custom_sampled(model, made, latent), ksampled(model, alone, 1.0))


def test_one_tile_without_propagation_is_the_host_without_the_pack(
    host: ModuleType, nodes: dict[str, Any], lite: Any, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = tiled(nodes, lite[0], "none")
    assert torch.equal(sampled(host, one, alone, 1.0), sampled(host, lite[0], alone, 1.0))
    assert relative(sampled(host, one, alone), sampled(host, lite[0], alone)) < 1e-5
    no_memory(monkeypatch)
    assert torch.equal(sampled(host, one, alone), sampled(host, lite[0], alone))


def test_patching_leaves_the_given_model_alone(nodes: dict[str, Any], lite: Any) -> None:
    before = str(lite[0].model_options), str(lite[0].wrappers)
    dssag(nodes, tiled(nodes, lite[0]))
    assert (str(lite[0].model_options), str(lite[0].wrappers)) == before


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_scale_0_after_scale_1_is_off(
    host: ModuleType, nodes: dict[str, Any], lite: Any, alone: Any, cfg: float
) -> None:
    off = dssag(nodes, dssag(nodes, lite[0]), 0.0)
    assert relative(sampled(host, off, alone, cfg), sampled(host, lite[0], alone, cfg)) < 1e-5


# --- Order and other patches ----------------------------------------------------------------------------------------


def rescale_cfg(model: Any) -> Any:
    return importlib.import_module("comfy_extras.nodes_model_advanced").RescaleCFG().patch(model, 0.7)[0]


def lora(model: Any) -> Any:
    """What a LoRA loader does: another weight, as a patch."""
    key = next(key for key in model.model_state_dict() if key.endswith("transformer_blocks.0.attn1.to_k.weight"))
    m = model.clone()
    assert m.add_patches({key: (m.model_state_dict()[key].clone(),)}, 0.5) == [key]
    return m


OTHERS: dict[str, Callable[[Any], Any] | None] = {
    "ours": None,
    "block patches": block_patches,
    "host's RescaleCFG": rescale_cfg,
    "host's PAG": host_pag,
    "LoRA": lora,
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_wiring_order_does_not_matter(
    host: ModuleType, nodes: dict[str, Any], lite: Any, wide: Any, other: Callable[[Any], Any] | None
) -> None:
    def ours(model: Any) -> Any:
        return dssag(nodes, tiled(nodes, model))

    if other is None:
        found, expected = ours(lite[0]), tiled(nodes, dssag(nodes, lite[0]))
    else:
        found, expected = other(ours(lite[0])), ours(other(lite[0]))
    result = sampled(host, found, wide)
    assert torch.equal(result, sampled(host, expected, wide))
    weaker = lite[0] if other is None else ours(lite[0])
    assert relative(result, sampled(host, weaker, wide)) > 1e-4


@pytest.mark.parametrize("cfg", [1.0, 2.0], ids=["eq. 8", "eq. 9"])
def test_ksampler_and_custom_sampler_agree(
    host: ModuleType, nodes: dict[str, Any], lite: Any, wide: Any, cfg: float
) -> None:
    positive, negative, latent = wide
    tiles = tiled(nodes, lite[0])
    patched = dssag(nodes, tiles)
    expected = ksampled(patched, wide, cfg)
    theirs = importlib.import_module("comfy_extras.nodes_custom_sampler").CFGGuider()
    made = theirs.get_guider(patched, positive, negative, cfg)[0]
    assert torch.equal(custom_sampled(patched, made, latent), expected)
    against = {"negative": negative} if cfg > 1 else {}
    guider = nodes["VSRDSSAGGuider"].execute(tiles, positive, 1.0, 0.5, "ends", **against).args[0]
    assert torch.equal(custom_sampled(tiles, guider, latent), expected)
    assert torch.equal(sampled(host, patched, wide, cfg), expected)


def test_branches_together_or_apart_are_one(
    host: ModuleType, nodes: dict[str, Any], lite: Any, wide: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    branches: set[int] = set()

    def count(executor: Any, x: Tensor, t: Tensor, *args: Any, **rest: Any) -> Tensor:
        branches.add(x.shape[0] // 6)
        return executor(x, t, *args, **rest)

    model = dssag(nodes, tiled(nodes, wrapped(lite[0], "apply_model", count)))
    together = sampled(host, model, wide, steps=3)
    assert branches == {2}
    branches.clear()
    no_memory(monkeypatch)
    apart = sampled(host, model, wide, steps=3)
    assert branches == {1}
    assert relative(apart, together) < 1e-5


def test_another_packs_attention_stays(
    host: ModuleType, nodes: dict[str, Any], lite: Any, wide: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Joined keys for another's, as exact as keys apart, which the host's gets where it is torch's."""
    core, apart, calls = importlib.import_module(f"{NAME}.vsr_ops.sampling.attention"), list[int](), list[int]()
    inner = core.merged
    monkeypatch.setattr(core, "merged", lambda *args: apart.append(1) or inner(*args))

    def theirs(func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        calls.append(args[0].shape[1])
        return func(*args, **kwargs)

    expected = sampled(host, dssag(nodes, tiled(nodes, lite[0])), wide)
    counts, asked = list[int](), len(apart)
    for model in (
        dssag(nodes, tiled(nodes, overridden(lite[0], theirs))),
        overridden(dssag(nodes, tiled(nodes, lite[0])), theirs),
    ):
        calls.clear()
        assert relative(sampled(host, model, wide), expected) < 1e-6
        counts.append(len(calls))
    assert counts[0] == counts[1] > 100
    assert len(apart) == asked > 0


@pytest.mark.parametrize("name", ["dssag", "pag", "sag"])
def test_another_patch_may_have_the_negative_evaluated_at_cfg_1(
    host: ModuleType, lite: Any, alone: Any, name: str
) -> None:
    model = host.patch_perturbed(lite[0], name, 1.0, "middle")
    expected = sampled(host, model, alone, 1.0)
    assert relative(expected, sampled(host, lite[0], alone, 1.0)) > 1e-6
    both = model.clone()
    both.model_options["disable_cfg1_optimization"] = True
    assert relative(sampled(host, both, alone, 1.0), expected) < 1e-5


def test_the_banks_of_two_positives_do_not_meet(host: ModuleType, nodes: dict[str, Any], lite: Any, wide: Any) -> None:
    """Their estimates' mean does not depend on their order, and of one and the same it is that one's."""
    positive, negative, latent = wide
    ((context, values),) = positive
    other = [[context, {**values, "concat_latent_image": values["concat_latent_image"].flip(-1)}]]
    model = dssag(nodes, tiled(nodes, lite[0], "sap"))
    found = sampled(host, model, (positive + other, negative, latent))
    assert relative(sampled(host, model, (other + positive, negative, latent)), found) < 1e-5
    twice = sampled(host, model, (positive + positive, negative, latent))
    assert relative(twice, sampled(host, model, wide)) < 1e-5


def test_tiles_under_a_guider_of_three_conditionings(
    host: ModuleType, nodes: dict[str, Any], lite: Any, alone: Any
) -> None:
    node = importlib.import_module("comfy_extras.nodes_custom_sampler").DualCFGGuider()
    positive, negative, latent = alone
    found, expected = (
        custom_sampled(model, node.get_guider(model, positive, positive, negative, 2.0, 1.5, "regular")[0], latent)
        for model in (tiled(nodes, lite[0]), lite[0])
    )
    assert relative(found, expected) < 1e-5


@pytest.mark.parametrize("size", [(5, 20, 12), (1, 24, 16)], ids=["no multiple of the UNet's factor", "one frame"])
def test_uneven_videos(host: ModuleType, nodes: dict[str, Any], lite: Any, wired: Any, size: Any) -> None:
    """A step is its tiles' answers, blended; with everything on, tiles may go together, and what is on acts."""
    video, (calls, noting) = part(wired, *size), noted(lite[0])
    plain = sampled(host, tiled(nodes, noting, "none"), video, 1.0)
    assert relative(calls[0][-1], blended(lite[0], *calls[0][:-1])) < 1e-5

    def everything(batch: int) -> Tensor:
        values = (*TILE, 0.5, "sap+tap", "auto", 0, 4, 1, "all", 0.0, 1.0, batch)
        return sampled(host, dssag(nodes, nodes["VSRTiledDiffusion"].execute(lite[0], *values).args[0]), video, 1.0)

    found = everything(1)
    assert relative(found, plain) > 1e-3 and relative(everything(2), found) < 1e-5


def noted(model: Any) -> tuple[list[Any], Any]:
    """A MODEL that notes what it is called with on the whole video: positional and named inputs, and the answer."""
    calls: list[Any] = []

    def note(executor: Any, *inputs: Any, **named: Any) -> Tensor:
        out = executor(*inputs, **named)
        calls.append((inputs, named, out))
        return out

    return calls, wrapped(model, "apply_model", note)


def blended(model: Any, inputs: Any, named: dict[str, Any]) -> Tensor:
    """The answers to every tile of a call, each asked for alone, put together."""
    x, t, concat, context = inputs[:4]
    tiling = importlib.import_module(f"{NAME}.vsr_ops.sampling.tiling")
    plan = tiling.plan_tiles(len(x), *x.shape[2:], tiling.TileSize(*TILE), 0.5)
    answers: list[list[Tensor]] = []
    for window in plan.windows:
        frames = window.span.slice
        own = {**named, "y": named["y"][frames], "num_video_frames": window.span.length}
        tiles = [tuple(value[frames, :, row.slice, col.slice] for value in (x, concat)) for row, col in plan.spatial]
        answers.append([model.model.apply_model(a, t[frames], b, context[frames], None, {}, **own) for a, b in tiles])
    return tiling.merge(plan, answers)


# --- What acts where ------------------------------------------------------------------------------------------------


def test_a_second_order_sampler_counts_sigmas(host: ModuleType, nodes: dict[str, Any], lite: Any, wide: Any) -> None:
    """Seen in how many keys a 16 x 16 layer has beside its own: SAP's bank in even steps, TAP's frames in odd ones."""
    extra: dict[float, set[int]] = {}

    def watch(func: Callable[..., Tensor], q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if q.shape[1] == TILE[0] * TILE[1] <= k.shape[1]:
            sigma = float(kwargs["transformer_options"]["sigmas"].max())
            extra.setdefault(sigma, set()).add(k.shape[1] - q.shape[1])
        return func(q, k, *args, **kwargs)

    model = overridden(tiled(nodes, lite[0], mode="synchronous"), watch)
    assert torch.isfinite(sampled(host, model, wide, 1.0, 3, "heun")).all()
    sap, tap = {0, 32}, {0, 4 * TILE[0] * TILE[1]}
    seen = [extra[sigma] | {0} for sigma in sorted(extra, reverse=True)]
    assert seen == [sap, tap, sap]


def test_only_spatial_attention_is_perturbed(
    host: ModuleType, nodes: dict[str, Any], lite: Any, wired: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 8 x 8 latents of 4 frames the third level's spatial and temporal attention have one shape, and the middle's
    cross-attention that of a spatial layer."""
    samplers = importlib.import_module("comfy.samplers")
    video = importlib.import_module("comfy.ldm.modules.attention").SpatialVideoTransformer
    model, scale, tiny = lite[0], 10.0, part(wired, 4, 8, 8)
    positive, negative, latent = tiny
    blocks = [part for part in model.model.diffusion_model.modules() if isinstance(part, video)]

    def by_hand(layers: list[Any]) -> Tensor:
        def weaken(args: dict[str, Any]) -> Tensor:
            with monkeypatch.context() as patch:
                for layer in layers:
                    patch.setattr(layer, "forward", lambda x, *_, layer=layer, **__: layer.to_out(layer.to_v(x)))
                rest = (args["input"], args["sigma"], args["model_options"])
                weak = samplers.calc_cond_batch(args["model"], [args["cond"]], *rest)[0]
            return args["denoised"] + scale * (args["cond_denoised"] - weak)

        m = model.clone()
        m.set_model_sampler_post_cfg_function(weaken)
        return sampled(host, m, tiny)

    spatial = [block.attn1 for part in blocks for block in part.transformer_blocks]
    temporal = [block.attn1 for part in blocks for block in part.time_stack]
    made = nodes["VSRPAGGuider"].execute(model, positive, 2.0, scale, "all", negative=negative).args[0]
    found = host.sample(made, latent, SEED, STEPS, "euler", "karras", 1.0)["samples"]
    assert relative(found, by_hand(spatial)) < 1e-5
    assert relative(by_hand(spatial + temporal), found) > 1e-4


def test_no_window_crosses_a_scene_cut(host: ModuleType, nodes: dict[str, Any], lite: Any, wired: Any) -> None:
    model = dssag(nodes, tiled(nodes, lite[0]))

    def first_scene(cuts: tuple[int, ...], second: float) -> Tensor:
        positive, negative, latent = part(wired, 6, 24, 16, vsr_cuts=cuts)
        concat = positive[0][1]["concat_latent_image"].clone()
        concat[3:] += second
        positive[0][1]["concat_latent_image"] = concat
        return sampled(host, model, (positive, negative, latent))[:3]

    assert torch.equal(first_scene((3,), 0.0), first_scene((3,), 1.0))
    assert not torch.equal(first_scene((), 0.0), first_scene((), 1.0))


def test_the_host_is_told_the_tiles_size(host: ModuleType, nodes: dict[str, Any], lite: Any, wide: Any) -> None:
    shapes: list[list[int]] = []

    def note(executor: Any, model: Any, shape: Any, *args: Any, **rest: Any) -> Any:
        shapes.append(list(shape))
        return executor(model, shape, *args, **rest)

    for mode, batch in (("lagged", 1), ("lagged", 2), ("synchronous", 1)):
        sampled(host, wrapped(tiled(nodes, lite[0], "sap", mode, batch), "prepare_sampling", note), wide, 1.0, 1)
    assert shapes == [[4, 4, 16, 16], [8, 4, 16, 16], [8, 4, 16, 16]]
