"""The command line end to end on a real small SVD: what must work, and what must be refused in one line."""

from __future__ import annotations

import errno
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.video_files import picture
from vsr_ops.__main__ import main
from vsr_ops.backbones.svd import SVD, load_svd
from vsr_ops.checkpoints.svd import LITE, SVDWeights, write_svd
from vsr_ops.cli import commands
from vsr_ops.modules.dcm import load_dcm
from vsr_ops.modules.enlarging import Enlarging
from vsr_ops.modules.refiner import LITE_REFINER
from vsr_ops.modules.video_upscaler import load_video_upscaler
from vsr_ops.pipeline.job import Job
from vsr_ops.pipeline.sampler import Settings
from vsr_ops.pipeline.upscale import upscale
from vsr_ops.video import Frame, Writer, made_info, open_writer, probe, read_frames


@pytest.fixture(scope="session")
def weights(tiny: SVD, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SVD as a file of the pack."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    configs = [{k: v for k, v in dict(part.config).items() if not k.startswith("_")} for part in (tiny.unet, tiny.vae)]
    tile = (tiny.tile.height, tiny.tile.width, tiny.tile.frames)
    states = [part.state_dict() for part in (tiny.unet, tiny.vae)]
    write_svd(path, SVDWeights(configs[0], configs[1], None, states[0], states[1], None, tile, {}), "nothing")
    return path


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """Three frames of 20x14, so that every size needs padding."""
    return make_clip(tmp_path / "in.mp4", 3, 14, 20)


def make_clip(path: Path, frames: int, height: int, width: int) -> Path:
    with open_writer(path, made_info(width, height, frames, Fraction(25)), size=(height, width)) as writer:
        for i in range(frames):
            writer.write(Frame(picture(i, height, width), None, i))
    return path


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


QUICK = ("--steps", "1", "--guidance", "none", "--scale", "2", "--cuts", "none")


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: object) -> str:
    """Runs a command that must fail: exit code 2, one line, nothing new in the folder. Returns the line."""
    before = sorted(folder.iterdir())
    assert run(*arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and lines[-1] == errors[0], lines
    assert sorted(folder.iterdir()) == before
    return errors[0]


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 14, 20), (3, 15, 21), (6, 16, 40)])
def test_every_size_and_length_comes_out_exactly(
    weights: Path, tmp_path: Path, frames: int, height: int, width: int
) -> None:
    source = make_clip(tmp_path / "in.mp4", frames, height, width)
    assert run("upscale", source, tmp_path / "out.mp4", "--model", weights, *QUICK) == 0
    info = probe(tmp_path / "out.mp4")
    assert (info.frames, info.height, info.width, info.rate) == (frames, 2 * height, 2 * width, 25)


def test_defaults_run_with_propagation_and_guidance(weights: Path, clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.mkv"
    assert run("upscale", clip, out, "--model", weights, "--steps", 2, "--scale", 5, "--frames", "1:3") == 0
    info = probe(out)
    assert (info.frames, info.height, info.width) == (2, 70, 100)


def test_same_seed_same_video_other_seed_other_video(weights: Path, clip: Path, tmp_path: Path) -> None:
    def result(name: str, seed: int) -> Tensor:
        assert run("upscale", clip, tmp_path / name, "--model", weights, "--seed", seed, *QUICK) == 0
        return torch.stack([frame.image for frame in read_frames(probe(tmp_path / name))])

    first = result("a.mkv", 1)
    assert torch.equal(first, result("b.mkv", 1))
    assert not torch.equal(first, result("c.mkv", 2))


def test_pictures_with_alpha_and_grey_keep_their_kind(weights: Path, tmp_path: Path) -> None:
    Image.new("RGBA", (20, 14), (200, 100, 50, 128)).save(tmp_path / "alpha.png")
    Image.new("L", (20, 14), 90).save(tmp_path / "grey.png")
    for name in ("alpha", "grey"):
        assert run("upscale", tmp_path / f"{name}.png", tmp_path / f"{name}_x2.png", "--model", weights, *QUICK) == 0
    with Image.open(tmp_path / "alpha_x2.png") as image:
        assert image.size == (40, 28) and "A" in image.getbands()
        assert abs(image.convert("RGBA").getpixel((20, 14))[3] - 128) <= 1
    with Image.open(tmp_path / "grey_x2.png") as image:
        assert image.size == (40, 28)


def test_plan_prints_the_numbers(weights: Path, clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", clip, "--model", weights, "--sap-mode", "lagged", "--tile", "8x8x2") == 0
    text = capsys.readouterr().out
    assert "output       80x56; latents 12x8" in text
    assert "1x2x2 of 8x8x2" in text and "lagged banks" in text
    # 4 tiles in 25 steps, all but the last, where gamma is 0, in two passes.
    assert "196 tile passes" in text and "scenes       1, all 3 frames looked at" in text
    assert "time         about" in text and "dearest      " in text
    assert "cheaper      --guidance none: 2.0 times fewer tile passes (100)" in text


def test_the_time_left_is_planned_before_the_work(
    weights: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a job that is worth it: here every one is. What is measured leaves no trace in the result."""
    assert run("upscale", clip, tmp_path / "a.mkv", "--model", weights, *QUICK) == 0
    assert "left in all" not in capsys.readouterr().err
    monkeypatch.setattr(commands, "SMALL", 0)
    assert run("upscale", clip, tmp_path / "b.mkv", "--model", weights, *QUICK) == 0
    said = capsys.readouterr().err
    assert "about " in said and "most of it" in said and said.count("left in all") >= 3
    assert torch.equal(frames_of(tmp_path / "a.mkv"), frames_of(tmp_path / "b.mkv"))


def frames_of(path: Path) -> Tensor:
    return torch.stack([frame.image for frame in read_frames(probe(path))])


def test_bicubic_and_no_refiner_are_the_bare_job(tiny: SVD, weights: Path, clip: Path, tmp_path: Path) -> None:
    bare = ("--upscaler", "bicubic", "--refiner", "none", "--codec", "ffv1")
    assert run("upscale", clip, tmp_path / "a.mkv", "--model", weights, *bare, *QUICK) == 0
    settings = Settings(steps=1, guidance="none")
    job = Job(probe(clip), 0, 3, 2)
    # The file's weights, not the fixture's own: the file holds them in half precision.
    model = load_svd(str(weights), torch.device("cpu"), torch.float32)
    upscale(model, job, tmp_path / "b.mkv", settings, "ffv1", cuts=())
    assert settings.color == "none" and torch.equal(frames_of(tmp_path / "a.mkv"), frames_of(tmp_path / "b.mkv"))


def test_the_upscaler_comes_before_and_the_refiner_after(weights: Path, clip: Path, tmp_path: Path) -> None:
    """At w = 1 the result is the upscaled input, bit for bit what the upscaler alone gives."""
    dcm = load_dcm("lite", torch.device("cpu"))
    upscalers = {"dcm": Enlarging(dcm), "video": Enlarging(dcm, load_video_upscaler("lite")), "bicubic": Enlarging()}
    results: dict[str, Tensor] = {}
    for name, enlarging in upscalers.items():
        out = tmp_path / f"{name}.mkv"
        parts = ("--upscaler", name, "--refiner", "lite", "--refiner-w", 1, "--codec", "ffv1")
        assert run("upscale", clip, out, "--model", weights, *parts, *QUICK) == 0
        results[name] = frames_of(out)
        expected = torch.stack(list(enlarging(frames_of(clip), (28, 40))))
        assert (results[name] - expected).abs().max() < 1 / 254
    assert not any(torch.equal(results["dcm"], results[name]) for name in ("bicubic", "video"))
    off = ("--upscaler", "video", "--upscaler-strength", 0, "--refiner", "lite", "--refiner-w", 1, "--codec", "ffv1")
    assert run("upscale", clip, tmp_path / "off.mkv", "--model", weights, *off, *QUICK) == 0
    assert torch.equal(frames_of(tmp_path / "off.mkv"), results["dcm"])
    assert run("upscale", clip, tmp_path / "w0.mkv", "--model", weights, "--refiner", "lite", *QUICK) == 0
    assert not torch.equal(frames_of(tmp_path / "w0.mkv"), results["dcm"])


def test_parts_of_another_kind_are_refused(weights: Path, clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ("upscale", clip, clip.parent / "out.mp4", "--model", weights)
    assert "not an upscale model" in refused(capsys, clip.parent, *base, "--upscaler", LITE_REFINER)
    line = refused(capsys, clip.parent, *base, "--refiner", LITE)
    assert "'svd'" in line and "'refiner'" in line
    torch.save({"a": torch.zeros(1)}, clip.parent / "pickle.pth")
    pickled = clip.parent / "pickle.pth"
    assert "not an upscale model" in refused(capsys, clip.parent, *base, "--upscaler", pickled)
    assert "a pickle" in refused(capsys, clip.parent, *base, "--refiner", pickled)
    line = refused(capsys, clip.parent, *base, "--upscaler", "bicubic", "--upscaler-base", "dcm")
    assert "--upscaler-base is dcm" in line and "a video upscaler" in line
    for option in ("--capm", "--stam"):
        assert "'refiner'" in refused(capsys, clip.parent, *base, option, LITE_REFINER)
    assert "'refiner'" in refused(capsys, clip.parent, *base, "--decode-w", "0.5", "--cfw", LITE_REFINER)
    assert "'refiner'" in refused(capsys, clip.parent, *base, "--control", LITE_REFINER)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--scale", "0", "scale is 0"),
        ("--scale", "nan", "scale is nan"),
        ("--steps", "-1", "steps is -1"),
        ("--tile", "0x8x4", "tile is 0x8x4"),
        ("--tile", "9x8x4", "multiples of 4"),
        ("--tile", "8x8", "HEIGHTxWIDTHxFRAMES"),
        ("--overlap", "0.8", "overlap is 0.8"),
        ("--overlap", "-0.1", "overlap is -0.1"),
        ("--guidance", "magic", "guidance is 'magic'"),
        ("--propagation", "magic", "propagation is 'magic'"),
        ("--color", "magic", "color is 'magic'"),
        ("--decode-w", "1.5", "w is 1.5"),
        ("--capm-strength", "3", "strength is 3"),
        ("--upscaler-strength", "3", "strength is 3"),
        ("--crf", "60", "crf is 60"),
        ("--sap-mode", "magic", "SAP mode is 'magic'"),
        ("--codec", "magic", "magic"),
        ("--cfg", "-1", "cfg is -1"),
        ("--tap-frames", "0", "TAP frames is 0"),
        ("--denoise", "0", "denoise is 0"),
        ("--frames", "2:1", "frames 2:1"),
        ("--frames", "0:9", "it has 3 frames"),
        ("--frames", "x", "expected A:B"),
        ("--cuts", "9", "scene cuts"),
        ("--cuts", "soon", "cuts is 'soon'"),
        ("--dtype", "int3", "dtype is 'int3'"),
        ("--device", "toaster", "toaster"),
        ("--model", "nowhere.safetensors", "no such file"),
        ("--upscaler", "nowhere.safetensors", "nowhere.safetensors: no such file"),
        ("--refiner", "nowhere.safetensors", "nowhere.safetensors: no such file"),
        ("--refiner-w", "1.5", "refiner w is 1.5"),
        ("--refiner-w", "-0.1", "refiner w is -0.1"),
        ("--refiner-w", "nan", "refiner w is nan"),
    ],
)
def test_settings_are_refused_by_name(
    weights: Path, clip: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, words: str
) -> None:
    base = ("upscale", clip, clip.parent / "out.mp4", "--model", weights)
    assert words in refused(capsys, clip.parent, *base, option, value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_one_is_refused(weights: Path, clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, clip.parent, "upscale", clip, clip.parent / "o.mp4", "--model", weights, "--device", "cuda")
    assert "cuda" in line and "--device cpu" in line


def test_inputs_are_refused(weights: Path, clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = clip.parent
    (folder / "text.mp4").write_text("not a video")
    (folder / "cut.mp4").write_bytes(clip.read_bytes()[:400])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "nothing").mkdir()
    for name in ("missing.mp4", "text.mp4", "cut.mp4", "empty.mp4", "nothing"):
        line = refused(capsys, folder, "upscale", folder / name, folder / "out.mp4", "--model", weights)
        assert name in line


def test_outputs_are_refused_before_anything_is_spent(
    weights: Path, clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = clip.parent
    (folder / "there.mp4").write_bytes(b"precious")
    command = ("upscale", clip)
    model = ("--model", weights)
    assert "overwrite" in refused(capsys, folder, *command, folder / "there.mp4", *model)
    assert (folder / "there.mp4").read_bytes() == b"precious"
    assert "nowhere" in refused(capsys, folder, *command, folder / "nowhere" / "out.mp4", *model)
    assert "input" in refused(capsys, folder, *command, clip, "--overwrite", *model)


def test_checkpoints_are_refused(weights: Path, clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = clip.parent
    torch.save({"a": torch.zeros(1)}, folder / "pickle.ckpt")
    save_file({"model.diffusion_model.out.0.weight": torch.zeros(3)}, folder / "other.safetensors")
    (folder / "short.safetensors").write_bytes(weights.read_bytes()[:100_000])
    state = load_file(weights)
    state["model.diffusion_model.out.0.weight"] = torch.full_like(
        state["model.diffusion_model.out.0.weight"], torch.nan
    )
    from safetensors import safe_open

    with safe_open(weights, "pt") as file:
        save_file(state, folder / "nan.safetensors", file.metadata())
    for name in ("pickle.ckpt", "other.safetensors", "short.safetensors", "nan.safetensors"):
        assert name in refused(capsys, folder, "upscale", clip, folder / "out.mp4", "--model", folder / name)


def test_a_full_disk_leaves_nothing(
    weights: Path, clip: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vsr_ops.video import sinks

    def full(self: object, frame: Frame) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sinks.VideoSink, "write", full)
    line = refused(capsys, clip.parent, "upscale", clip, clip.parent / "out.mp4", "--model", weights, *QUICK)
    assert "disk is full" in line


def test_ctrl_c_stops_between_two_unet_calls_and_leaves_nothing(
    weights: Path, clip: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    denoise = SVD.denoise

    def interrupted(self: SVD, *args: object, **kwargs: object) -> Tensor:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return denoise(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(SVD, "denoise", interrupted)
    before = sorted(clip.parent.iterdir())
    assert run("upscale", clip, clip.parent / "out.mp4", "--model", weights, "--steps", 4, "--scale", 2) == 130
    assert len(calls) == 2 and sorted(clip.parent.iterdir()) == before
    assert "Traceback" not in capsys.readouterr().err


def test_nan_while_sampling_names_step_and_tile(
    weights: Path, clip: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    denoise = SVD.denoise

    def broken(self: SVD, x: Tensor, sigma: float, *args: object, **kwargs: object) -> Tensor:
        out = denoise(self, x, sigma, *args, **kwargs)  # type: ignore[arg-type]
        return out * torch.nan if sigma < 100 else out

    monkeypatch.setattr(SVD, "denoise", broken)
    base = ("upscale", clip, clip.parent / "out.mp4", "--model", weights, "--steps", 3, "--scale", 2, "--cuts", "none")
    line = refused(capsys, clip.parent, *base)
    assert "step 2" in line and "tile 1 of 1" in line


def test_a_failing_write_keeps_the_older_result(
    weights: Path, clip: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (clip.parent / "out.mp4").write_bytes(b"older")

    def stop(self: Writer, frame: Frame) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Writer, "write", stop)
    base = ("upscale", clip, clip.parent / "out.mp4", "--model", weights, "--overwrite", *QUICK)
    assert run(*base) == 130
    assert (clip.parent / "out.mp4").read_bytes() == b"older"
