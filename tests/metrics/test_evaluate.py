"""Scores of clips: streamed as whole, folders of clips, what is refused, tables, files, curves, the command."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from skimage.data import chelsea
from torch import Tensor

from vsr_ops.__main__ import main
from vsr_ops.cli.demo_clip import camera_path, write_video
from vsr_ops.errors import SettingError, VideoError
from vsr_ops.image.resize import quantize8
from vsr_ops.metrics.evaluate import Evaluation, evaluate, list_clips, score
from vsr_ops.metrics.published import published
from vsr_ops.metrics.report import Scores, joined
from vsr_ops.metrics.seams import Borders, plan_borders
from vsr_ops.metrics.table import METRICS, seams
from vsr_ops.sampling.tiling import TilePlan, TileSize, plan_tiles
from vsr_ops.video import VideoInfo
from vsr_ops.video.pictures import save_png8
from vsr_ops.views.chart import Panel, draw_panels

FRAMES, HEIGHT, WIDTH = 19, 48, 64


@pytest.fixture(scope="module")
def truth() -> Tensor:
    photo = torch.from_numpy(chelsea()).permute(2, 0, 1).float() / 255
    clip = camera_path(photo, FRAMES, HEIGHT, WIDTH)
    clip[..., : WIDTH // 2] = clip[0, ..., : WIDTH // 2]
    return quantize8(clip)


@pytest.fixture(scope="module")
def noisy(truth: Tensor) -> Tensor:
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    return quantize8((truth + 0.03 * noise).clamp(0, 1))


def save_frames(folder: Path, clip: Tensor) -> None:
    folder.mkdir(parents=True)
    for i, frame in enumerate(clip):
        save_png8(folder / f"{i}.png", frame, None)


@pytest.fixture
def folders(tmp_path: Path, truth: Tensor, noisy: Tensor) -> Path:
    """Two clips, and two methods: one gives the truth itself."""
    for name, start in (("one", 0), ("two", 10)):
        save_frames(tmp_path / "truth" / name, truth[start : start + 4])
        save_frames(tmp_path / "same" / name, truth[start : start + 4])
        save_frames(tmp_path / "noisy" / name, noisy[start : start + 4])
    return tmp_path


# --- In memory and streamed -------------------------------------------------------------------------------------------


def test_streamed_in_parts_is_the_whole(truth: Tensor, noisy: Tensor) -> None:
    """More frames than are measured at once: values over time and VMAF's motion cross from part to part."""
    plan = plan_tiles(FRAMES, 6, 8, TileSize(4, 4, 8), factor=4)
    names = [name for name in METRICS if not METRICS[name].missing() or name == "seam"]
    assert {"vmaf", "tof", "flicker", "seam"} < set(names)
    found = score({"m": {"c": lambda: iter(noisy)}}, {"c": lambda: iter(truth)}, names, borders=plan)
    for name in names:
        metric = seams(plan_borders(plan, HEIGHT, WIDTH)) if name == "seam" else METRICS[name]
        whole = [float(value) for value in metric(noisy, truth)]
        expected = [math.nan, *whole] if metric.pairs else whole
        assert found.frames["m", "c", name] == pytest.approx(expected, abs=1e-3, nan_ok=True), name
        assert found.value("m", name) == pytest.approx(sum(whole) / len(whole), abs=1e-3), name


def test_streams_are_read_once_for_each_method_and_progress_is_told(truth: Tensor, noisy: Tensor) -> None:
    alive: list[int] = []
    told: list[int] = []

    def stream() -> Iterator[Tensor]:
        for k, frame in enumerate(noisy):
            alive.append(k)
            yield frame

    score({"a": {"c": stream}, "b": {"c": noisy}}, {"c": truth}, "psnr_y", tick=told.append)
    assert alive == list(range(FRAMES)) and sum(told) == 2 * FRAMES


def test_border_is_left_out_of_all_but_seams(truth: Tensor) -> None:
    framed = truth.clone()
    framed[..., :4] = 0
    framed[..., -4:, :] = 1
    names = ["psnr", "ssim_y", "tof", "color_drift"]
    found = score({"m": {"c": framed}}, {"c": truth}, names, border=4)
    assert [found.value("m", name) for name in names] == [math.inf, 1.0, 0.0, 0.0]
    places = Borders((), (2,))
    one, other = (score({"m": {"c": framed}}, {"c": truth}, "seam", borders=places, border=b) for b in (0, 4))
    assert one.value("m", "seam") == other.value("m", "seam") != 1
    for border in (-1, 24):
        with pytest.raises(SettingError, match=f"border is {border}"):
            score({"m": {"c": framed}}, {"c": truth}, names, border=border)


def test_a_single_frame_has_no_value_over_time(truth: Tensor) -> None:
    found = score({"m": {"c": truth[:1]}}, {"c": truth[:1]}, "ssim_y,tof")
    assert found.value("m", "ssim_y") == 1 and math.isnan(found.value("m", "tof"))
    assert found.table().splitlines()[2].split() == ["tOF", "↓", "-"]


@pytest.mark.parametrize(
    ("cut", "said"),
    [
        (lambda x: x[:17], "m is 17 frames, the truth is 19 frames"),
        (lambda x: x.repeat(2, 1, 1, 1), "m is 38 frames, the truth is 19 frames"),
        (lambda x: x[..., 2:], "m is 62x48 with 3 channels, the truth is 64x48 with 3 channels"),
    ],
)
def test_what_differs_in_size_is_an_error_that_names_both(truth: Tensor, cut: object, said: str) -> None:
    with pytest.raises(SettingError, match=f"clip 'c': {said}.*resize and cut nothing"):
        score({"m": {"c": cut(truth)}}, {"c": truth}, "psnr_y")  # type: ignore[operator]


def test_what_cannot_be_measured_is_said(truth: Tensor) -> None:
    clips = {"c": truth[:2]}
    found = score({"m": clips}, clips, "psnr_y, seam, dover")
    assert found.names == ("psnr_y",) and set(found.missing) == {"seam", "dover"}
    assert "not measured: seam: no tiles were given" in found.table()
    with pytest.raises(SettingError, match="none of the metrics can be measured here: dover: pyiqa has no DOVER"):
        score({"m": clips}, clips, "dover")
    with pytest.raises(SettingError, match="unknown metric 'fid'"):
        score({"m": clips}, clips, "fid")
    with pytest.raises(SettingError, match="method 'm' has no clip 'd'"):
        score({"m": clips}, {"c": truth, "d": truth}, "psnr_y")


# --- Tables and files -------------------------------------------------------------------------------------------------


def made(values: dict[str, float]) -> Scores:
    frames = {(method, "c", "psnr_y"): (value, value) for method, value in values.items()}
    return Scores(tuple(values), ("c",), ("psnr_y",), frames, {})


def test_the_table_has_methods_across_and_marks_the_best() -> None:
    lines = made({"bicubic": 28.123, "lite": 29.5}).table().splitlines()
    assert lines[0].split() == ["Datasets", "Metrics", "bicubic", "lite"]
    assert lines[1].split() == ["c", "PSNR-Y", "↑", "28.12", "29.50*"]
    # What prints alike is marked alike, and a method alone is not.
    assert made({"a": 28.001, "b": 28.002}).table().count("28.00*") == 2
    assert "*" not in made({"a": 28.0}).table()


def test_joined_scores_are_the_mean_over_clips_not_frames() -> None:
    one = Scores(("m",), ("a",), ("psnr_y",), {("m", "a", "psnr_y"): (20.0,)}, {})
    two = Scores(("m",), ("b",), ("psnr_y",), {("m", "b", "psnr_y"): (30.0, 30.0, 30.0)}, {})
    both = joined([one, two])
    assert both.value("m", "psnr_y") == 25 and both.rows() == {"m": {"psnr_y": 25.0}}
    assert [line.split()[0] for line in both.table(by_clip=True).splitlines()[1:4]] == ["a", "b", "mean"]
    with pytest.raises(SettingError, match="different methods"):
        joined([one, made({"x": 1.0})])
    with pytest.raises(SettingError, match="no scores"):
        joined([])


def test_published_rows_stand_beside_and_are_marked_as_such() -> None:
    text = made({"bicubic": 28.0, "lite": 29.0}).table(beside="dc-vsr")
    assert "published: DC-VSR, table 1" in text and "do not compare with the rows above" in text
    (row,) = (line for line in text.splitlines() if line.startswith("REDS4"))
    assert " ".join(row.split()) == "REDS4 PSNR ↑ 25.92 24.55 24.22 23.81 25.49 26.40* 24.32 25.57 25.11"
    assert "SSIM" not in text.split("published")[1]
    assert "published" not in made({"a": 1.0}).table()
    with pytest.raises(SettingError, match=r"unknown published tables 'x'.*dc-vsr"):
        published("x")


def test_files_hold_every_value(truth: Tensor, noisy: Tensor, tmp_path: Path) -> None:
    found = score({"m": {"c": noisy[:3]}, "same": {"c": truth[:3]}}, {"c": truth[:3]}, "psnr_y,tof")
    paths = found.write(tmp_path / "new" / "out")
    assert [path.name for path in paths] == ["table.txt", "metrics.csv", "frames.csv", "metrics.png"]
    with paths[1].open(encoding="utf-8") as file:
        values = {(row["clip"], row["method"], row["metric"]): row["value"] for row in csv.DictReader(file)}
    assert float(values["mean", "m", "tof"]) == found.value("m", "tof") and values["c", "same", "psnr_y"] == "inf"
    with paths[2].open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and [row["tof"] == "" for row in rows] == [True, False, False] * 2
    assert [float(row["psnr_y"]) for row in rows[:3]] == list(found.frames["m", "c", "psnr_y"])
    assert paths[0].read_text(encoding="utf-8").startswith("Datasets")
    with pytest.raises(VideoError, match="cannot be written"):
        found.write(paths[0])


def test_curves_are_drawn_in_the_methods_colours() -> None:
    rising = {"a": [1.0, 2.0, 3.0, math.nan, 5.0], "b": [5.0, math.inf, 3.0, 2.0, 1.0]}
    picture = draw_panels([Panel("one", rising, [(0, "first"), (3, "second")]), Panel("two", {"a": [2.0]})], 400, 120)
    assert picture.shape[0] == 3 and picture.shape[2] == 400 and picture.shape[1] > 240
    assert float(picture.min()) >= 0 and float(picture.max()) <= 1
    blue = torch.tensor([0x00, 0x72, 0xB2]).view(3, 1, 1) / 255
    for half in (picture[:, :170], picture[:, 170:]):
        assert int(((half - blue).abs().amax(0) < 0.02).sum()) > 10
    with pytest.raises(SettingError, match="no curves"):
        draw_panels([])


# --- Folders ----------------------------------------------------------------------------------------------------------


def measured(root: Path, **rest: object) -> Evaluation:
    methods = {"same": root / "same", "noisy": root / "noisy"}
    return evaluate(root / "truth", methods, "psnr_y,tof", **rest)  # type: ignore[arg-type]


def test_folders_of_clips_are_matched_by_name(folders: Path, truth: Tensor, noisy: Tensor) -> None:
    counted: list[int] = []
    found = measured(folders, started=counted.append)
    assert found.scores.clips == ("one", "two") and found.notes() == "" and counted == [16]
    assert found.scores.value("same", "psnr_y") == math.inf and found.scores.value("same", "tof") == 0
    direct = METRICS["psnr_y"](noisy[:4], truth[:4])
    assert found.scores.frames["noisy", "one", "psnr_y"] == pytest.approx(direct.tolist(), abs=1e-6)


def test_videos_and_single_clips(folders: Path, truth: Tensor) -> None:
    (folders / "videos").mkdir()
    for name, start in (("one", 0), ("two", 10)):
        write_video(folders / "videos" / f"{name}.mp4", truth[start : start + 4])
    assert list(list_clips(folders / "videos")) == ["one", "two"]
    psnr = evaluate(folders / "truth", {"h264": folders / "videos"}, "psnr_y").scores.value("h264", "psnr_y")
    assert 30 < psnr < 60
    single = evaluate(folders / "truth" / "one", {"h264": folders / "videos" / "one.mp4"}, "psnr_y").scores
    assert single.clips == ("one",) and 30 < single.value("h264", "psnr_y") < 60


def test_the_plan_is_asked_for_each_clip(folders: Path) -> None:
    asked: list[tuple[int, int, int]] = []

    def plan(info: VideoInfo) -> TilePlan:
        asked.append((info.frames, info.height, info.width))
        return plan_tiles(info.frames, 6, 8, TileSize(4, 4, 8), factor=4)

    found = evaluate(folders / "truth", {"noisy": folders / "noisy"}, "seam", plan=plan)
    assert asked == [(4, HEIGHT, WIDTH)] * 2 and 0.5 < found.scores.value("noisy", "seam") < 1.5


def test_clips_that_do_not_match_are_named(folders: Path, truth: Tensor) -> None:
    save_frames(folders / "noisy" / "three", truth[:2])
    assert "no truth, skipped" in measured(folders).notes() and "three" in measured(folders).notes()
    save_frames(folders / "truth" / "four", truth[:2])
    with pytest.raises(SettingError, match=r"method 'same' has no clip 'four'.*it has 'one', 'two'"):
        measured(folders)
    write_video(folders / "same" / "one.mp4", truth[:4])
    with pytest.raises(VideoError, match="are both clip 'one'"):
        measured(folders)


def test_sizes_are_compared_before_anything_is_measured(folders: Path, truth: Tensor) -> None:
    save_frames(folders / "truth" / "zzz", truth[:3])
    save_frames(folders / "same" / "zzz", truth[:3])
    save_frames(folders / "noisy" / "zzz", truth[:3, :, 2:])
    told: list[int] = []
    with pytest.raises(SettingError, match="clip 'zzz': noisy is 3 frames of 64x46, the truth is 3 frames of 64x48"):
        measured(folders, tick=told.append)
    assert told == []


@pytest.mark.parametrize("where", ["truth", "noisy"])
def test_one_unreadable_clip_of_twenty_is_skipped_and_two_stop_the_run(
    tmp_path: Path, truth: Tensor, where: str
) -> None:
    for k in range(20):
        for root in ("truth", "same", "noisy"):
            save_frames(tmp_path / root / f"clip{k:02}", truth[k % 8 : k % 8 + 2, :, :16, :16])
    (tmp_path / where / "clip03" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    found = measured(tmp_path)
    assert len(found.scores.clips) == 19 and "clip03" not in found.scores.clips
    lines = found.notes().splitlines()
    assert "clip03" in lines[0] and lines[-1] == "1 of 20 clips could not be read and count nowhere"
    (tmp_path / "truth" / "clip07" / "0.png").write_bytes(b"")
    with pytest.raises(VideoError, match=r"2 of 20 clips cannot be read: expected at most 5%.*clip03.*clip07"):
        measured(tmp_path)


def test_folders_without_clips_are_refused(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="does not exist"):
        list_clips(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(VideoError, match="holds no clips"):
        list_clips(tmp_path)


# --- The command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_the_table_and_writes_files(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = ["--method", f"same={folders / 'same'}", "--method", f"noisy={folders / 'noisy'}"]
    rest = ["--metrics", "psnr_y,seam", "--tile", "8x8x4", "--out", str(folders / "out"), "--published", "dc-vsr"]
    assert main(["evaluate", "--truth", str(folders / "truth"), *methods, *rest]) == 0
    text = capsys.readouterr().out
    lines = [line.split() for line in text.splitlines()]
    assert lines[5][:6] == ["mean", "of", "2", "PSNR-Y", "↑", "inf*"] and "published: DC-VSR" in text
    # A single tile of 8x8 latents in a picture of 6x8: no seams to measure.
    assert lines[6] == ["seams", "→1", "-", "-"]
    assert sorted(path.name for path in (folders / "out").iterdir()) == sorted(
        ["table.txt", "metrics.csv", "frames.csv", "metrics.png"]
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--method", "x"], "method is 'x': expected NAME=DIR"),
        (["--method", "x=a", "--method", "x=b"], "method is 'x=b'"),
        (["--method", "x=a", "--metrics", "best"], "unknown metric 'best'"),
        (["--method", "x=a", "--published", "them"], "published is 'them'"),
        (["--method", "x=a", "--tile", "8"], "tile is '8'"),
        (["--method", "x=a"], "does not exist"),
    ],
)
def test_the_command_refuses_in_one_line(
    tmp_path: Path, given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "--truth", str(tmp_path / "truth"), *given]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and said in line
