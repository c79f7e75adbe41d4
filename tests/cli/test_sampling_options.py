"""From the command line: the sampler, the alignment's scale and RAFT reach the frames, or are refused in a line."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from tests.support.tensors import rand
from vsr_ops.__main__ import main
from vsr_ops.checkpoints.svd import SVDWeights, write_svd
from vsr_ops.video import Frame, made_info, open_writer, probe, read_frames

if TYPE_CHECKING:
    from vsr_ops.backbones.svd import SVD

SIDE = 64


@pytest.fixture(scope="module")
def folder(tiny: SVD, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, a video of four frames that slides, and a small RAFT to which everything stands still."""
    from torchvision.models.optical_flow import raft_small

    path = tmp_path_factory.mktemp("sampling")
    configs = [{k: v for k, v in dict(part.config).items() if not k.startswith("_")} for part in (tiny.unet, tiny.vae)]
    states = [part.state_dict() for part in (tiny.unet, tiny.vae)]
    weights = SVDWeights(configs[0], configs[1], None, states[0], states[1], None, (8, 8, 4), {})
    write_svd(path / "tiny.safetensors", weights, "nothing")
    still = raft_small()
    for value in still.update_block.flow_head.conv2.parameters():
        torch.nn.init.zeros_(value)
    torch.save(still.state_dict(), path / "raft.pth")
    large = torch.nn.functional.interpolate(rand(1, 3, SIDE // 8 + 2, SIDE // 8 + 2), scale_factor=8, mode="bicubic")
    with open_writer(path / "in.mkv", made_info(SIDE, SIDE, 4), size=(SIDE, SIDE), codec="ffv1") as writer:
        for i in range(4):
            writer.write(Frame(large[0, :, 2 * i : 2 * i + SIDE, 3 * i : 3 * i + SIDE].clamp(0, 1), None, i))
    return path


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Callable[..., int]:
    def upscale(name: str, *options: str) -> int:
        given = ["--model", str(folder / "tiny.safetensors"), "--guidance", "none", "--scale", "2", "--cuts", "none"]
        given += ["--upscaler", "bicubic", "--codec", "ffv1", "--steps", "3", "--tile", "16x16x4"]
        return main(["upscale", str(folder / "in.mkv"), str(tmp_path / name), *given, *options])

    return upscale


def frames(path: Path) -> Tensor:
    return torch.stack([frame.image for frame in read_frames(probe(path))])


def test_each_option_changes_the_frames_and_comes_out_the_same_twice(
    run: Callable[..., int], folder: Path, tmp_path: Path
) -> None:
    aligned = ("--align", "0.5")
    raft = ("--flow", "raft", "--flow-weights", str(folder / "raft.pth"))
    cases = {
        "euler": (),
        "ddpm": ("--sampler", "ddpm"),
        "again": ("--sampler", "ddpm"),
        "dis": aligned,
        "scaled": (*aligned, "--align-scale", "ddpm"),
        "raft": (*aligned, *raft),
        "unused": raft,
    }
    found: dict[str, Tensor] = {}
    for name, options in cases.items():
        assert run(f"{name}.mkv", *options) == 0
        found[name] = frames(tmp_path / f"{name}.mkv")
    assert torch.equal(found["again"], found["ddpm"]) and torch.equal(found["unused"], found["euler"])
    for one, other in combinations(("euler", "ddpm", "dis", "scaled", "raft"), 2):
        assert float((found[one] - found[other]).abs().max()) > 1e-2, (one, other)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--sampler", "heun"), "sampler is 'heun': expected one of euler, ddpm, dpmpp_2m"),
        (("--align-scale", "edm"), "alignment scale is 'edm': expected one of bounded, ddpm"),
        (("--align", "0.1", "--align-mode", "propagate", "--align-scale", "ddpm"), "expected bounded there"),
        (("--flow", "pwc"), "flow is 'pwc': expected one of dis, raft"),
        (("--flow", "raft"), "flow is raft without weights: expected torchvision's file; give --flow-weights"),
        (("--flow-weights", "x.pth"), "flow weights are x.pth and flow is dis: expected raft"),
        (("--flow", "raft", "--flow-weights", "x.pth"), "x.pth: no such file; expected raft_large_C_T_SKHT_V2"),
    ],
)
def test_what_cannot_work_is_refused_and_nothing_written(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], words: str
) -> None:
    assert run("refused.mkv", *options) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and not (tmp_path / "refused.mkv").exists()


def test_the_flows_own_weights_are_no_output(run: Callable[..., int], folder: Path) -> None:
    before = (folder / "raft.pth").read_bytes()
    weights = ("--flow", "raft", "--flow-weights", str(folder / "raft.pth"), "--overwrite", "--align", "0.1")
    assert run(str(folder / "raft.pth"), *weights) == 2
    assert (folder / "raft.pth").read_bytes() == before
