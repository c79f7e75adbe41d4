"""The papers' lists of clips, and folders checked against them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from training.__main__ import main
from training.data.data import load_sources
from training.data.splits import checked, splits


def clip(folder: Path, frames: int, size: tuple[int, int]) -> None:
    """A folder of equal frames."""
    folder.mkdir(parents=True)
    Image.new("RGB", size).save(folder / "00000000.png")
    for number in range(1, frames):
        shutil.copy(folder / "00000000.png", folder / f"{number:08d}.png")


def test_the_lists_are_the_published_ones() -> None:
    """DC-VSR, section 4, and SDATC, section IV-A: 270 clips of REDS are 266 and 4. Vid4's frames are MMagic's."""
    known = splits()
    train, test = set(known["reds_train"].clips), set(known["reds4"].clips)
    assert (len(train), test) == (266, {"000", "011", "015", "020"})
    assert train | test == {f"{number:03d}" for number in range(270)} and set(known["reds_train"].without) == test
    assert {name: (e.frames, e.size) for name, e in known["vid4"].clips.items()} == {
        "calendar": (41, (720, 576)),
        "city": (34, (704, 576)),
        "foliage": (49, (720, 480)),
        "walk": (47, (720, 480)),
    }
    assert len(known["udm10"].clips) == 10 and {"archpeople", "lake"} < set(known["udm10"].clips)
    assert len(known["videolq"].clips) == 50 and known["videolq"].unchecked == ("frames",)


def test_a_whole_folder_passes_also_of_lr_frames(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for k, name in enumerate(("000", "011", "015", "020")):
        clip(tmp_path / name, 100, (320, 180) if k else (1280, 720))
    before = sorted(tmp_path.rglob("*"))
    assert main(["splits", "--check", "reds4", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "000: 100 frames of 1280x720" and lines[3] == "020: 100 frames of 320x180: LR frames"
    assert lines[4] == f"{tmp_path} has all 4 clips of reds4" and sorted(tmp_path.rglob("*")) == before


def test_what_is_missing_or_other_is_named_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip(tmp_path / "calendar", 41, (720, 576))
    clip(tmp_path / "city", 33, (704, 576))
    clip(tmp_path / "walk", 47, (640, 480))
    (tmp_path / "walk" / "00000003.png").write_bytes((tmp_path / "city" / "00000000.png").read_bytes())
    before = sorted(tmp_path.rglob("*"))
    assert main(["splits", "--check", "vid4", str(tmp_path)]) == 2
    out, error = capsys.readouterr()
    assert out.splitlines() == [
        "calendar: 41 frames of 720x576",
        "city: 33 frames of 704x576: expected 34",
        "foliage: missing",
        "walk: 47 frames of 640x480 and 704x576: expected frames of one size",
    ]
    assert error == (
        f"error: {tmp_path} lacks foliage and has city, walk otherwise: expected the 4 clips of vid4 as listed; get"
        " them again\n"
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_other_sizes_empty_folders_and_broken_frames_are_told(tmp_path: Path) -> None:
    clip(tmp_path / "000", 100, (640, 360))
    (tmp_path / "011").mkdir()
    clip(tmp_path / "015", 100, (1280, 720))
    (tmp_path / "015" / "00000050.png").write_bytes(b"nothing")
    found = {each.name: each for each in checked(splits()["reds4"], tmp_path)}
    assert found["000"].wrong == "expected 1280x720, or 320x180 of LR frames"
    assert "holds no pictures" in found["011"].wrong and "00000050.png" in found["015"].wrong
    assert found["020"].wrong == "missing"


def test_what_is_unchecked_is_told_and_no_error(tmp_path: Path) -> None:
    """UDM10's frames lie in folders `truth` as it was published."""
    for name in splits()["udm10"].clips:
        clip(tmp_path / name / "truth", 2, (1272, 720))
    found = list(checked(splits()["udm10"], tmp_path))
    assert all(each.wrong == "" for each in found)
    assert found[0].text == "2 frames of 1272x720 (expected 32, which is unchecked)"


def test_clips_of_the_test_list_among_those_of_training_are_named(tmp_path: Path) -> None:
    """And a folder named test, where the advice has them moved, is not trained on."""
    clip(tmp_path / "001", 100, (64, 64))
    clip(tmp_path / "011", 100, (64, 64))
    found = [each for each in checked(splits()["reds_train"], tmp_path) if "belongs to another list" in each.text]
    assert [each.name for each in found] == ["011"] and "a folder named test" in found[0].wrong
    (tmp_path / "test").mkdir()
    (tmp_path / "011").rename(tmp_path / "test" / "011")
    assert [source.name for source in load_sources(tmp_path)[1]] == ["001"]


@pytest.mark.parametrize(
    ("name", "folder", "said"),
    [
        ("reds5", ".", "unknown list 'reds5': expected one of reds_train, reds4, vid4, udm10, videolq"),
        ("reds4", "nowhere", "nowhere: no such folder"),
    ],
)
def test_wrong_names_are_one_line(name: str, folder: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["splits", "--check", name, folder]) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")


def test_without_a_check_the_lists_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["splits"]) == 0
    out = capsys.readouterr().out
    assert all(f"{name}: " in out for name in splits()) and "266 clips: 001, 002 ... 269" in out
