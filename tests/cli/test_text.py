"""The command line with a published Stable Diffusion: its own empty text, a prompt, a file of one; and `embed`."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.sd_files import stable_diffusion
from tests.support.text_files import WIDTH, open_clip, open_clip_tensors, save_folder, save_tokenizer, text_encoder
from tests.support.video_files import picture
from vsr_ops.__main__ import main
from vsr_ops.checkpoints.control_keymap import control_map
from vsr_ops.checkpoints.text_file import read_texts
from vsr_ops.modules.control import Control, write_control
from vsr_ops.video import Frame, made_info, open_writer, probe, read_frames

QUICK = ("--steps", "1", "--guidance", "none", "--scale", "2", "--cuts", "none", "--color", "none", "--upscaler")
QUICK = (*QUICK, "bicubic")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion 2 as a folder with its text encoder (`sd`), without (`bare`), and as DiffBIR 2.1's base was
    published (`base.ckpt`), with controls of it (`control.safetensors`; `DiffBIR.pt`)."""
    folder, model = tmp_path_factory.mktemp("sd"), stable_diffusion()
    save_tokenizer(save_folder(model.save(folder / "sd"), text_encoder()) / "tokenizer", "!")
    model.save(folder / "bare")
    control = Control.of(model.unet)
    torch.manual_seed(4)
    for conv in (*control.controlnet_down_blocks, control.controlnet_mid_block):
        torch.nn.init.normal_(conv.weight, std=0.05)
    write_control(folder / "control.safetensors", control, "nothing")
    state = control.state_dict()
    torch.save({old: state[new] for old, new in control_map(control.config).items()}, folder / "DiffBIR.pt")
    whole = model.tensors() | open_clip_tensors(open_clip())
    torch.save({"state_dict": whole}, folder / "base.ckpt")
    save_file(whole | {"ztsnr": torch.zeros(0)}, folder / "base.safetensors")
    return folder


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    with open_writer(tmp_path / "in.mp4", made_info(20, 14, 2, Fraction(25)), size=(14, 20)) as writer:
        for i in range(2):
            writer.write(Frame(picture(i, 14, 20), None, i))
    return tmp_path / "in.mp4"


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def video(clip: Path, *arguments: object) -> Tensor:
    out = clip.parent / "out"
    assert run("upscale", clip, out, "--codec", "png", "--overwrite", *QUICK, *arguments) == 0
    return torch.stack([frame.image for frame in read_frames(probe(out))])


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def test_a_kept_text_gives_what_the_encoder_gives(files: Path, clip: Path, tmp_path: Path) -> None:
    """Empty, with words, and with words to guide away from; zeros would give another video."""
    kept = tmp_path / "text.safetensors"
    control = ("--control", files / "control.safetensors")
    seen: list[Tensor] = []
    for words in ((), ("--prompt", "ab a"), ("--prompt", "ab a", "--negative", "b")):
        more = ("--guidance", "cfg", "--cfg", "4") if words else ()
        assert run("embed", "--model", files / "sd", "--out", kept, "--overwrite", *words) == 0
        found = video(clip, "--model", files / "sd", *control, *more, *words)
        assert torch.equal(video(clip, "--model", files / "bare", *control, *more, "--text", kept), found)
        assert read_texts(kept).width == WIDTH
        seen.append(found)
    assert min(apart(seen[0], seen[1]), apart(seen[1], seen[2])) > 1e-3
    stored = load_file(kept)
    assert {name: tuple(value.shape) for name, value in stored.items()} == dict.fromkeys(
        ("prompt", "negative"), (1, 77, WIDTH)
    )


def test_diffbirs_files(files: Path, clip: Path) -> None:
    """A pickled base that does not say its schedule, and a pickled control under its names: with zsnr on they give what
    a file gives that says it."""
    told = ("--model", files / "base.ckpt", "--control", files / "DiffBIR.pt", "--zsnr", "on")
    says = ("--model", files / "base.safetensors", "--control", files / "control.safetensors")
    found = video(clip, *told)
    # Halves in our file of the control, float32 in theirs.
    assert apart(video(clip, *says), found) < 0.02
    assert torch.equal(video(clip, *told, "--prediction", "v_prediction"), found)
    assert apart(video(clip, *told[:4]), found) > 1e-2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "bare", "--control", "control.safetensors"), "bare: has no text encoder, and a published"),
        (("--model", "lite", "--prompt", "ab"), "a text is given and no control"),
        (("--model", "lite", "--control", "lite", "--prompt", "ab"), "prompt is 'ab' and negative '': expected none"),
        (("--model", "base.ckpt", "--control", "DiffBIR.pt", "--prompt", "ab"), "'ab' needs a tokenizer"),
        (("--model", "sd", "--control", "lite", "--prompt", "a", "--text", "sd/x"), "'sd/x' and a prompt or negative"),
        (
            ("--model", "sd", "--control", "control.safetensors", "--text", "nothing.safetensors"),
            "nothing.safetensors: no such file, expected a text",
        ),
        (("--model", "sd", "--control", "control.safetensors", "--zsnr", "yes"), "zsnr is 'yes': expected one of auto"),
        (
            ("--model", "sd", "--control", "control.safetensors", "--zsnr", "on", "--prediction", "epsilon"),
            "prediction is 'epsilon' with a zero terminal SNR",
        ),
        (("--model", "sd", "--control", "control.safetensors", "--prediction", "x0"), "prediction is 'x0'"),
    ],
)
def test_what_is_refused(
    arguments: tuple[str, ...],
    words: str,
    files: Path,
    clip: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(files)
    assert run("upscale", clip, clip.parent / "out", "--codec", "png", *QUICK, *arguments) == 2
    said = capsys.readouterr().err
    *notes, error = said.splitlines()
    assert error.startswith("error: ") and words in error and all(line.startswith("note: ") for line in notes)
    assert not (clip.parent / "out").exists()


def test_embed_harms_nothing(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken = tmp_path / "taken.safetensors"
    taken.write_bytes(b"mine")
    for model, out, words in (
        ("sd", taken, "taken.safetensors"),
        ("sd", tmp_path / "text.pt", "suffix '.pt', expected '.safetensors'"),
        ("base.safetensors", files / "base.safetensors", "base.safetensors"),
        ("bare", tmp_path / "text.safetensors", "bare: holds no text encoder"),
        ("none", tmp_path / "text.safetensors", "none: no such file or folder"),
    ):
        size = (files / "base.safetensors").stat().st_size
        assert run("embed", "--model", files / model, "--out", out) == 2
        assert words in capsys.readouterr().err
        assert (files / "base.safetensors").stat().st_size == size
    assert taken.read_bytes() == b"mine" and [path.name for path in tmp_path.iterdir()] == ["taken.safetensors"]


def test_a_file_of_another_width(files: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "text.safetensors"
    assert run("embed", "--model", files / "sd/text_encoder", "--out", kept) == 0
    assert run("upscale", clip, tmp_path / "out", "--codec", "png", *QUICK, "--control", "lite", "--text", kept) == 2
    assert "the text is 64 wide, the UNet's cross-attention takes 32" in capsys.readouterr().err
