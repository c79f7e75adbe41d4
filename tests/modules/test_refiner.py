"""The refiner: what it returns at its ends, seams that are none, files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import randomise
from tests.support.tensors import rand
from vsr_ops.checkpoints.module_file import write_module
from vsr_ops.errors import CheckpointError, SettingError
from vsr_ops.flow.warp import dis_flow
from vsr_ops.modules import neighbours as neighbours_module
from vsr_ops.modules import refiner
from vsr_ops.modules.neighbours import flow_by_halves, neighbours
from vsr_ops.modules.refiner import (
    Refiner,
    RefinerShape,
    load_refiner,
    refine,
    refine_frames,
    write_refiner,
)

SMALL = RefinerShape(width=8, blocks=1)


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    """A decoded and an upscaled video that leave room for what is added."""
    return rand(*shape, seed=1), 0.25 + 0.5 * rand(*shape, seed=2)


def filled(shape: RefinerShape = SMALL, scale: float = 0.05) -> Refiner:
    """A refiner with random weights everywhere, whose answers are small enough not to be clamped much."""
    model = Refiner(shape)
    randomise(model, 3)
    with torch.no_grad():
        model.leave.weight.mul_(scale)
    return model.eval()


# --- What it returns ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(1, 1), (6, 8), (7, 5)])
def test_a_fresh_refiner_returns_the_upscaled_video(height: int, width: int) -> None:
    decoded, upscaled = pair(2, 3, height, width)
    out = refine(Refiner(), decoded, upscaled)
    assert torch.equal(out, upscaled) and out is not upscaled


def test_w_of_one_returns_the_upscaled_video_itself() -> None:
    decoded, upscaled = pair(1, 3, 8, 8)
    assert refine(filled(), decoded, upscaled, 1.0) is upscaled


def test_w_mixes_with_the_upscaled_video() -> None:
    decoded, upscaled = pair(2, 3, 12, 16)
    model = filled()
    refined = refine(model, decoded, upscaled)
    assert (refined - upscaled).abs().mean() > 1e-3
    inside = (refined > 0) & (refined < 1)
    for w in (0.25, 0.75):
        mixed = (1 - w) * refined + w * upscaled
        assert (refine(model, decoded, upscaled, w) - mixed)[inside].abs().max() < 1e-6


def test_satecos_form_is_the_papers_mix() -> None:
    """w X_u + (1 - w) X_d + R up to the w it was trained at; from there R goes, and at 1 the upscaled video is left."""
    decoded, upscaled = pair(2, 3, 12, 16)
    shape = RefinerShape(width=8, blocks=1, form="paper", w0=0.5)
    plain = refine(Refiner(shape), decoded, upscaled)
    assert torch.equal(plain, 0.5 * upscaled + 0.5 * decoded), "a fresh one is the plain mix"
    model = filled(shape)
    with torch.no_grad():
        added = model(decoded, upscaled)
    assert added.abs().mean() > 1e-3
    for w in (0.0, 0.3, 0.5, 0.8):
        expected = w * upscaled + (1 - w) * decoded + min(1, (1 - w) / 0.5) * added
        found = refine(model, decoded, upscaled, sateco_w=w)
        assert (found - expected.clamp(0, 1)).abs().max() < 1e-6
    assert refine(model, decoded, upscaled, sateco_w=1.0) is upscaled
    # An artist's w goes from what was trained to the upscaled video, whatever the form.
    assert torch.equal(refine(model, decoded, upscaled), refine(model, decoded, upscaled, sateco_w=0.5))
    assert torch.equal(refine(model, decoded, upscaled, 0.6), refine(model, decoded, upscaled, sateco_w=0.8))
    assert refine(model, decoded, upscaled, 1.0) is upscaled
    with torch.no_grad():
        assert torch.equal(model.refined(decoded, upscaled).clamp(0, 1), refine(model, decoded, upscaled))


def test_satecos_w_is_of_its_own_form() -> None:
    decoded, upscaled = pair(1, 3, 8, 8)
    with pytest.raises(SettingError, match=r"SATeCo's w is 0\.5 and the refiner of the form 'free'"):
        refine(filled(), decoded, upscaled, sateco_w=0.5)
    with pytest.raises(SettingError, match=r"SATeCo's w is 1\.5"):
        refine(filled(RefinerShape(8, 1, form="paper")), decoded, upscaled, sateco_w=1.5)
    for shape in (RefinerShape(form="other"), RefinerShape(form="paper", w0=1.0)):
        with pytest.raises(SettingError, match="expected one of free, paper"):
            Refiner(shape)


def test_both_videos_matter() -> None:
    decoded, upscaled = pair(1, 3, 12, 16)
    first, other = refine(filled(), decoded, upscaled), refine(filled(), 1 - decoded, upscaled)
    assert not torch.allclose(first, other, atol=1e-3)


def test_the_result_is_a_picture_of_the_inputs_dtype() -> None:
    decoded, upscaled = pair(1, 3, 9, 11)
    out = refine(filled(scale=5.0), decoded.half(), upscaled.half())
    assert out.dtype == torch.float16 and out.shape == upscaled.shape
    assert float(out.min()) == 0 and float(out.max()) == 1


def test_ticks_count_frames() -> None:
    done: list[int] = []
    refine(filled(), *pair(3, 3, 4, 4), tick=done.append)
    assert done == [1, 1, 1]


# --- Tiles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize(("height", "width"), [(40, 56), (41, 57), (16, 33), (31, 16)])
def test_tiles_are_the_whole(monkeypatch: pytest.MonkeyPatch, blocks: int, height: int, width: int) -> None:
    model = filled(RefinerShape(width=8, blocks=blocks, follows=blocks == 2))
    decoded, upscaled = pair(2, 3, height, width)
    whole = refine(model, decoded, upscaled)
    monkeypatch.setattr(refiner, "TILE", 16)
    assert (refine(model, decoded, upscaled) - whole).abs().max() < 1e-6


def test_the_margin_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison of tiles with the whole can fail: it does with a shorter reach."""
    model = filled()
    decoded, upscaled = pair(1, 3, 40, 56)
    whole = refine(model, decoded, upscaled)
    monkeypatch.setattr(refiner, "TILE", 16)
    monkeypatch.setattr(Refiner, "reach", 2)
    assert (refine(model, decoded, upscaled) - whole).abs().max() > 1e-4


def test_nothing_further_than_its_reach_matters() -> None:
    model = filled()
    decoded, upscaled = pair(1, 3, 8, 40)
    changed = decoded.clone()
    changed[..., 20:] = 1 - changed[..., 20:]
    difference = (refine(model, changed, upscaled) - refine(model, decoded, upscaled)).abs().amax((0, 1, 2))
    assert difference[: 20 - model.reach].max() == 0 and difference[20 - model.reach : 20].max() > 0


# --- What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("w", [-0.01, 1.01, float("nan")])
def test_w_outside_its_range_is_refused(w: float) -> None:
    with pytest.raises(SettingError, match=rf"w is {w}: expected"):
        refine(filled(), *pair(1, 3, 4, 4), w)


@pytest.mark.parametrize("shape", [(1, 3, 4, 6), (2, 3, 4, 4)])
def test_videos_of_two_sizes_are_refused(shape: tuple[int, ...]) -> None:
    decoded, _ = pair(1, 3, 4, 4)
    with pytest.raises(SettingError, match="expected one size") as caught:
        refine(filled(), decoded, rand(*shape))
    assert str(tuple(decoded.shape)) in str(caught.value) and str(shape) in str(caught.value)


# --- Files ----------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path: Path) -> None:
    model = filled().half().float()
    write_refiner(tmp_path / "r.safetensors", model, "nothing")
    read = load_refiner(tmp_path / "r.safetensors")
    assert read.shape == SMALL and not read.training
    assert not any(parameter.requires_grad for parameter in read.parameters())
    assert all(torch.equal(value, read.state_dict()[name]) for name, value in model.state_dict().items())
    videos = pair(1, 3, 6, 6)
    # Channels lie together in what is read, and sums are rounded in another order.
    assert (refine(read, *videos) - refine(model, *videos)).abs().max() < 1e-6
    write_refiner(tmp_path / "again.safetensors", read, "nothing")


def test_the_bundled_one_loads_and_works() -> None:
    decoded, upscaled = pair(1, 3, 10, 14)
    out = refine(load_refiner("lite"), decoded, upscaled)
    assert out.shape == upscaled.shape and bool(torch.isfinite(out).all()) and not torch.equal(out, upscaled)


@pytest.mark.parametrize("config", [{"width": 8, "layers": 2}, {"width": 8, "blocks": "many"}])
def test_a_configuration_of_something_else_is_refused(tmp_path: Path, config: dict[str, object]) -> None:
    write_module(tmp_path / "r.safetensors", refiner.KIND, config, filled().state_dict(), "nothing")
    with pytest.raises(CheckpointError, match="no refiner's"):
        load_refiner(tmp_path / "r.safetensors")


def test_weights_of_another_width_are_refused(tmp_path: Path) -> None:
    config = {"width": 12, "blocks": 1}
    write_module(tmp_path / "r.safetensors", refiner.KIND, config, filled().state_dict(), "nothing")
    with pytest.raises(CheckpointError, match="of the wrong shape") as caught:
        load_refiner(tmp_path / "r.safetensors")
    assert "\n" not in str(caught.value) and "refiner" in str(caught.value)


@pytest.mark.parametrize("follows", [False, True])
@pytest.mark.parametrize("frames", [1, 2, 3, 8, 10, 11, 19, 30])
def test_streamed_frames_are_those_of_the_whole_video(frames: int, follows: bool) -> None:
    model = filled(RefinerShape(width=8, blocks=3, follows=follows))
    decoded, upscaled = pair(frames, 3, 24, 26)
    with torch.no_grad():
        whole = (upscaled + model(decoded, upscaled)).clamp(0, 1)
    streamed = torch.stack(list(refine_frames(model, zip(decoded, upscaled, strict=True))))
    assert (streamed - whole).abs().max() < 1e-5


def test_every_frame_is_evaluated_once() -> None:
    """However many chunks a scene has: what the next one needs is carried over."""
    model = filled(RefinerShape(width=8, blocks=3))
    entered, left = list[int](), list[int]()
    model.enter.register_forward_pre_hook(lambda _, given: entered.append(len(given[0])))
    model.leave.register_forward_pre_hook(lambda _, given: left.append(len(given[0])))
    decoded, upscaled = pair(3 * refiner.CHUNK + 1, 3, 8, 10)
    refine(model, decoded, upscaled)
    assert sum(entered) == sum(left) == len(decoded)


def test_a_frame_sees_its_neighbours_but_not_past_a_cut() -> None:
    model = filled(RefinerShape(width=8, blocks=3))
    decoded, upscaled = pair(12, 3, 10, 12)
    changed = decoded.clone()
    changed[5] = 1 - changed[5]
    together = refine(model, decoded, upscaled) - refine(model, changed, upscaled)
    assert [i for i in range(12) if together[i].abs().max() > 1e-6] == [3, 4, 5, 6, 7]
    apart = refine(model, decoded, upscaled, cuts=(5,)) - refine(model, changed, upscaled, cuts=(5,))
    assert [i for i in range(12) if apart[i].abs().max() > 1e-6] == [5, 6, 7]


@pytest.mark.parametrize(("frames", "cuts"), [(1, ()), (5, ()), (20, ()), (30, ()), (20, (7, 9))])
def test_the_flow_between_two_frames_is_estimated_once(
    monkeypatch: pytest.MonkeyPatch, frames: int, cuts: tuple[int, ...]
) -> None:
    """n frames of one scene need n - 1 flows each way, however many chunks and tiles they are refined in."""
    made: list[tuple[int, int]] = []

    def counted(first: Tensor, second: Tensor) -> Tensor:
        made.extend(
            (round(255 * float(a.mean())), round(255 * float(b.mean()))) for a, b in zip(first, second, strict=True)
        )
        return dis_flow(first, second)

    monkeypatch.setattr(neighbours_module, "dis_flow", counted)
    monkeypatch.setattr(refiner, "TILE", 16)
    video = (torch.arange(frames).view(-1, 1, 1, 1) / 255).expand(-1, 3, 24, 30).contiguous()
    model = filled(RefinerShape(width=8, blocks=3, follows=True))
    assert len(list(refine_frames(model, zip(video, video, strict=True), cuts=cuts))) == frames
    neighbouring = [(k, k + 1) for k in range(frames - 1) if k + 1 not in cuts]
    assert sorted(made) == sorted([*neighbouring, *((after, now) for now, after in neighbouring)])


def smooth(*shape: int) -> Tensor:
    return torch.nn.functional.interpolate(
        rand(*shape[:-2], shape[-2] // 6, shape[-1] // 6), shape[-2:], mode="bicubic"
    )


def test_neighbours_add_nothing_to_what_only_moves() -> None:
    """A right flow brings the neighbours exactly onto the frame; what is covered or out of sight is left out."""
    wide = smooth(1, 3, 96, 192).clamp(0, 1)
    video = torch.cat([wide[..., 30 + 4 * k : 126 + 4 * k] for k in range(3)])
    around = neighbours(video)
    assert around[0, :3].abs().max() == 0 and around[-1, 3:].abs().max() == 0, "nothing before and after a scene"
    straight = torch.cat([(video[:-1] - video[1:]), (video[1:] - video[:-1])]).abs().mean()
    assert around.abs().mean() < 0.05 * straight


@pytest.mark.parametrize("odd", [0, 1])
def test_flow_by_halves_finds_what_moves(odd: int) -> None:
    """A motion of no whole pixel of the halved frames, in frames whose sides cannot all be halved."""
    wide = smooth(1, 3, 96, 192)
    now, after = (wide[..., : 80 + odd, 30 + k : 126 + odd + k] for k in (0, 3))
    forward, backward = flow_by_halves(now, after)
    assert forward.shape == backward.shape == (1, 2, *now.shape[-2:])
    for flow, dx in ((forward, -3.0), (backward, 3.0)):
        apart = (flow - torch.tensor([dx, 0.0]).view(1, 2, 1, 1))[..., 12:-12, 12:-12]
        assert float(apart.norm(dim=1).mean()) < 0.15


def test_neighbours_show_what_flickers() -> None:
    video = smooth(1, 3, 96, 96).clamp(0, 0.9).repeat(3, 1, 1, 1)
    video[1] += 0.01
    around = neighbours(video)
    assert float(around[1].mean()) == pytest.approx(-0.01, abs=1e-3)
    assert float(around[0, 3:].mean()) == pytest.approx(0.01, abs=1e-3)


def test_pictures_too_small_for_a_flow_have_no_neighbours() -> None:
    assert not neighbours(rand(3, 3, 23, 40)).any() and not neighbours(rand(1, 3, 40, 40)).any()
