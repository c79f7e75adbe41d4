"""Tiles, propagation and guidance on the host's Stable Diffusion: frames as a batch."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from tests.support.tensors import relative

from .conftest import NAME
from .small_sd import ALONE, SHAPE, by_hand, one_step, plan_of, wire
from .wiring import (
    TILE,
    block_patches,
    custom_sampled,
    dssag,
    host_pag,
    ksampled,
    no_memory,
    overridden,
    refused,
    sampled,
    tiled,
    wrapped,
)

# --- One tile is no tile ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["SD 1.5", "SD 2.1", "SDXL"])
@pytest.mark.parametrize("propagation", ["none", "sap+tap"])
def test_one_tile_is_the_host_without_the_pack(
    host: ModuleType,
    nodes: dict[str, Any],
    models: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    propagation: str,
) -> None:
    model, alone = models[kind], wire(ALONE)
    one = tiled(nodes, model, propagation, "auto")
    assert torch.equal(sampled(host, one, alone, 1.0), sampled(host, model, alone, 1.0))
    assert relative(sampled(host, one, alone), sampled(host, model, alone)) < 1e-5
    no_memory(monkeypatch)
    assert torch.equal(sampled(host, one, alone), sampled(host, model, alone))


def test_guidance_of_scale_0_is_the_host_without_the_pack(host: ModuleType, nodes: dict[str, Any], sd21: Any) -> None:
    positive, negative, latent = wire(ALONE)
    assert torch.equal(ksampled(dssag(nodes, sd21, 0.0), wire(ALONE)), ksampled(sd21, wire(ALONE)))
    for node, rest in (("VSRPAGGuider", (2.0, 0.0, "middle")), ("VSRSAGGuider", (2.0, 0.0))):
        made = nodes[node].execute(sd21, positive, *rest, negative=negative).args[0]
        assert torch.equal(custom_sampled(sd21, made, latent), sampled(host, sd21, wire(ALONE))), node


def test_windows_alone_change_nothing(host: ModuleType, nodes: dict[str, Any], sd: Any) -> None:
    """Without TAP the frames of a picture model do not see each other."""
    long = wire((9, 4, *TILE[:2]))
    assert relative(sampled(host, tiled(nodes, sd, "none"), long), sampled(host, sd, long)) < 1e-5


# --- Tiles by hand ----------------------------------------------------------------------------------------------------


def test_a_step_is_its_tiles_blended(host: ModuleType, nodes: dict[str, Any], sd: Any) -> None:
    wired = wire()
    x, sigma, found = one_step(host, tiled(nodes, sd, "none"), wired)
    assert relative(found, by_hand(sd, x, sigma, wired[0][0][0])) < 1e-6
    assert relative(found, one_step(host, sd, wired)[2]) > 1e-4


@pytest.mark.parametrize("batch", [3])
def test_tiles_together_or_apart_are_one(host: ModuleType, nodes: dict[str, Any], sd21: Any, batch: int) -> None:
    wired = wire((6, 4, 24, 24))
    apart = sampled(host, dssag(nodes, tiled(nodes, sd21)), wired, 1.0)
    together = sampled(host, dssag(nodes, tiled(nodes, sd21, batch=batch)), wired, 1.0)
    assert relative(together, apart) < 1e-5


# --- Propagation and guidance -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["synchronous", "lagged"])
@pytest.mark.parametrize("kind", ["sap", "tap"])
def test_propagation_acts(host: ModuleType, nodes: dict[str, Any], sd: Any, kind: str, mode: str) -> None:
    plain = sampled(host, tiled(nodes, sd, "none"), wire(), 1.0, 3)
    assert relative(sampled(host, tiled(nodes, sd, kind, mode), wire(), 1.0, 3), plain) > 1e-4


def test_what_tiles_see_of_each_other(host: ModuleType, nodes: dict[str, Any], sd: Any) -> None:
    """Seen in how many keys a 16 x 16 layer has beside its own: SAP's bank in even steps, TAP's frames in odd ones."""
    extra: dict[float, set[int]] = {}

    def watch(func: Callable[..., Tensor], q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if q.shape[1] == TILE[0] * TILE[1] <= k.shape[1]:
            sigma = float(kwargs["transformer_options"]["sigmas"].max())
            extra.setdefault(sigma, set()).add(k.shape[1] - q.shape[1])
        return func(q, k, *args, **kwargs)

    sampled(host, overridden(tiled(nodes, sd, mode="synchronous"), watch), wire(), 1.0, 3)
    sap, tap = {32}, {0, 4 * TILE[0] * TILE[1]}
    assert [extra[sigma] for sigma in sorted(extra, reverse=True)] == [sap, tap, sap]


Extend = Callable[[int, Tensor], Tensor]


def extended(model: Any, extend: Extend) -> Callable[[pytest.MonkeyPatch], None]:
    """Makes the first two and last two self-attention layers see what `extend` makes of a layer's input."""
    unet = model.model.diffusion_model
    blocks = [*unet.input_blocks, *unet.output_blocks]
    outer = [layer.attn1 for block in blocks for part in block for layer in getattr(part, "transformer_blocks", ())]

    def change(patch: pytest.MonkeyPatch) -> None:
        for number, layer in enumerate((*outer[:2], *outer[-2:])):

            def forward(x: Tensor, *_: Any, layer: Any = layer, number: int = number, **__: Any) -> Tensor:
                seen = torch.cat([x, extend(number, x)], dim=1)
                q, k, v = (
                    rearrange(part, "b n (h d) -> b h n d", h=layer.heads)
                    for part in (layer.to_q(x), layer.to_k(seen), layer.to_v(seen))
                )
                weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
                return layer.to_out(rearrange(weights @ v, "b h n d -> b n (h d)"))

            patch.setattr(layer, "forward", forward)

    return change


def test_sap_by_hand(host: ModuleType, nodes: dict[str, Any], sd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fourth token in y and x of all tiles of a frame, for each of them."""
    wired, plan = wire((4, *SHAPE[1:])), plan_of((4, *SHAPE[1:]))
    x, sigma, found = one_step(host, tiled(nodes, sd, "sap", "synchronous"), wired)
    count = len(plan.spatial)

    def extend(number: int, tokens: Tensor) -> Tensor:
        side = math.isqrt(tokens.shape[1])
        grid = rearrange(tokens, "(m t) (y x) c -> m t y x c", m=count, y=side)[:, :, ::4, ::4]
        return rearrange(grid, "m t y x c -> t (m y x) c").repeat(count, 1, 1)

    batch = torch.cat([x[:, :, row.slice, col.slice] for row, col in plan.spatial])
    context = wired[0][0][0].repeat(len(batch), 1, 1)
    with monkeypatch.context() as patch:
        extended(sd, extend)(patch)
        answers = sd.model.apply_model(batch, sigma[:1].expand(len(batch)), None, context, None, {})
    tiling = importlib.import_module(f"{NAME}.vsr_ops.sampling.tiling")
    assert relative(found, tiling.merge(plan, [list(answers.chunk(count))])) < 1e-5


def test_tap_by_hand(host: ModuleType, nodes: dict[str, Any], sd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All four frames of a window, for every frame of the next."""
    shape = (6, 4, 16, 16)
    wired, plan = wire(shape), plan_of(shape)
    x, sigma, found = one_step(host, tiled(nodes, sd, "tap"), wired)
    left: dict[int, Tensor] = {}

    def extend(number: int, tokens: Tensor) -> Tensor:
        before = left.get(number, tokens[:0])
        left[number] = tokens
        return rearrange(before, "t n c -> 1 (t n) c").expand(len(tokens), -1, -1)

    context, answers = wired[0][0][0].repeat(4, 1, 1), list[list[Tensor]]()
    with monkeypatch.context() as patch:
        extended(sd, extend)(patch)
        for window in plan.windows:
            part = x[window.span.slice]
            answers.append([sd.model.apply_model(part, sigma[:4], None, context, None, {})])
    assert relative(found, importlib.import_module(f"{NAME}.vsr_ops.sampling.tiling").merge(plan, answers)) < 1e-5


def test_tap_does_not_cross_a_scene_cut(host: ModuleType, nodes: dict[str, Any], sd21: Any) -> None:
    model = tiled(nodes, sd21, "tap")

    def first_scene(cuts: tuple[int, ...], second: float) -> Tensor:
        positive, negative, latent = wire((8, 4, 16, 16), vsr_cuts=cuts)
        latent["samples"][4:] += second
        return sampled(host, model, (positive, negative, latent), 1.0)[:4]

    assert torch.equal(first_scene((4,), 0.0), first_scene((4,), 9.0))
    assert not torch.equal(first_scene((), 0.0), first_scene((), 9.0))


def known(latent: Any, cuts: tuple[int, ...]) -> Any:
    """A LATENT that Encode Video made of a video of these scenes."""
    module = importlib.import_module(f"{NAME}.nodes.session.known")
    frames, _, rows, cols = latent["samples"].shape
    return {**latent, module.KNOWN: module.KnownVideo((frames, rows, cols), (8 * rows, 8 * cols), cuts)}


def test_a_latent_knows_the_cuts_that_a_text_does_not(
    host: ModuleType, nodes: dict[str, Any], sd21: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def first_scene(cuts: tuple[int, ...], second: float) -> Tensor:
        positive, negative, latent = wire((8, 4, 16, 16))
        start = known(latent, cuts)
        start["samples"][4:] += second
        return sampled(host, tiled(nodes, sd21, "tap", latent=start), (positive, negative, start), 1.0)[:4]

    assert torch.equal(first_scene((4,), 0.0), first_scene((4,), 9.0))
    assert not torch.equal(first_scene((), 0.0), first_scene((), 9.0))
    assert "scene cuts" not in caplog.text
    # Without it nothing knows of any, which is said where there are windows.
    sampled(host, tiled(nodes, sd21, "tap"), wire((4, 4, 16, 16)), 1.0)
    assert "scene cuts" not in caplog.text
    sampled(host, tiled(nodes, sd21, "tap"), wire((8, 4, 16, 16)), 1.0)
    assert "No scene cuts are known of this video" in caplog.text


def test_a_latent_of_another_video_is_refused(host: ModuleType, nodes: dict[str, Any], sd21: Any) -> None:
    model = tiled(nodes, sd21, "tap", latent=known(wire((6, 4, 16, 16))[2], (3,)))
    with refused("Tiled Diffusion", "has 6 frames", "sampled 8"):
        sampled(host, model, wire((8, 4, 16, 16)), 1.0)


def test_wiring_order_does_not_matter(host: ModuleType, nodes: dict[str, Any], sd21: Any) -> None:
    def ours(model: Any) -> Any:
        return dssag(nodes, tiled(nodes, model))

    expected = sampled(host, ours(sd21), wire())
    assert torch.equal(sampled(host, tiled(nodes, dssag(nodes, sd21)), wire()), expected)
    after, before = (sampled(host, model, wire()) for model in (block_patches(ours(sd21)), ours(block_patches(sd21))))
    assert torch.equal(after, before)
    assert relative(after, expected) > 1e-4


@pytest.mark.parametrize("cfg", [1.0, 2.0], ids=["eq. 8", "eq. 9"])
def test_ksampler_and_custom_sampler_agree(host: ModuleType, nodes: dict[str, Any], sd21: Any, cfg: float) -> None:
    positive, negative, latent = wire()
    tiles = tiled(nodes, sd21)
    expected = ksampled(dssag(nodes, tiles), wire(), cfg)
    against = {"negative": negative} if cfg > 1 else {}
    guider = nodes["VSRDSSAGGuider"].execute(tiles, positive, 1.0, 0.5, "ends", **against).args[0]
    assert torch.equal(custom_sampled(tiles, guider, latent), expected)
    assert relative(expected, ksampled(tiles, wire(), cfg)) > 1e-3


def test_branches_together_or_apart_are_one(
    host: ModuleType, nodes: dict[str, Any], sd21: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    branches: list[int] = []

    def count(executor: Any, x: Tensor, *args: Any, **rest: Any) -> Tensor:
        branches.append(x.shape[0] // SHAPE[0])
        return executor(x, *args, **rest)

    model = dssag(nodes, tiled(nodes, wrapped(sd21, "apply_model", count)))
    together = sampled(host, model, wire(), steps=3)
    assert set(branches) == {2}
    branches.clear()
    no_memory(monkeypatch)
    apart = sampled(host, model, wire(), steps=3)
    assert set(branches) == {1}
    assert relative(apart, together) < 1e-5


def test_pag_is_the_hosts(host: ModuleType, nodes: dict[str, Any], sd: Any) -> None:
    """Which on a picture model perturbs the same attention."""
    positive, negative, latent = wire()
    made = nodes["VSRPAGGuider"].execute(sd, positive, 2.0, 100.0, "middle", negative=negative).args[0]
    found = custom_sampled(sd, made, latent)
    assert relative(found, sampled(host, host_pag(sd), wire())) < 1e-5
    assert relative(found, sampled(host, sd, wire())) > 1e-3


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_sag_in_tiles(host: ModuleType, nodes: dict[str, Any], sd21: Any, cfg: float) -> None:
    positive, negative, latent = wire()
    tiles = tiled(nodes, sd21, "sap+tap")
    against = {"negative": negative} if cfg > 1 else {}
    made = nodes["VSRSAGGuider"].execute(tiles, positive, cfg, 5.0, **against).args[0]
    found = custom_sampled(tiles, made, latent)
    assert relative(found, sampled(host, tiles, wire(), cfg)) > 1e-3
