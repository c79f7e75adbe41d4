"""One run at a time into an output: a second is refused, and no killed run and no name of the user's stops the next."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.support.video_files import picture
from tests.system.test_outputs import frames, numbered, posix, state
from vsr_ops.errors import VideoError
from vsr_ops.system.outputs import claimed, held_folder
from vsr_ops.video import Frame, check_output, made_info, open_writer, probe

ROOT = Path(__file__).parents[2]


@posix
@pytest.mark.parametrize(
    ("first", "second", "codec"),
    [
        ("o.mkv", "o.mkv", "ffv1"),
        ("o.mkv", "there/../o.mkv", "ffv1"),
        ("there/o.mkv", "link/o.mkv", "ffv1"),
        ("new", "new", "png"),
        ("there", "there", "png"),
        ("there", "link", "png"),
        ("o.png", "o.png", "png8"),
    ],
)
def test_a_second_run_into_an_output_is_refused(tmp_path: Path, first: str, second: str, codec: str) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there", target_is_directory=True)
    info = made_info(8, 6, 1)
    with open_writer(tmp_path / first, info, size=(6, 8), codec=codec, overwrite=True) as writer:
        during = state(tmp_path)
        with pytest.raises(VideoError, match="another run is writing") as refusal:
            check_output(tmp_path / second, True, codec)
        assert str(tmp_path / second) in str(refusal.value) and "\n" not in str(refusal.value)
        with pytest.raises(VideoError, match="another run is writing"):
            frames(tmp_path / second, 1, codec, overwrite=True)
        assert state(tmp_path) == during
        frames(tmp_path / "other.mkv", 1)  # another output is free
        writer.write(Frame(picture(0, 6, 8), None, 0))
    assert probe(tmp_path / first).frames == 1
    assert not list(tmp_path.rglob(".*"))
    frames(tmp_path / second, 1, codec, overwrite=True)


HOLD = """
import sys, time
from pathlib import Path
from vsr_ops.video import made_info, open_writer
with open_writer(Path(sys.argv[1]), made_info(8, 6, 2), size=(6, 8), codec=sys.argv[2]):
    print("held", flush=True)
    time.sleep(120)
"""


@posix
@pytest.mark.parametrize(("name", "codec"), [("o.mkv", "ffv1"), ("new", "png")])
def test_a_run_in_another_process_counts_until_it_is_killed(tmp_path: Path, name: str, codec: str) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / name), codec]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(VideoError, match="another run is writing"):
            check_output(tmp_path / name, codec=codec)
        other.send_signal(signal.SIGKILL)
    frames(tmp_path / name, 2, codec)
    assert probe(tmp_path / name).frames == 2
    assert not list(tmp_path.glob(".*lock")), "the killed run's lock is gone with the next run"


def test_of_many_at_once_never_two_hold_an_output(tmp_path: Path) -> None:
    """Locks come and go under a thousand hands, and are removed: whoever holds one must hold the one that stands."""
    holders, most, held = 0, 0, 0
    count = threading.Lock()
    end = time.monotonic() + 2

    def runs() -> None:
        nonlocal holders, most, held
        while time.monotonic() < end:
            try:
                with claimed(tmp_path / "o.mkv"):
                    with count:
                        holders, held = holders + 1, held + 1
                        most = max(most, holders)
                    time.sleep(0.0005)
                    with count:
                        holders -= 1
            except VideoError:
                time.sleep(0.0001)

    threads = [threading.Thread(target=runs) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and held > 20
    assert not list(tmp_path.iterdir())


@posix
def test_what_is_no_lock_of_ours_is_left_alone_and_named_where_it_is_in_the_way(tmp_path: Path) -> None:
    for make in (Path.mkdir, lambda lock: lock.symlink_to(tmp_path / "away"), os.mkfifo):
        make(tmp_path / ".o.mkv.lock")
        with pytest.raises(VideoError, match=r"\.o\.mkv\.lock' is in the way"):
            frames(tmp_path / "o.mkv", 1)
        assert [path.name for path in tmp_path.iterdir()] == [".o.mkv.lock"]
        (tmp_path / ".o.mkv.lock").rmdir() if make is Path.mkdir else (tmp_path / ".o.mkv.lock").unlink()


def test_a_folder_made_for_a_run_that_came_to_nothing_goes_again(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), held_folder(tmp_path / "a" / "b"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with held_folder(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "c").touch()
        with pytest.raises(VideoError, match="another run"), held_folder(tmp_path / "a" / "b"):
            pass
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["c"]


def test_a_run_holds_its_output_before_anything_is_spent(tmp_path: Path, tiny: object) -> None:
    """A second run is refused at once, not after its sampling."""
    from vsr_ops.pipeline.job import Job
    from vsr_ops.pipeline.sampler import Settings
    from vsr_ops.pipeline.upscale import upscale

    numbered(tmp_path / "a", 1, (32, 32))
    job = Job(probe(tmp_path / "a"), 0, 1, 2.0)
    seen: list[str] = []

    def progress(stage: str, done: int, total: int) -> None:
        if stage not in seen:
            seen.append(stage)
            with pytest.raises(VideoError, match="another run is writing"):
                upscale(tiny, job, tmp_path / "o.png", Settings(steps=0), "png8", True)  # type: ignore[arg-type]

    upscale(tiny, job, tmp_path / "o.png", Settings(steps=0), "png8", progress=progress)  # type: ignore[arg-type]
    assert seen[0] == "encode" and probe(tmp_path / "o.png").width == 64


@posix
def test_a_full_disk_leaves_no_lock(tmp_path: Path) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(VideoError, match="cannot be written to"), claimed(tmp_path / "o.mkv"):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
