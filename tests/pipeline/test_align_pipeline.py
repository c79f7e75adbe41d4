"""Alignment in the headless job: exactly off at 0, on the whole video's estimate, along a flow that is never held."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.tensors import relative
from vsr_ops.__main__ import main
from vsr_ops.backbones.svd import sigmas
from vsr_ops.checkpoints.svd import SVDWeights, write_svd
from vsr_ops.errors import SettingError
from vsr_ops.flow.field import Flow, estimate_flow, latent_flow, streamed_flow
from vsr_ops.flow.warp import inside
from vsr_ops.pipeline.job import Job
from vsr_ops.pipeline.sampler import Settings, sample
from vsr_ops.pipeline.upscale import upscale
from vsr_ops.sampling.align import MODES, ROUNDS, SCALES, align, bounded, motion_error
from vsr_ops.sampling.noise import frame_noise
from vsr_ops.sampling.propagation import Propagation
from vsr_ops.sampling.samplers import SAMPLERS
from vsr_ops.sampling.tiling import TilePlan, TileSize, plan_tiles
from vsr_ops.video import Frame, VideoInfo, made_info, open_writer, probe, read_frames

if TYPE_CHECKING:
    from vsr_ops.backbones.svd import SVD

TILE = TileSize(8, 8, 4)
ONE = plan_tiles(3, 8, 8, TILE, factor=4)
#: Two tiles by two windows, with overlap.
FOUR = plan_tiles(6, 8, 12, TILE, factor=4)
STRENGTH = {"gradient": 0.05, "propagate": 0.5}


def latents(plan: TilePlan, seed: int = 0) -> Tensor:
    return torch.randn(plan.frames, 4, plan.height, plan.width, generator=torch.Generator().manual_seed(seed))


def flow_of(plan: TilePlan, dx: float = 1.2, dy: float = -0.4) -> Flow:
    """All moves alike, and is seen where it stays inside."""
    there = torch.tensor([dx, dy]).view(1, 2, 1, 1).expand(plan.frames - 1, 2, plan.height, plan.width).clone()
    return Flow(there, -there, inside(there), inside(-there), (), plan.frames)


def moving(frames: int, height: int, width: int) -> Tensor:
    """Frames of a smooth picture that slides by three pixels to the right and two down, each time."""
    coarse = torch.rand(
        1, 3, height // 4 + 2 * frames, width // 4 + 2 * frames, generator=torch.Generator().manual_seed(2)
    )
    large = F.interpolate(coarse, scale_factor=4, mode="bicubic").clamp(0, 1)[0]
    corners = [(2 * (frames - k), 3 * (frames - k)) for k in range(frames)]
    return torch.stack([large[:, y : y + height, x : x + width] for y, x in corners])


def written(path: Path, video: Tensor) -> VideoInfo:
    frames, _, height, width = video.shape
    info = made_info(width, height, frames)
    with open_writer(path, info, size=(height, width), codec="ffv1") as writer:
        for i, frame in enumerate(video):
            writer.write(Frame(frame, None, i))
    return probe(path)


def read(path: Path) -> Tensor:
    return torch.stack([frame.image for frame in read_frames(probe(path))])


@pytest.mark.parametrize("guidance", ["none", "dssag"])
def test_at_zero_it_is_off_bit_for_bit(tiny: SVD, guidance: str) -> None:
    settings = Settings(steps=2, guidance=guidance)
    plain = sample(tiny, latents(FOUR), FOUR, settings)
    for mode in MODES:
        off = replace(settings, align=0.0, align_mode=mode)
        assert torch.equal(sample(tiny, latents(FOUR), FOUR, off, flow=flow_of(FOUR)), plain)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("guidance", ["none", "cfg"])
def test_it_acts_on_the_whole_videos_estimate_after_tiles_and_guidance(tiny: SVD, guidance: str, mode: str) -> None:
    """One step ends in its estimate: aligning that is what an aligned step gives."""
    settings = Settings(steps=1, guidance=guidance, cfg=2.0 if guidance == "cfg" else None)
    flow, lr, aligned = flow_of(FOUR), latents(FOUR), replace(settings, align=STRENGTH[mode], align_mode=mode)
    plain, found = sample(tiny, lr, FOUR, settings), sample(tiny, lr, FOUR, aligned, flow=flow)
    assert torch.equal(found, align(plain, flow, STRENGTH[mode], bounded(sigmas(1)[0], 0.0), mode, ROUNDS))
    assert motion_error(found, flow) < 0.95 * motion_error(plain, flow)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("scale", SCALES)
def test_every_step_goes_on_from_what_was_aligned(tiny: SVD, scale: str, sampler: str) -> None:
    """By hand, with the noise of each step drawn for the frames' numbers in their source."""
    lr, noise, flow, schedule = latents(ONE), latents(ONE, 1), flow_of(ONE), sigmas(3)
    x, step = noise * (schedule[0] ** 2 + 1) ** 0.5, SAMPLERS[sampler]()
    with torch.no_grad():
        for i, (sigma, following) in enumerate(pairwise(schedule)):
            x0, v = tiny.denoise(x, sigma, lr, tiny.context(None), len(lr)), SCALES[scale](sigma, following)
            x0 = align(x0, flow, 0.05, v, rounds=ROUNDS)
            draw = partial(frame_noise, range(40, 43), lr.shape[1:], 9, i + 1)
            x = step(x, x0, sigma, following, draw)
    settings = Settings(steps=3, guidance="none", propagation=Propagation(()), align=0.05, seed=9)
    settings = replace(settings, align_scale=scale, sampler=sampler)
    assert torch.equal(sample(tiny, lr, ONE, settings, noise=noise, flow=flow, first_frame=40), x)
    other = replace(settings, align_scale="bounded" if scale == "ddpm" else "ddpm")
    assert relative(sample(tiny, lr, ONE, other, noise=noise, flow=flow, first_frame=40), x) > 1e-3


def test_a_flow_that_does_not_fit_is_refused_before_anything_is_spent(tiny: SVD) -> None:
    settings, ran = Settings(steps=1, guidance="none", align=0.05), []
    for flow, words in (
        (None, "align is 0.05 without a flow"),
        (flow_of(ONE), "3 frames, the latent video of 6"),
        (flow_of(replace(FOUR, width=8)), "8x8 pixels, the latent video of 12x8"),
    ):
        with pytest.raises(SettingError, match=words):
            sample(tiny, latents(FOUR), FOUR, settings, tick=ran.append, flow=flow)
    assert ran == []


@pytest.mark.parametrize(
    ("align", "mode", "words"),
    [
        (-0.1, "gradient", "lambda is -0.1"),
        (math.nan, "gradient", "lambda is nan"),
        (math.inf, "propagate", "lambda is inf"),
        (1.5, "propagate", "lambda is 1.5"),
        (0.0, "warp", "alignment mode is 'warp'"),
    ],
)
def test_settings_that_cannot_work_are_refused(align: float, mode: str, words: str) -> None:
    with pytest.raises(SettingError, match=words) as caught:
        Settings(align=align, align_mode=mode)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("cuts", [(), (2,), (1, 4)])
def test_the_streamed_flow_is_that_of_the_whole_video(cuts: tuple[int, ...], share: float) -> None:
    """At a size that is grown to whole latents, and beyond them to the UNet's."""
    video = moving(5, 45, 67)
    whole = latent_flow(estimate_flow(video, cuts=cuts), 8, 12, 8, share)
    ticks: list[int] = []
    found = streamed_flow(iter(video), 5, (8, 12), 8, cuts, share, ticks.append)
    for name in ("forward", "backward", "visible_now", "visible_next"):
        assert torch.equal(getattr(found, name), getattr(whole, name)), name
    assert (found.cuts, found.frames, ticks) == (cuts, 5, [1] * 4)
    assert bool(found.visible_now.any()) and float(found.forward.abs().max()) > 0.2


def test_no_frame_is_asked_for_before_its_turn() -> None:
    taken: list[int] = []

    def frames() -> Iterator[Tensor]:
        for i, frame in enumerate(moving(4, 16, 24)):
            taken.append(i)
            yield frame

    streamed_flow(frames(), 4, (2, 3), 8, (), tick=lambda _: taken.append(-1))
    assert taken == [0, 1, -1, 2, -1, 3, -1]


def test_fewer_than_two_frames_have_no_flow() -> None:
    for frames in (0, 1):
        flow = streamed_flow(iter(moving(4, 16, 24)[:frames]), frames, (2, 3), 8, ())
        assert flow.forward.shape == (0, 2, 2, 3) and flow.frames == frames


def test_cuts_outside_the_video_are_refused() -> None:
    with pytest.raises(SettingError, match="scene cuts"):
        streamed_flow(iter(moving(3, 16, 24)), 3, (2, 3), 8, (3,))


def test_a_job_estimates_the_flow_it_needs_and_no_other(tiny: SVD, tmp_path: Path) -> None:
    info = written(tmp_path / "in.mkv", moving(4, 15, 22))
    settings = Settings(steps=1, guidance="none", color="none")
    heard: list[tuple[str, int, int]] = []

    def result(name: str, cuts: tuple[int, ...] = (), **changes: Any) -> Tensor:
        heard.clear()
        out = tmp_path / f"{name}.mkv"
        upscale(
            tiny,
            Job(info, 0, 4, 2),
            out,
            replace(settings, **changes),
            "ffv1",
            cuts=cuts,
            progress=lambda *at: heard.append(at),
        )
        return read(out)

    plain = result("plain")
    assert torch.equal(plain, result("off", align=0.0)) and "flow" not in {stage for stage, _, _ in heard}
    assert not torch.equal(plain, result("on", align=0.3))
    assert [at for at in heard if at[0] == "flow"] == [("flow", i, 3) for i in range(4)]
    assert not torch.equal(plain, result("propagated", align=0.5, align_mode="propagate"))
    # Frames that are all scenes of their own have nothing to follow.
    alone = result("cut", cuts=(1, 2, 3))
    assert torch.equal(alone, result("cut_on", cuts=(1, 2, 3), align=0.3))
    undiffused = result("undiffused", steps=0)
    assert torch.equal(undiffused, result("undiffused_on", steps=0, align=0.3))
    assert "flow" not in {stage for stage, _, _ in heard}


def test_a_single_frame_is_left_alone_with_a_note(tiny: SVD, tmp_path: Path) -> None:
    info = written(tmp_path / "in.mkv", moving(2, 15, 22))
    settings = Settings(steps=1, guidance="none")
    upscale(tiny, Job(info, 0, 1, 2), tmp_path / "a.mkv", settings, "ffv1", cuts=())
    with pytest.warns(UserWarning, match="align: a single frame"):
        upscale(tiny, Job(info, 0, 1, 2), tmp_path / "b.mkv", replace(settings, align=0.3), "ffv1", cuts=())
    assert torch.equal(read(tmp_path / "a.mkv"), read(tmp_path / "b.mkv"))


def test_from_the_command_line(tiny: SVD, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "tiny.safetensors"
    configs = [{k: v for k, v in dict(part.config).items() if not k.startswith("_")} for part in (tiny.unet, tiny.vae)]
    states = [part.state_dict() for part in (tiny.unet, tiny.vae)]
    write_svd(weights, SVDWeights(configs[0], configs[1], None, states[0], states[1], None, (8, 8, 4), {}), "nothing")
    written(tmp_path / "in.mkv", moving(3, 15, 22))

    def run(name: str, *options: str) -> int:
        given = ["--model", str(weights), "--steps", "1", "--guidance", "none", "--scale", "2", "--cuts", "none"]
        given += ["--upscaler", "bicubic", "--codec", "ffv1"]
        return main(["upscale", str(tmp_path / "in.mkv"), str(tmp_path / name), *given, *options])

    assert run("plain.mkv") == run("off.mkv", "--align", "0") == run("on.mkv", "--align", "0.3") == 0
    assert torch.equal(read(tmp_path / "plain.mkv"), read(tmp_path / "off.mkv"))
    assert not torch.equal(read(tmp_path / "plain.mkv"), read(tmp_path / "on.mkv"))
    capsys.readouterr()
    assert run("one.mkv", "--align", "0.3", "--frames", "1:2") == 0
    assert "note: align: a single frame" in capsys.readouterr().err
    for options, words in (
        (("--align", "-0.1"), "lambda is -0.1"),
        (("--align", "2", "--align-mode", "propagate"), "share from 0 to 1"),
        (("--align", "0.1", "--align-mode", "warp"), "alignment mode is 'warp'"),
    ):
        assert run("refused.mkv", *options) == 2
        assert words in capsys.readouterr().err and not (tmp_path / "refused.mkv").exists()
