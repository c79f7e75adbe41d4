"""What stands around the diffusion in the main job: enlarging once, videos read once, modules in the decoder."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from vsr_ops.errors import SettingError
from vsr_ops.image.resize import resize_bicubic
from vsr_ops.modules.capm import CAPM, SVD_UNET, SVD_VAE, CAPMShape, decoder_widths
from vsr_ops.modules.capm_file import CAPMs
from vsr_ops.modules.cfw import CFW, CFWShape
from vsr_ops.modules.compression import CompressionHead, HeadShape
from vsr_ops.modules.enlarging import Enlarging
from vsr_ops.modules.refiner import Refiner, RefinerShape
from vsr_ops.modules.stam import STAM, STAMShape
from vsr_ops.pipeline.job import Job, UpscaledFrames
from vsr_ops.pipeline.parts import CAPMSettings, PipelineModules, Rolling
from vsr_ops.pipeline.sampler import Settings
from vsr_ops.pipeline.upscale import upscale
from vsr_ops.video import Frame, made_info, open_writer, probe, read_frames

if TYPE_CHECKING:
    from vsr_ops.backbones.svd import SVD

QUICK = Settings(steps=1, guidance="none", color="none")


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Five frames of 12 x 20, in colour and with alpha."""
    video = torch.rand(5, 4, 12, 20, generator=torch.Generator().manual_seed(4))
    info = made_info(20, 12, 5, Fraction(24))
    with open_writer(tmp_path / "in", info, size=(12, 20), codec="png8") as writer:
        for index, frame in enumerate(video):
            writer.write(Frame(frame[:3], frame[3:], index))
    return Job(probe(tmp_path / "in"), 0, 5, 2)


def counted(calls: list[int]) -> Callable[[Tensor], Tensor]:
    """An upscaler that notes how many frames it is given."""

    def upscale_fn(frames: Tensor) -> Tensor:
        calls.append(frames.shape[0])
        return resize_bicubic(frames, (24, 40)).clamp(0, 1) ** 2

    return upscale_fn


def test_each_frame_is_enlarged_once_and_read_again_the_same(job: Job, tmp_path: Path) -> None:
    calls: list[int] = []
    upscale_fn = counted(calls)
    upscaled = UpscaledFrames(job, Enlarging(upscale_fn), tmp_path)
    first = next(upscaled())
    whole, again = list(upscaled()), list(upscaled())
    assert calls == [1] * 5
    for frame, other, source in zip(whole, again, job.read(), strict=True):
        assert torch.equal(frame.image, other.image) and frame.pts == other.pts
        assert frame.alpha is not None and other.alpha is not None and torch.equal(frame.alpha, other.alpha)
        assert (frame.image - upscale_fn(source.image[None])[0]).abs().max() <= 0.51 / 65535
    assert torch.equal(first.image, whole[0].image)
    upscaled.close()


def test_two_readers_at_once_see_the_same(job: Job, tmp_path: Path) -> None:
    upscaled = UpscaledFrames(job, Enlarging(counted([])), tmp_path)
    for one, other in zip(upscaled(), upscaled(), strict=True):
        assert torch.equal(one.image, other.image)


def test_a_full_disk_costs_time_and_changes_nothing(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [frame.image for frame in UpscaledFrames(job, Enlarging(counted([])), tmp_path)()]
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 100}))
    calls: list[int] = []
    with pytest.warns(UserWarning, match="enlarged anew"):
        upscaled = UpscaledFrames(job, Enlarging(counted(calls)), tmp_path)
    anew = [frame.image for _ in range(2) for frame in upscaled()]
    assert len(calls) == 10 and all(torch.equal(a, b) for a, b in zip(anew, kept * 2, strict=True))


def test_bicubic_is_exact_and_leaves_no_file(job: Job, tmp_path: Path) -> None:
    upscaled = UpscaledFrames(job, Enlarging(), tmp_path / "is not there")
    for frame, source in zip(upscaled(), job.read(), strict=True):
        assert torch.equal(frame.image, resize_bicubic(source.image[None], (24, 40))[0].clamp(0, 1))


def test_a_rolling_video_is_the_video_and_holds_a_window() -> None:
    video = torch.rand(9, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    asked: list[int] = []

    def frames():
        for index, frame in enumerate(video):
            asked.append(index)
            yield frame

    rolling = Rolling(frames(), 9, (4, 4))
    assert rolling.shape == video.shape
    for start, stop in ((0, 4), (3, 7), (7, 9)):
        assert torch.equal(rolling[start:stop], video[start:stop])
    assert asked == list(range(9))
    with pytest.raises(SettingError, match="frame 2 was read already"):
        rolling[2:4]


def frames_of(path: Path) -> Tensor:
    return torch.stack([frame.image for frame in read_frames(probe(path))])


def stirred(module: torch.nn.Module) -> torch.nn.Module:
    """With weights that do something."""
    rng = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        parameter.data = parameter + 0.3 * torch.randn(parameter.shape, generator=rng)
    return module


def capms(model: SVD) -> CAPMs:
    shapes = {
        SVD_UNET: decoder_widths(model.unet.config["block_out_channels"]),
        SVD_VAE: decoder_widths(model.vae.config["block_out_channels"]),
    }
    unet, vae = (CAPM(CAPMShape(name, widths, 2, 4, 4, 2)) for name, widths in shapes.items())
    return CAPMs(unet, vae)


def test_parts_that_are_fresh_or_off_change_nothing(tiny: SVD, job: Job, tmp_path: Path) -> None:
    def result(name: str, parts: PipelineModules | None) -> Tensor:
        upscale(tiny, job, tmp_path / name, QUICK, "png", cuts=(), parts=parts)
        return frames_of(tmp_path / name)

    plain = result("plain", None)
    assert torch.equal(result("fresh", PipelineModules(prompts=CAPMSettings(capms(tiny), crf=20))), plain)
    off = CAPMs(stirred(capms(tiny).unet), stirred(capms(tiny).vae))  # type: ignore[arg-type]
    assert torch.equal(result("off", PipelineModules(prompts=CAPMSettings(off, strength=0.0, crf=20))), plain)
    assert not torch.equal(result("on", PipelineModules(prompts=CAPMSettings(off, crf=20))), plain)


def test_prompts_follow_what_they_are_told(tiny: SVD, job: Job, tmp_path: Path) -> None:
    both = CAPMs(stirred(capms(tiny).unet))  # type: ignore[arg-type]

    def result(name: str, crf: float) -> Tensor:
        upscale(
            tiny,
            job,
            tmp_path / name,
            QUICK,
            "png",
            cuts=(),
            parts=PipelineModules(prompts=CAPMSettings(both, crf=crf)),
        )
        return frames_of(tmp_path / name)

    assert not torch.equal(result("soft", 15), result("hard", 40))


def test_levels_are_the_heads_unless_told(job: Job) -> None:
    head = CompressionHead(HeadShape((8, 8, 8), (0, 0, 0)))
    estimated = CAPMSettings(CAPMs(), head=head).levels(job)
    assert estimated is not None and estimated.shape == (5,) and bool(((estimated >= 0) & (estimated <= 1)).all())
    told = CAPMSettings(CAPMs(), head=head, crf=51).levels(job)
    assert told is not None and torch.equal(told, torch.ones(5))
    assert CAPMSettings(CAPMs()).levels(job) is None
    with pytest.raises(SettingError, match="crf is 60"):
        CAPMSettings(CAPMs(), crf=60)


def test_modules_of_another_model_are_refused_before_any_work(tiny: SVD, job: Job, tmp_path: Path) -> None:
    unet = CAPM(CAPMShape(SVD_UNET, {"up_blocks.0": 8}, 2, 4, 4, 2))
    vae = CAPM(CAPMShape(SVD_VAE, {"up_blocks.0": 8}, 2, 4, 4, 2))
    wrong = {
        "a UNet's CAPM": PipelineModules(prompts=CAPMSettings(CAPMs(unet))),
        "a VAE's CAPM": PipelineModules(prompts=CAPMSettings(CAPMs(vae=vae))),
        "STAM": PipelineModules(stam=STAM(STAMShape((("mid_0", 8),), 8, backbone="sd"))),
        "CFW": PipelineModules(cfw=CFW(CFWShape((1,), (8,), 0, 4, backbone="sd"))),
    }
    for name, parts in wrong.items():
        stages: list[str] = []
        with pytest.raises(SettingError, match="made for"):
            upscale(
                tiny,
                job,
                tmp_path / "out",
                QUICK,
                "png",
                cuts=(),
                parts=parts,
                progress=lambda stage, done, total, stages=stages: stages.append(stage),
            )
        assert not stages, name
    with pytest.raises(SettingError, match="strength is 3"):
        CAPMSettings(CAPMs(), strength=3.0)


def test_satecos_w_is_refused_before_any_work() -> None:
    for refiner in (None, Refiner(RefinerShape(8, 1))):
        with pytest.raises(SettingError, match=r"SATeCo's w is 0\.5"):
            PipelineModules(refiner=refiner, sateco_w=0.5)
    PipelineModules(refiner=Refiner(RefinerShape(8, 1, form="paper")), sateco_w=0.5)
    with pytest.raises(SettingError, match="SATeCo's w is nan"):
        PipelineModules(refiner=Refiner(RefinerShape(8, 1, form="paper")), sateco_w=float("nan"))


def test_a_weight_outside_its_range_is_refused() -> None:
    with pytest.raises(SettingError, match=r"w is 1\.5"):
        PipelineModules(decode_w=1.5)
