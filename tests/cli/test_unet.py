"""`--unet`: a UNet alone gives the same video as the same weights in a file of ours, and what it is refused with."""

from __future__ import annotations

import json
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel
from torch import Tensor

from tests.support.video_files import picture
from vsr_ops.__main__ import main
from vsr_ops.backbones.svd import SVD
from vsr_ops.checkpoints.svd import LITE, SVDWeights, read_svd, write_svd
from vsr_ops.cli.options import make_parser
from vsr_ops.cli.settings import files_read
from vsr_ops.video import Frame, made_info, open_writer, probe, read_frames

QUICK = ("--steps", "1", "--guidance", "none", "--scale", "2", "--cuts", "none", "--frames", "0:2")


def weights_of(tiny: SVD, scale: float) -> SVDWeights:
    unet, vae = ({k: v for k, v in dict(part.config).items() if k[0] != "_"} for part in (tiny.unet, tiny.vae))
    # Halves, so that a file in half precision holds the same.
    state = {key: (value * scale).half().float() for key, value in tiny.unet.state_dict().items()}
    tile = (tiny.tile.height, tiny.tile.width, tiny.tile.frames)
    return SVDWeights(unet, vae, None, state, tiny.vae.state_dict(), None, tile, {})


@pytest.fixture(scope="session")
def tuned(tiny: SVD) -> SVDWeights:
    return weights_of(tiny, 1.0)


@pytest.fixture(scope="session")
def files(tiny: SVD, tuned: SVDWeights, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The tuned SVD in one file, and the one that it was tuned from."""
    folder = tmp_path_factory.mktemp("svd")
    write_svd(folder / "tuned.safetensors", tuned, "noise", torch.float32)
    write_svd(folder / "before.safetensors", weights_of(tiny, 0.9), "noise", torch.float32)
    return folder / "tuned.safetensors", folder / "before.safetensors"


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    with open_writer(tmp_path / "in.mp4", made_info(20, 14, 3, Fraction(25)), size=(14, 20)) as writer:
        for i in range(3):
            writer.write(Frame(picture(i, 14, 20), None, i))
    return tmp_path / "in.mp4"


def save(weights: SVDWeights, folder: Path, half: bool = False, **how: Any) -> Path:
    model: Any = UNetSpatioTemporalConditionModel(**weights.unet_config)
    model.load_state_dict(weights.unet)
    (model.half() if half else model).save_pretrained(folder, **how)
    return folder


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def video(clip: Path, *arguments: object) -> Tensor:
    out = clip.parent / "out"
    assert run("upscale", clip, out, "--codec", "png", "--overwrite", *QUICK, *arguments) == 0
    return torch.stack([frame.image for frame in read_frames(probe(out))])


@pytest.mark.parametrize("how", [{}, {"max_shard_size": "500KB"}, {"half": True, "variant": "fp16"}])
def test_it_gives_the_video_of_the_same_weights_in_one_file(
    how: dict[str, Any], tuned: SVDWeights, files: tuple[Path, Path], clip: Path, tmp_path: Path
) -> None:
    unet = save(tuned, tmp_path / "unet_ema", **how)
    expected = video(clip, "--model", files[0])
    assert (video(clip, "--model", files[1], "--unet", unet) - expected).abs().max() < 1e-5
    assert (video(clip, "--model", files[1]) - expected).abs().max() > 1e-3


def test_beside_the_bundled_weights(clip: Path, tmp_path: Path) -> None:
    unet = save(read_svd(LITE), tmp_path / "unet_ema")
    same = ("--upscaler", "bicubic", "--refiner", "none", "--color", "none")
    assert (video(clip, *same, "--unet", tmp_path / unet.name) - video(clip, *same)).abs().max() < 1e-5


def test_plan_takes_it(files: tuple[Path, Path], tuned: SVDWeights, clip: Path, tmp_path: Path) -> None:
    unet = save(tuned, tmp_path / "unet_ema")
    assert run("plan", clip, "--model", files[1], "--unet", unet, *QUICK) == 0


def test_it_is_a_file_that_is_read(
    tuned: SVDWeights, files: tuple[Path, Path], clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unet = save(tuned, tmp_path / "unet_ema")
    args = make_parser().parse_args(["upscale", "in.mp4", "out.mp4", "--unet", str(unet)])
    assert {unet / "config.json", unet / "diffusion_pytorch_model.safetensors"} <= set(files_read(args))
    before = sorted(unet.iterdir())
    file = unet / "diffusion_pytorch_model.safetensors"
    for given, words in ((unet, "is the input itself"), (file, "which an output folder may not")):
        values = ("--codec", "png", "--overwrite", "--model", files[1], "--unet", given, *QUICK)
        assert run("upscale", clip, unet, *values) == 2
        assert words in capsys.readouterr().err and sorted(unet.iterdir()) == before


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run(*arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_bad_input(
    tuned: SVDWeights, files: tuple[Path, Path], clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unet = save(tuned, tmp_path / "unet_ema")
    out = ("upscale", clip, tmp_path / "out.mp4", *QUICK, "--unet")
    assert "no such file or folder, expected a UNet" in refused(capsys, *out, tmp_path / "x")
    message = refused(capsys, *out, unet, "--control", "lite")
    assert "expected one of them; leave one out" in message
    message = refused(capsys, *out, unet)
    assert "a UNet of widths 32-64-64 and cross-attention 16" in message and "give the SVD" in message
    shutil.copytree(unet, tmp_path / "nine")
    config = json.loads((unet / "config.json").read_text())
    (tmp_path / "nine/config.json").write_text(json.dumps({**config, "in_channels": 9}))
    assert "takes 9 channels" in refused(capsys, *out, tmp_path / "nine", "--model", files[1])
    assert not (tmp_path / "out.mp4").exists()
