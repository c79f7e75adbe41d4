"""Which steps a run takes and which of them are guided: whole and at every step as before, else as counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
import torch

from tests.support.tensors import latents, relative
from vsr_ops.backbones.sd import model_sigmas, sigma_at, time_at
from vsr_ops.backbones.svd import sigmas
from vsr_ops.errors import SettingError
from vsr_ops.pipeline.plan_cost import describe_plan
from vsr_ops.pipeline.sampler import (
    SVD_NOISE,
    Settings,
    guidance_acts,
    noise_schedule,
    sample,
    strengths,
    total_steps,
    unet_calls,
)
from vsr_ops.pipeline.tile_time import TileSeconds
from vsr_ops.sampling.calls import Call
from vsr_ops.sampling.guidance import GUIDANCE
from vsr_ops.sampling.interval import GuidanceInterval
from vsr_ops.sampling.layouts import TileLayout, lay_out
from vsr_ops.sampling.propagation import Propagation
from vsr_ops.sampling.tiling import TileSize, plan_tiles

if TYPE_CHECKING:
    from vsr_ops.backbones.svd import SVD

TILE = TileSize(8, 8, 4)
ONE = plan_tiles(3, 8, 8, TILE, factor=4)
FOUR = plan_tiles(6, 8, 12, TILE, factor=4)
OFF = Propagation(())


def test_the_whole_interval_at_every_step_is_what_it_was(tiny: SVD) -> None:
    settings = Settings(steps=2, guidance="dssag", propagation=Propagation())
    whole = replace(settings, interval=GuidanceInterval(0.002, 700.5))
    assert torch.equal(*(sample(tiny, latents(FOUR), FOUR, each) for each in (settings, whole)))


def test_nothing_is_added_where_gamma_is_0() -> None:
    """At the last step gamma is 0: DSSAG adds nothing there, nor does what it kept."""
    settings = Settings(steps=4, guidance="dssag", interval=GuidanceInterval(every=100))
    assert guidance_acts(settings) == ["new", "kept", "kept", "off"]
    assert [GUIDANCE["dssag"].passes(power) for power in strengths(settings)] == [2, 1, 1, 1]


@pytest.mark.parametrize(
    ("guidance", "cfg", "interval"),
    [
        ("dssag", None, GuidanceInterval(every=2)),
        ("cfg", 2.0, GuidanceInterval(0.1, 100.0)),
        ("sag", 2.0, GuidanceInterval(0.01, 600.0, 3)),
    ],
)
def test_the_plan_is_what_runs(tiny: SVD, guidance: str, cfg: float | None, interval: GuidanceInterval) -> None:
    settings = Settings(steps=5, guidance=guidance, cfg=cfg, propagation=OFF, interval=interval)
    ran: list[Call] = []
    found = sample(tiny, latents(ONE), ONE, settings, tick=ran.append)
    assert len(ran) == unet_calls(ONE, settings)
    by_step = Counter(call.step.index for call in ran)
    passes = [GUIDANCE[guidance].passes(power) for power in strengths(settings)]
    assert [by_step[step] for step in range(5)] == passes
    full = GUIDANCE[guidance].passes(strengths(replace(settings, interval=GuidanceInterval()))[0])
    assert [count == full for count in passes] == [act == "new" for act in guidance_acts(settings)]
    assert 0 < passes.count(full) < 4
    for other in (replace(settings, interval=GuidanceInterval()), Settings(steps=5, guidance="none", propagation=OFF)):
        assert relative(found, sample(tiny, latents(ONE), ONE, other)) > 1e-4


def test_what_cannot_guide_is_refused() -> None:
    with pytest.raises(SettingError, match=r"guidance is none: expected a guidance"):
        Settings(guidance="none", interval=GuidanceInterval(every=2))
    between = Settings(steps=4, guidance="dssag", interval=GuidanceInterval(0.05, 0.06))
    for ask in (strengths, lambda settings: unet_calls(ONE, settings)):
        with pytest.raises(SettingError, match=r"0\.05 to 0\.06.*none of the run's noise levels.*700 to 0\.002"):
            ask(between)


def test_tile_passes_at_full_size() -> None:
    """1080p, 300 frames, 25 steps, DSSAG at stock SVD's tile; the interval and the reuse are the measured ones."""

    def passes(layout: str, interval: GuidanceInterval) -> int:
        settings = Settings(steps=25, guidance="dssag", interval=interval, propagation=OFF)
        tiles = lay_out(layout, 300, 136, 240, TileSize(64, 64, 14)).over(total_steps(settings, SVD_NOISE))
        # One call a tile without synchronous SAP.
        return unet_calls(tiles, settings)

    everywhere, measured = GuidanceInterval(), GuidanceInterval(0.1, 12.0, 2)
    found = {(layout, i): passes(layout, i) for layout in ("paper", "shifted") for i in (everywhere, measured)}
    print({f"{layout}, {i.every}": count for (layout, i), count in found.items()})
    assert found["paper", everywhere] == 57624
    assert found["shifted", everywhere] <= 16500 and found["shifted", measured] <= 10000


def test_the_preview_counts_guided_steps() -> None:
    layout = TileLayout.still(FOUR)
    tile = TileSeconds(FOUR.tile_size(0), FOUR.tile_size(0), {"plain": 0.5})
    memory = {"lagged": 0, "tap": 0, "weights": 1, "activations": 1}
    for guided, passes in ((None, 20), (10, 20), (11, 20), (4, 14), (1, 11)):
        text = describe_plan(layout, OFF, 10, 2, guided=guided, tile=tile, others={}, **memory)
        assert f"UNet         {passes * FOUR.tiles} tile passes" in text


# --- Where a run starts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 4, 10])
def test_a_start_sigma_is_the_first_of_all_the_steps(steps: int) -> None:
    schedule = noise_schedule(Settings(steps=steps, start_sigma=3.5))
    assert len(schedule) == steps + 1 and schedule[0] == pytest.approx(3.5) and schedule[-1] == 0
    assert steps == 1 or schedule[-2] == pytest.approx(0.002)
    # Karras' spacing, from there.
    roots = [level ** (1 / 7) for level in schedule[:-1]]
    gaps = [a - b for a, b in pairwise(roots)]
    assert all(gap == pytest.approx(gaps[0], rel=1e-3) for gap in gaps)
    assert noise_schedule(Settings(steps=steps, start_sigma=700.0)) == sigmas(steps)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_a_timestep_is_that_of_its_noise_level(zero_snr: bool) -> None:
    for time in (0.0, 0.4, 1.0, 250.5, 998.0, 998.7, 999.0):
        assert time_at(sigma_at(time, zero_snr), zero_snr) == pytest.approx(time, abs=1e-6)
    assert time_at(float(model_sigmas(zero_snr)[500]), zero_snr) == pytest.approx(500)


def test_a_run_from_a_sigma_starts_at_the_lr_latent(tiny: SVD) -> None:
    """One step from next to no noise gives it back; a partial denoise at the same levels is the same run."""
    lr = latents(ONE)
    first = lr * tiny.scaling_factor
    low = Settings(steps=1, guidance="none", start_sigma=0.0021)
    assert relative(sample(tiny, lr, ONE, low), first) < 0.02
    partial = Settings(steps=3, guidance="none", denoise=0.5)
    start = noise_schedule(partial)[0]
    same = replace(partial, denoise=1.0, start_sigma=start)
    assert noise_schedule(same) == pytest.approx(noise_schedule(partial), rel=1e-4)
    assert relative(sample(tiny, lr, ONE, same), sample(tiny, lr, ONE, partial)) < 1e-3
    # From the model's most noise there is hardly an LR latent left to start from, but what there is counts.
    top = [Settings(steps=2, guidance="none", start_sigma=sigma) for sigma in (None, 700.0)]
    assert 0 < relative(*(sample(tiny, lr, ONE, each) for each in top)) < 0.05


def test_a_start_that_cannot_be_is_refused() -> None:
    with pytest.raises(SettingError, match=r"start sigma is 2\.0 and denoise 0\.5: expected one of them"):
        Settings(start_sigma=2.0, denoise=0.5)
    for bad in (701.0, 0.001, 0.0, -1.0, float("nan")):
        with pytest.raises(SettingError, match=r"start sigma is .*: expected a noise level.*0\.002.*700"):
            noise_schedule(Settings(start_sigma=bad))
