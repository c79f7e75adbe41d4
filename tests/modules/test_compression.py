"""The compression head: what it looks at, what it learns, its plot and its files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tests.conftest import randomise
from tests.support.tensors import rand
from tests.support.tiny_training import descended
from training.data.degradation import h264
from training.loop.draws import generator_at, integer, uniform
from training.loop.recipe import to_recipe
from training.tasks.compression import CompressionDataSettings, CompressionTask, draw_crf
from vsr_ops.checkpoints.module_file import write_module
from vsr_ops.errors import CheckpointError, SettingError
from vsr_ops.modules.compression import (
    COARSEST,
    CROP,
    KIND,
    CompressionHead,
    HeadShape,
    crops,
    estimate_compression,
    level_of,
    levels_or_given,
    load_compression,
    mean_crf,
    mean_level,
    rank_correlation,
    seen,
    write_compression,
)
from vsr_ops.views.levels import plot_levels

SMALL = HeadShape((16, 24, 32), (1, 1, 1))


def filled() -> CompressionHead:
    model = CompressionHead(SMALL)
    randomise(model, 3)
    with torch.no_grad():
        model.leave.weight.mul_(0.05)
        model.leave.bias.fill_(0.5)  # type: ignore[union-attr]
    return model.eval().requires_grad_(False)


def texture(rng: torch.Generator, frames: int = 2, size: int = 64) -> Tensor:
    """A clip of grain, blocks and soft shapes of several sizes that moves by whole pixels."""
    side = size + 8
    picture = torch.zeros(3, side, side)
    for cell in (2, 4, 8, 32):
        small = torch.rand(1, 3, side // cell + 1, side // cell + 1, generator=rng)
        large = F.interpolate(small, (side, side), mode="nearest" if integer(rng, 2) else "bicubic")[0]
        picture += (large - 0.5) * uniform(rng, 0.1, 1) * (cell / 32) ** 0.5
    picture = (picture * uniform(rng, 0.5, 2) + 0.5).clamp(0, 1)
    down, right = integer(rng, 5), integer(rng, 5)
    moved = [picture[:, k * down : k * down + size, k * right : k * right + size] for k in range(frames)]
    return torch.stack(moved)


# --- What it looks at -----------------------------------------------------------------------------------------------


def test_it_is_small() -> None:
    assert sum(value.numel() for value in CompressionHead().parameters()) <= 300_000


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1, 1), (1, 2, 2)),
        ((33, 50), (1, 34, 50)),
        ((64, 96), (1, 64, 96)),
        ((64, 97), (1, 64, 96)),
        ((180, 320), (6, 96, 96)),
        ((1080, 1920), (9, 96, 96)),
    ],
)
def test_crops_are_of_the_frame_as_it_is(size: tuple[int, int], expected: tuple[int, int, int]) -> None:
    frame = rand(3, *size)
    parts = crops(frame)
    assert (parts.shape[0], *parts.shape[2:]) == expected
    first = frame[:, :CROP, :CROP]
    assert torch.equal(parts[0, :, : first.shape[1], : first.shape[2]], first)
    if size == (1080, 1920):
        assert torch.equal(parts[-1], frame[:, 976 : 976 + CROP, 1824 : 1824 + CROP]), "16-pixel grid, next to the end"


def test_small_changes_are_seen_as_well_as_large_ones() -> None:
    picture = torch.full((1, 3, 2, 4), 0.5)
    picture[..., 1] += 1 / 255
    picture[..., 2] += 100 / 255
    changes = seen(picture)[0, 3, 0]
    assert 0.2 < float(changes[0]) < 0.3 and 1 < float(changes[1]) < 2, "one level, and a hundred"
    assert seen(picture).shape == (1, 9, 2, 4) and not seen(picture)[0, 6:].any(), "nothing changes downwards"


def test_places_count_as_the_head_is_sure_of_them() -> None:
    level = torch.tensor([[0.2, 0.8, 0.5]])
    assert float(mean_level(level, torch.zeros(1, 3))) == pytest.approx(0.5)
    assert float(mean_level(level, torch.tensor([[0.0, 50.0, 0.0]]))) == pytest.approx(0.8)


# --- Estimates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (30, 47), (100, 130)])
def test_an_estimate_is_one_number_a_frame(size: tuple[int, int]) -> None:
    video = rand(3, 3, *size)
    done: list[int] = []
    levels = estimate_compression(filled(), video, done.append)
    assert levels.shape == (3,) and levels.dtype == torch.float32 and done == [1, 1, 1]
    assert bool(((levels >= 0) & (levels <= 1)).all())
    alone = torch.cat([estimate_compression(filled(), frame[None]) for frame in video])
    assert torch.equal(levels, alone), "frames do not see one another"


def test_a_video_without_frames_is_refused() -> None:
    with pytest.raises(SettingError, match="at least one frame"):
        estimate_compression(filled(), torch.zeros(0, 3, 8, 8))


def test_a_given_crf_is_taken_for_every_frame(tmp_path: Path) -> None:
    video = rand(3, 3, 40, 40)
    assert torch.equal(levels_or_given(tmp_path / "none", video, 25.5), torch.full((3,), 0.5))
    path = tmp_path / "head.safetensors"
    write_compression(path, filled().half().float(), "nothing")
    assert torch.equal(levels_or_given(path, video), estimate_compression(load_compression(path), video))


@pytest.mark.parametrize("crf", [-0.1, 51.1, float("nan")])
def test_a_crf_outside_its_range_is_refused(crf: float) -> None:
    with pytest.raises(SettingError, match=rf"crf is {crf}: expected"):
        level_of(crf)


def test_levels_are_crfs_over_51() -> None:
    assert level_of(0) == 0 and level_of(COARSEST) == 1
    assert mean_crf(torch.tensor([0.0, 1.0])) == pytest.approx(25.5)


def test_the_plot_is_a_picture_of_the_curve() -> None:
    flat, steep = torch.full((6,), 0.5), torch.linspace(0.2, 0.8, 6)
    picture = plot_levels(steep, cuts=(3,), width=400)
    assert picture.shape[0] == 3 and picture.shape[2] == 400 and 0 <= picture.min() < picture.max() <= 1
    assert not torch.equal(picture, plot_levels(steep, width=400)), "a cut is drawn"
    assert not torch.equal(plot_levels(flat, width=400), plot_levels(steep, width=400))
    assert plot_levels(flat[:1]).shape[2] == 960


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1.0, 2.0, 3.0], [10.0, 20.0, 90.0], 1.0),
        ([1.0, 2.0, 3.0], [3.0, 2.0, 1.0], -1.0),
        ([1.0, 1.0, 2.0], [1.0, 2.0, 3.0], 3**0.5 / 2),
        ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], 0.0),
    ],
)
def test_the_rank_correlation_is_spearmans(first: list[float], second: list[float], expected: float) -> None:
    assert rank_correlation(torch.tensor(first), torch.tensor(second)) == pytest.approx(expected)


# --- Learning -------------------------------------------------------------------------------------------------------


def test_it_learns_to_rank_what_was_compressed() -> None:
    """A few seconds of training on noise tell CRFs of clips that it never saw, of another size, apart."""

    def sample(number: int) -> tuple[Tensor, float]:
        rng = generator_at(0, number)
        clip = texture(rng)
        crf = (0, 15, 20, 25, 30, 35, 40)[integer(rng, 7)]
        return (h264(clip, crf) if crf else clip)[integer(rng, 2)], crf / COARSEST

    samples = [sample(number) for number in range(128)]
    pictures, truth = torch.stack([x for x, _ in samples]), torch.tensor([y for _, y in samples])
    torch.manual_seed(0)
    model, rng, steps = CompressionHead(SMALL), torch.Generator().manual_seed(1), 110
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, (step + 1) / 10) * (1 - 0.9 * step / steps)
        index = torch.randint(len(samples), (12,), generator=rng)
        loss = F.smooth_l1_loss(mean_level(*model(pictures[index])), truth[index], beta=0.05)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    estimates: list[float] = []
    for seed in range(4):
        clip = texture(generator_at(99, seed), 3, 112)
        levels = [float(estimate_compression(model, h264(clip, crf)).mean()) for crf in (15, 25, 35)]
        assert levels[2] > max(levels[:2]) + 0.08, f"clip {seed}: {levels}"
        estimates += levels
    assert rank_correlation(torch.tensor(estimates), torch.tensor([15.0, 25.0, 35.0] * 4)) > 0.6


TINY: dict[str, object] = {
    "task": "compression",
    "train": {"steps": 1},
    "model": {"widths": [8], "blocks": [1]},
    "data": {"size": 32, "crop": 16, "frames": 2, "crops": 2, "qualities": 3, "scales": [1, 2]},
}


def test_the_trainer_s_task_learns_and_exports(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((100, 100), Image.Resampling.BICUBIC).save(tmp_path / "oak.png")
    task = CompressionTask(to_recipe(TINY), tmp_path, tmp_path)
    task.prepare(torch.device("cpu"))
    samples = [task.sample(generator_at(0, number)) for number in range(2)]
    again = task.sample(generator_at(0, 1))
    assert all(torch.equal(samples[1][key], again[key]) for key in again)
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in again}
    assert batch["pictures"].shape == (2, 6, 3, 16, 16) and batch["level"].shape == (2, 6)
    torch.manual_seed(0)
    model = task.build()
    found = descended(lambda: task.loss(model, batch), model, 3e-3, 12)
    assert set(found) == {"loss", "crf_error", "rank"} and found["loss"][-1] < 0.7 * found["loss"][0]
    assert task.picture(model, batch).shape[0] == 3
    task.export(model, tmp_path / "head.safetensors", "nothing")
    assert load_compression(tmp_path / "head.safetensors").shape == HeadShape((8,), (1,))


def test_training_sees_clean_clips_and_every_crf() -> None:
    drawn = [
        draw_crf(generator_at(1, number), CompressionDataSettings(finest=15, coarsest=17)) for number in range(400)
    ]
    clean = [crf for crf in drawn if crf in (None, 1)]
    assert {*drawn} == {None, 1, 15, 16, 17} and 0.1 < len(clean) / len(drawn) < 0.2


@pytest.mark.parametrize(
    ("table", "values", "said"),
    [
        ("model", {"widths": [8, 8]}, "two lists of one length"),
        ("model", {"start": "lite"}, "its own shape"),
        ("data", {"crop": 40}, "data.crop 40"),
        ("data", {"size": 33}, "data.size is 33"),
        ("data", {"finest": 41}, "data.finest 41"),
        ("data", {"scales": [0]}, "data.scales is [0]"),
    ],
)
def test_a_wrong_recipe_is_refused(table: str, values: dict[str, object], said: str, tmp_path: Path) -> None:
    changed = {**TINY, table: {**TINY[table], **values}}  # type: ignore[dict-item]
    with pytest.raises(SettingError) as caught:
        CompressionTask(to_recipe(changed), tmp_path, tmp_path)
    assert said in str(caught.value) and "\n" not in str(caught.value)


# --- Files ----------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path: Path) -> None:
    model = filled().half().float()
    write_compression(tmp_path / "h.safetensors", model, "nothing")
    read = load_compression(tmp_path / "h.safetensors")
    assert read.shape == SMALL and not read.training
    assert not any(parameter.requires_grad for parameter in read.parameters())
    video = rand(1, 3, 20, 20)
    assert torch.equal(estimate_compression(read, video), estimate_compression(model, video))


@pytest.mark.parametrize("config", [{"widths": 3}, {"widths": [4], "blocks": [1, 1]}, {"depth": [2]}])
def test_a_configuration_of_something_else_is_refused(tmp_path: Path, config: dict[str, object]) -> None:
    write_module(tmp_path / "h.safetensors", KIND, config, {"weight": torch.zeros(1)}, "nothing")
    with pytest.raises(CheckpointError, match="no compression head's") as caught:
        load_compression(tmp_path / "h.safetensors")
    assert "\n" not in str(caught.value)


def test_another_kind_or_width_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "h.safetensors"
    write_module(path, "refiner", {}, {"weight": torch.zeros(1)}, "nothing")
    with pytest.raises(CheckpointError, match="kind 'refiner', expected kind 'compression'"):
        load_compression(path)
    write_module(path, KIND, {"widths": [8, 24, 32], "blocks": [1, 1, 1]}, filled().state_dict(), "nothing")
    with pytest.raises(CheckpointError, match="of the wrong shape"):
        load_compression(path)
