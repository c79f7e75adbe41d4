"""What a plan says against what then happens: by the processor's seconds, which other work beside the tests changes
little. The strict check, on the bundled weights and by the clock on the wall: `python -m benchmarks.plan`."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from tests.support.video_files import picture
from vsr_ops.backbones.svd import SVD
from vsr_ops.modules.dcm import load_dcm
from vsr_ops.modules.refiner import load_refiner
from vsr_ops.pipeline.advice import describe_time
from vsr_ops.pipeline.job import Job
from vsr_ops.pipeline.part_samples import Work
from vsr_ops.pipeline.part_times import PARTS, PartTimes, time_parts, time_while_busy
from vsr_ops.pipeline.parts import PipelineModules
from vsr_ops.pipeline.sampler import SVD_NOISE, NoiseRange, Settings, make_layout, tile_passes
from vsr_ops.pipeline.tile_time import TileSeconds
from vsr_ops.pipeline.upscale import upscale
from vsr_ops.sampling.propagation import Propagation
from vsr_ops.sampling.tiling import TileSize
from vsr_ops.video import Frame, VideoInfo, glance, made_info, open_writer

CPU = torch.device("cpu")


def clip(path: Path, frames: int, height: int, width: int) -> VideoInfo:
    with open_writer(path, made_info(width, height, frames), size=(height, width)) as writer:
        for i in range(frames):
            writer.write(Frame(picture(i, height, width), None, i))
    return glance(path)


def work(model: SVD, job: Job, settings: Settings, parts: PipelineModules | None = None) -> Work:
    layout = make_layout(job, settings, model.tile, model.factor, NoiseRange.of(model))
    return Work(model, job, layout, settings, parts or PipelineModules(), clock=time.process_time)


LAGGED = Propagation(sap_lagged=True)
#: Frames, height and width of the input, settings, and whether there are a DCM and a refiner. Tests have one thread: a
#: busy machine's times are the processor's.
JOBS = {
    "sampling": (6, 8, 16, Settings(steps=4, guidance="dssag", propagation=LAGGED), False),
    "pictures": (4, 24, 24, Settings(steps=1, guidance="none", propagation=LAGGED), True),
    "shifted": (6, 16, 16, Settings(steps=4, guidance="none", layout="shifted", propagation=LAGGED), False),
}


@pytest.mark.parametrize("name", JOBS)
def test_a_plan_comes_true(tiny: SVD, tmp_path: Path, name: str) -> None:
    frames, height, width, settings, around = JOBS[name]
    job = Job(clip(tmp_path / "in.mp4", frames, height, width), 0, frames, 4)
    parts = PipelineModules(load_dcm("lite", CPU), load_refiner("lite", CPU)) if around else PipelineModules()
    planned = (time_while_busy if name == "pictures" else time_parts)(work(tiny, job, settings, parts))
    began = time.process_time()
    upscale(tiny, job, tmp_path / "out.mp4", settings, cuts=(), parts=parts)
    took = time.process_time() - began
    assert set(planned.parts) <= set(PARTS) and sum(planned.stages.values()) == pytest.approx(planned.total)
    assert took / 1.8 < planned.total < took * 1.8, (planned.parts, took)


def test_the_tile_passes_of_a_full_size_job() -> None:
    """1080p, 300 frames, 25 steps, DSSAG at 64x64x14."""
    job = Job(made_info(480, 270, 300), 0, 300, 4)

    def passes(layout: str) -> int:
        settings = Settings(steps=25, guidance="dssag", tile=TileSize(64, 64, 14), layout=layout)
        return tile_passes(make_layout(job, settings, TileSize(64, 64, 14), 8, SVD_NOISE), settings, SVD_NOISE)

    assert passes("paper") == 57_624
    assert passes("balanced") <= 32_000 and passes("shifted") <= 16_500


def test_the_dearest_part_and_what_is_cheaper(tiny: SVD) -> None:
    """In words, of parts whose seconds are known."""
    job = Job(made_info(48, 32, 40), 0, 40, 4)
    settings = Settings(steps=4, guidance="cfg", propagation=LAGGED)
    tile = TileSeconds(tiny.tile, tiny.tile, {"plain": 0.1})
    asked = work(tiny, job, settings)
    sampling = 0.1 * tile_passes(asked.layout, settings, NoiseRange.of(tiny))
    text = describe_time(asked, (), PartTimes({"encode": 10.0, "UNet": sampling, "decode": 20.0}, tile))
    assert f"dearest      UNet, {sampling / (sampling + 30):.0%}; 0.1 s a tile pass" in text
    assert "cheaper      --guidance none: 2.0 times fewer tile passes" in text
    assert "--layout shifted: " in text and "--steps 2: 2.0 times" in text
    assert "machine" not in text
    busy = describe_time(asked, (), PartTimes({"encode": 10.0}, busy=True))
    assert "\nmachine      busy with other work while it was measured: the times are for a quiet one\n" in busy
    refined = describe_time(asked, (), PartTimes({"encode": 10.0, "UNet": 1.0, "refiner": 20.0}, tile))
    assert "dearest      refiner, 65%" in refined and "fewer tile passes" not in refined
    assert "cheaper      --refiner none does without the refiner: 11 s in all" in refined
