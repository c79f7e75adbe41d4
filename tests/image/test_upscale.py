"""The LR video at the result's size: exact sizes, chunks that do not show, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vsr_ops.errors import SettingError
from vsr_ops.image.resize import RESIZE, resize
from vsr_ops.image.upscale import CHUNK, of_factor, target_size, upscale_frames


@pytest.mark.parametrize(
    ("scale", "width", "height", "expected"),
    [
        (4.0, 0, 0, (120, 200)),
        (0.5, 0, 0, (15, 25)),
        (1.3, 0, 0, (39, 65)),
        (4.0, 100, 0, (60, 100)),
        (4.0, 0, 45, (45, 75)),
        (4.0, 33, 7, (7, 33)),
    ],
)
def test_the_size_follows_from_scale_or_sides(scale: float, width: int, height: int, expected: tuple[int, int]) -> None:
    assert target_size((30, 50), scale, width, height) == expected


@pytest.mark.parametrize(
    ("scale", "width", "height"), [(0.0, 0, 0), (-1.0, 0, 0), (4.0, -1, 5), (0.001, 0, 0), (999.0, 0, 0)]
)
def test_sizes_that_cannot_be_are_refused(scale: float, width: int, height: int) -> None:
    with pytest.raises(SettingError, match="expected"):
        target_size((30, 50), scale, width, height)


@pytest.mark.parametrize("method", RESIZE)
@pytest.mark.parametrize("count", [1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
def test_chunks_do_not_show(method: str, count: int) -> None:
    frames = torch.rand(count, 3, 6, 9, generator=torch.Generator().manual_seed(0))
    done: list[int] = []
    out = upscale_frames(frames, (13, 20), method, tick=done.append)
    assert torch.equal(out, resize(method, frames, (13, 20)).clamp(0, 1))
    assert sum(done) == count


def test_a_model_enlarges_first_and_the_size_is_exact_all_the_same() -> None:
    frames = torch.rand(5, 3, 6, 9, generator=torch.Generator().manual_seed(0))

    def twice(part: Tensor) -> Tensor:
        assert part.shape[0] <= CHUNK
        return part.repeat_interleave(2, -1).repeat_interleave(2, -2)

    whole = frames.repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert torch.equal(upscale_frames(frames, (12, 18), upscale_fn=twice), whole)
    assert upscale_frames(frames, (11, 19), upscale_fn=twice).shape == (5, 3, 11, 19)


def test_values_stay_pictures() -> None:
    step = torch.zeros(1, 3, 8, 8)
    step[..., 4:] = 1
    out = upscale_frames(step, (32, 32), "lanczos")
    assert float(out.min()) == 0 and float(out.max()) == 1


def test_a_model_that_enlarges_nothing_cleans_what_is_enlarged() -> None:
    """As DiffBIR runs its SwinIRs."""
    frames, seen = torch.rand(5, 3, 6, 9, generator=torch.Generator().manual_seed(0)), list[Tensor]()

    def cleaned(part: Tensor) -> Tensor:
        seen.append(part)
        return part / 2

    enlarged = resize("bicubic", frames, (13, 20)).clamp(0, 1)
    assert torch.equal(upscale_frames(frames, (13, 20), upscale_fn=of_factor(cleaned, 1)), enlarged / 2)
    assert torch.equal(torch.cat(seen), enlarged)
