"""Clean clips: cameras that move as said, held-out names, and files that cannot be read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from skimage.data import astronaut, coffee

from training.data.data import Source, clip_at, load_sources, parallax_clip, random_clip
from training.data.photos import Path as CameraPath
from training.data.photos import composite, positions, render
from training.loop.draws import generator_at
from vsr_ops.errors import VideoError
from vsr_ops.flow.warp import dis_flow


def photo(size: int = 96) -> torch.Tensor:
    return (torch.rand(3, size, size, generator=generator_at(0, 0)) * 255).to(torch.uint8)


def save(path: Path) -> None:
    Image.fromarray(photo(40).permute(1, 2, 0).numpy()).save(path)


def save_frames(folder: Path, numbers: Iterable[int], ending: str = "png", light: int = 0) -> None:
    """A camera that pans by a pixel a frame."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        picture = astronaut()[60:108, 180 + number : 228 + number] // 4 + light
        Image.fromarray(picture).save(folder / f"frame_{number:03}.{ending}")


def save_video(path: Path, codec: str, frames: int = 8) -> None:
    with av.open(path, "w") as file:
        stream = file.add_stream(codec, rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(frames):
            picture = np.ascontiguousarray(astronaut()[:48, number : number + 64])
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())


def load(folder: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Shapes of photographs and of videos, by name."""
    photos, videos = ({source.name: tuple(source.pixels.shape) for source in kind} for kind in load_sources(folder))
    return photos, videos


def test_a_still_camera_is_the_crop_and_a_pan_a_shifted_crop() -> None:
    picture = photo().float() / 255
    still = render(picture, positions(CameraPath(), 3, 32) + 39.5)
    assert (still - picture[:, 24:56, 24:56]).abs().max() < 1e-3
    pan = render(picture, positions(CameraPath(pan=(2, -1)), 3, 32) + 39.5)
    assert (pan[2] - picture[:, 23:55, 26:58]).abs().max() < 1e-3


def test_a_step_gives_the_same_clip_again() -> None:
    sources = [Source("a", photo()[None])], []
    a, b, c = (clip_at(sources, 3, 32, 7, step) for step in (4, 4, 5))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_parallax_stays_in_range() -> None:
    clip = parallax_clip(photo(), photo(), 4, 32, generator_at(1, 1))
    assert clip.shape == (4, 3, 32, 32) and float(clip.min()) >= 0 and float(clip.max()) <= 1
    back, front = torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2)
    assert torch.equal(composite(back, front, torch.full((1, 1, 2, 2), 0.25)), torch.full((1, 3, 2, 2), 0.25))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_layers_of_a_parallax_clip_move_differently(seed: int) -> None:
    back, front = (torch.from_numpy(p[:400, :400].copy()).permute(2, 0, 1) for p in (astronaut(), coffee()))
    black, white = torch.zeros_like(back), torch.full_like(front, 255)

    def made(back: torch.Tensor, front: torch.Tensor) -> torch.Tensor:
        return parallax_clip(back, front, 3, 96, generator_at(seed, 0))[:2]

    def moves(clip: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        return dis_flow(clip[:1], clip[1:])[0, :, where].median(dim=1).values

    mask = made(black, white)[:, 0]
    near, far = mask.amin(0) > 0.95, mask.amax(0) < 0.05
    both = made(back, front)
    assert (moves(both, near) - moves(both, far)).norm() > 1
    assert (moves(both, near) - moves(made(black, front), near)).norm() < 0.5
    assert (moves(both, far) - moves(made(back, black), far)).norm() < 0.5


def test_frames_that_count_up_are_a_video_and_other_pictures_photographs(tmp_path: Path) -> None:
    save_frames(tmp_path / "walk", range(5, 15))
    save_frames(tmp_path / "run", range(0, 20, 2), "jpg")
    save_frames(tmp_path / "album", [1, 4, 9, 16, 25, 36])
    save(tmp_path / "album" / "harbour.png")
    (tmp_path / "camera").mkdir()
    for index in range(6):
        Image.fromarray(coffee()[60 * index :][:60, 90 * index :][:, :60]).save(tmp_path / f"camera/dsc{index}.png")
    photos, videos = load(tmp_path)
    album = {f"frame_{n:03}": (1, 3, 48, 48) for n in (1, 4, 9, 16, 25, 36)} | {"harbour": (1, 3, 40, 40)}
    assert photos == album | {f"dsc{index}": (1, 3, 60, 60) for index in range(6)}
    assert videos == {"run": (10, 3, 24, 24), "walk": (10, 3, 48, 48)}


def test_videos_are_halved_unless_lossless_and_test_folders_left_out(tmp_path: Path) -> None:
    save_video(tmp_path / "lossy.mp4", "libx264")
    save_video(tmp_path / "exact.mkv", "ffv1")
    (tmp_path / "test_video").mkdir()
    save_video(tmp_path / "test_video" / "other.mkv", "ffv1")
    assert load(tmp_path) == ({}, {"exact": (8, 3, 48, 64), "lossy": (8, 3, 24, 32)})


def test_no_clip_crosses_a_scene_cut_or_a_gap(tmp_path: Path) -> None:
    save_frames(tmp_path / "film", range(8))
    save_frames(tmp_path / "film", range(8, 16), light=160)
    save_frames(tmp_path / "film", range(20, 28), light=160)
    _, videos = load_sources(tmp_path)
    assert {video.name: len(video.pixels) for video in videos} == {"film 1": 8, "film 2": 8, "film 3": 8}
    for step in range(20):
        light = random_clip([], videos, 5, 32, generator_at(0, step), 1.0).mean((1, 2, 3))
        assert light.max() - light.min() < 0.1


def test_a_torn_video_is_named_and_skipped(tmp_path: Path) -> None:
    for index in range(20):
        save(tmp_path / f"{chr(97 + index)}photo.png")
    save_video(tmp_path / "whole.mp4", "libx264")
    (tmp_path / "torn.mp4").write_bytes((tmp_path / "whole.mp4").read_bytes()[:600])
    with pytest.warns(UserWarning) as told:
        photos, videos = load_sources(tmp_path)
    assert len(photos) == 20 and [video.name for video in videos] == ["whole"]
    assert "torn.mp4" in str(told[0].message) and "skipped 1 of 22" in str(told[1].message)


def test_held_out_names_are_left_out_and_broken_files_are_named(tmp_path: Path) -> None:
    for index in range(30):
        save(tmp_path / f"{chr(97 + index % 26)}photo{index * index}.png")
    save(tmp_path / "secret.png")
    (tmp_path / "torn.png").write_bytes(b"torn")
    with pytest.warns(UserWarning) as told:
        photos, videos = load_sources(tmp_path, held_out={"secret"})
    assert "torn.png" in str(told[0].message) and "skipped 1 of 31" in str(told[1].message)
    assert len(photos) == 30 and not videos and "secret" not in {p.name for p in photos}
    (tmp_path / "torn2.png").write_bytes(b"torn")
    with pytest.raises(VideoError, match="2 of 32"), pytest.warns(UserWarning):
        load_sources(tmp_path, held_out={"secret"})
