"""Where results go: an input survives, nothing is replaced unasked, a part has a name of its own.

Each rule is a law over inputs that would break it: after a refusal, and after a success but for the names that were to
be written, every file is there as it was.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.support.video_files import picture, steady, write
from vsr_ops.__main__ import main
from vsr_ops.errors import VideoError
from vsr_ops.system.outputs import give_name, new_part, refuse_inputs, whole
from vsr_ops.video import Frame, check_output, made_info, open_writer, probe

posix = pytest.mark.skipif(sys.platform == "win32", reason="symbolic links and signals as POSIX has them")


def state(folder: Path) -> dict[str, object]:
    """Every name below a folder and what it holds; a symbolic link holds its target's name."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        held = path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
        found[str(path.relative_to(folder))] = held
    return found


def numbered(folder: Path, count: int = 3, size: tuple[int, int] = (8, 6)) -> Path:
    folder.mkdir(parents=True)
    for index in range(count):
        Image.new("RGB", size, (40 * index, 90, 30)).save(folder / f"frame_{index:06d}.png")
    return folder


def frames(path: Path, count: int, codec: str = "ffv1", overwrite: bool = False) -> None:
    with open_writer(path, made_info(8, 6, count), size=(6, 8), codec=codec, overwrite=overwrite) as writer:
        for index in range(count):
            writer.write(Frame(picture(index, 6, 8), None, index))


# --- An input survives ----------------------------------------------------------------------------------------------


def linked(make: Callable[[Path, Path], None], target: Path, name: Path) -> Path:
    make(target, name)
    return name


def symbolic(target: Path, name: Path) -> None:
    name.symlink_to(target, target_is_directory=target.is_dir())


INPUTS: dict[str, Callable[[Path], tuple[Path, Path, str]]] = {
    "the input": lambda d: (steady(d / "in.mp4", 2), d / "in.mp4", "h264"),
    "the input by way of its folder": lambda d: (steady(d / "in.mp4", 2), d / "x" / ".." / "in.mp4", "h264"),
    "a symbolic link to the input": lambda d: (
        steady(d / "in.mp4", 2),
        linked(symbolic, d / "in.mp4", d / "out.mp4"),
        "h264",
    ),
    "a hard link to the input": lambda d: (steady(d / "in.mp4", 2), linked(os.link, d / "in.mp4", d / "o.mp4"), "h264"),
    "what the input is a link to": lambda d: (
        linked(symbolic, steady(d / "out.mp4", 2), d / "in.mp4"),
        d / "out.mp4",
        "h264",
    ),
    "the picture's folder": lambda d: (numbered(d / "a") / "frame_000001.png", d / "a", "png"),
    "the folder itself": lambda d: (numbered(d / "a"), d / "a", "png"),
    "a link to the folder": lambda d: (numbered(d / "a"), linked(symbolic, d / "a", d / "b"), "png"),
    "the folder's folder": lambda d: (numbered(d / "a"), d, "png"),
    "the folder's folder's folder": lambda d: (numbered(d / "frames" / "frames"), d, "png"),
    "the folder from within": lambda d: (numbered(d / "a" / "a"), d / "a" / "a" / "..", "png"),
    "a folder with a hard link to a picture": lambda d: (
        linked(os.link, numbered(d / "a") / "frame_000000.png", d / "in.png"),
        d / "a",
        "png",
    ),
    "the folder that linked pictures lie in": lambda d: (
        linked(symbolic, numbered(d / "a") / "frame_000000.png", numbered(d / "b", 0) / "1.png").parent,
        d / "a",
        "png",
    ),
    "a folder above what the input is a link to": lambda d: (
        linked(symbolic, numbered(d / "a" / "b") / "frame_000000.png", d / "in.png"),
        d / "a",
        "png",
    ),
    "a picture of the folder": lambda d: (numbered(d / "a", 1), d / "a" / "frame_000000.png", "png"),
    "a folder that is a video's": lambda d: (steady(numbered(d / "a") / "in.mp4", 2), d / "a", "jpeg"),
}


@posix
@pytest.mark.parametrize("name", INPUTS)
def test_an_output_that_is_or_holds_an_input_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "x").mkdir()
    source, output, codec = INPUTS[name](tmp_path)
    info, before = probe(source), state(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(VideoError, match=r"input|already exists" if not overwrite else "input") as refusal:
            check_output(output, overwrite, codec, info, info.frames)
        with pytest.raises(VideoError):
            open_writer(output, info, size=(6, 8), codec=codec, overwrite=overwrite)
        assert "\n" not in str(refusal.value) and str(output) in str(refusal.value)
    assert state(tmp_path) == before


def test_a_name_in_other_case_is_the_input_where_the_disk_says_so(tmp_path: Path) -> None:
    info = probe(steady(tmp_path / "in.mp4", 2))
    if (tmp_path / "IN.MP4").exists():
        with pytest.raises(VideoError, match="is the input itself"):
            check_output(tmp_path / "IN.MP4", True, info=info)
    else:
        check_output(tmp_path / "IN.MP4", True, info=info)


@posix
@pytest.mark.parametrize("option", ["--model", "--upscaler", "--refiner", "--control", "--capm", "--cfw", "--stam"])
def test_a_file_that_an_option_names_survives(tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    steady(tmp_path / "in.mp4", 2)
    model = tmp_path / "own" / "weights.safetensors"
    model.parent.mkdir()
    model.write_bytes(b"years of work")
    os.link(model, tmp_path / "o.mp4")
    before = state(tmp_path)
    for named, output in ((model, tmp_path / "o.mp4"), (model, model.parent), (model.parent, model.parent)):
        codec = "png" if output.is_dir() else "h264"
        arguments = ["upscale", tmp_path / "in.mp4", output, "--overwrite", "--codec", codec, option, named]
        assert main([str(argument) for argument in arguments]) == 2
        assert "input" in capsys.readouterr().err
    assert state(tmp_path) == before


def test_a_new_folder_in_the_inputs_folder_is_no_input(tmp_path: Path) -> None:
    """The refusals are of what is at stake, not of neighbours."""
    info = probe(numbered(tmp_path / "a"))
    check_output(tmp_path / "a" / "out", codec="png", info=info, frames=3)
    check_output(tmp_path / "a" / "out.mp4", info=info, frames=3)
    refuse_inputs(tmp_path / "none", [tmp_path / "a"])


# --- Only --overwrite replaces, and only what has the very name ------------------------------------------------------


@posix
def test_without_overwriting_nothing_is_replaced_not_even_a_dangling_link(tmp_path: Path) -> None:
    (tmp_path / "o.mkv").symlink_to(tmp_path / "away")
    (tmp_path / "file.mkv").write_bytes(b"mine")
    (tmp_path / "folder.mkv").mkdir()
    before = state(tmp_path)
    for name in ("o.mkv", "file.mkv", "folder.mkv"):
        with pytest.raises(VideoError):
            frames(tmp_path / name, 2)
    assert state(tmp_path) == before


@pytest.mark.parametrize(
    "other", ["frame_000123.png", "frame_000002.jpg", "frame_000002.PNG", "holiday.png", "frame_000001.jpeg"]
)
def test_pictures_of_other_names_stay_and_are_not_mixed_with(tmp_path: Path, other: str) -> None:
    numbered(tmp_path / "out", 2)
    (tmp_path / "out" / other).write_bytes(b"mine")
    before = state(tmp_path)
    with pytest.raises(VideoError, match=f"'{other}' beside the 2 pictures"):
        check_output(tmp_path / "out", True, "png", frames=2)
    with pytest.raises(VideoError, match="the finished result stays in"):
        frames(tmp_path / "out", 2, "png", overwrite=True)
    after = state(tmp_path)
    assert {name: held for name, held in after.items() if ".part-" not in name} == before


def test_a_folder_under_a_pictures_name_stays(tmp_path: Path) -> None:
    (tmp_path / "out" / "frame_000001.png").mkdir(parents=True)
    with pytest.raises(VideoError, match=r"frame_000001\.png"):
        check_output(tmp_path / "out", True, "png", frames=2)
    assert state(tmp_path) == {"out": "folder", str(Path("out", "frame_000001.png")): "folder"}


@posix
def test_overwriting_replaces_a_link_and_not_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "precious.mkv").write_bytes(b"mine")
    (tmp_path / "o.mkv").symlink_to("precious.mkv")
    numbered(tmp_path / "out", 0)
    (tmp_path / "out" / "frame_000000.png").symlink_to(tmp_path / "precious.mkv")
    frames(tmp_path / "o.mkv", 2, overwrite=True)
    frames(tmp_path / "out", 1, "png8", overwrite=True)
    assert (tmp_path / "precious.mkv").read_bytes() == b"mine"
    assert probe(tmp_path / "o.mkv").frames == 2 and probe(tmp_path / "out").frames == 1


def test_what_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    part = new_part(tmp_path / "a.txt")
    part.write_text("ours")
    (tmp_path / "a.txt").write_text("theirs")
    with pytest.raises(FileExistsError):
        give_name(part, tmp_path / "a.txt", overwrite=False)
    folder = new_part(tmp_path / "b", folder=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c").write_text("theirs")
    with pytest.raises(OSError):
        give_name(folder, tmp_path / "b", overwrite=True)
    assert (tmp_path / "a.txt").read_text() == "theirs" and (tmp_path / "b" / "c").read_text() == "theirs"
    give_name(part, tmp_path / "a.txt", overwrite=True)
    assert (tmp_path / "a.txt").read_text() == "ours" and not part.exists()


def test_scores_and_demo_replace_nothing_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("truth", "same"):
        write(tmp_path / name, made_info(32, 24, 2), "png8")
    out = tmp_path / "out"
    out.mkdir()
    (out / "table.txt").write_text("mine")
    (out / "notes.txt").write_text("mine too")
    (out / "side_by_side.png").write_text("and mine")
    before = state(tmp_path)
    evaluate = ["evaluate", "--truth", str(tmp_path / "truth"), "--method", f"same={tmp_path / 'same'}"]
    evaluate += ["--metrics", "psnr_y", "--out"]
    refused = [[*evaluate, str(out)], ["demo", "--out", str(out)]]
    refused += [[*evaluate, str(tmp_path / name), "--overwrite"] for name in ("truth", "same", ".", "same/../truth")]
    refused += [[*evaluate, str(out / "notes.txt" / "x")], [*evaluate, str(out / "notes.txt"), "--overwrite"]]
    for arguments in refused:
        assert main(arguments) == 2, arguments
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
        assert state(tmp_path) == before
    assert main([*evaluate, str(out), "--overwrite"]) == 0
    assert (out / "notes.txt").read_text() == "mine too" and (out / "table.txt").read_text() != "mine"
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


# --- Parts have names that nothing had ------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["ffv1", "png"])
def test_hidden_files_that_look_like_parts_and_locks_stay(tmp_path: Path, codec: str) -> None:
    output = tmp_path / ("o.mkv" if codec == "ffv1" else "o")
    names = [".o.part.mkv", ".o.part", ".o.part.try", ".o.mkv.part", ".o.mkv.lock", ".o.lock", ".o.part-0a1b2c3d.mkv"]
    for name in names:
        (tmp_path / name).write_bytes(b"mine")
    before = state(tmp_path)
    check_output(output, codec=codec, frames=2)
    assert state(tmp_path) == before
    frames(output, 2, codec)
    assert {name: held for name, held in state(tmp_path).items() if name in before} == before
    assert probe(output).frames == 2
    with pytest.raises(RuntimeError), open_writer(output, made_info(8, 6, 2), size=(6, 8), codec=codec, overwrite=True):
        raise RuntimeError
    assert {path.name for path in tmp_path.iterdir()} == {*names, output.name}


def test_an_input_named_as_a_part_or_lock_is_read_to_its_end(tmp_path: Path) -> None:
    for name in (".o.part.mkv", ".o.mkv.lock", ".o.part-11111111.mkv"):
        frames(tmp_path / "in.mkv", 3, overwrite=True)
        (tmp_path / "in.mkv").rename(tmp_path / name)
        before = (tmp_path / name).read_bytes()
        info = probe(tmp_path / name)
        with open_writer(tmp_path / "o.mkv", info, size=(6, 8), codec="ffv1", overwrite=True) as writer:
            for index, pts in enumerate(info.times):
                writer.write(Frame(picture(index, 6, 8), None, pts))
        assert (tmp_path / name).read_bytes() == before and probe(tmp_path / "o.mkv").frames == 3
        (tmp_path / name).unlink()


def test_parts_are_new_hidden_and_readable_as_other_files_are(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    plain = tmp_path / "plain"
    plain.touch()
    for name in ("o.mp4", "there", "o", "v1.5", "a" * 250, "ü" * 120 + ".mkv"):
        parts = [new_part(tmp_path / name, folder=folder) for folder in (False, True) * 8]
        assert len(set(parts)) == 16 and all(part.name.startswith(".") for part in parts)
        assert all(part.stat().st_mode == plain.stat().st_mode for part in parts[::2])
    with pytest.raises(RuntimeError), whole(tmp_path / "w.txt") as part:
        part.write_text("half")
        raise RuntimeError
    assert not (tmp_path / "w.txt").exists() and not part.exists()


def test_the_folder_where_one_stands_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies in an output folder that is there can be renamed even where that is a disk of its own."""
    monkeypatch.chdir(tmp_path)
    frames(Path(), 2, "png8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["frame_000000.png", "frame_000001.png"]
