"""Laws of the comparison pictures: what must be in them bit for bit, where labels may be, what is refused."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from skimage.color import rgb2lab

from vsr_ops.errors import SettingError
from vsr_ops.views.compare import COMPARE, compare, draw_label, heat_colors

NONE = ("", "", "")
#: Names and gain, each another label.
LEGENDS = ((("a", "b"), 8.0), (("a", "c"), 8.0), (("", ""), 8.0), (("", ""), 2.5))


def clips(count: int = 2, frames: int = 3, height: int = 60, width: int = 90) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.rand(frames, 3, height, width, generator=generator) for _ in range(count)]


def changed(a: torch.Tensor, b: torch.Tensor) -> tuple[slice, slice]:
    """The smallest rectangle that holds every pixel in which two pictures (3, h, w) differ."""
    where = (a != b).any(0)
    rows, columns = where.any(1).nonzero().flatten(), where.any(0).nonzero().flatten()
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


@pytest.mark.parametrize("count", [2, 3])
def test_side_by_side_holds_the_videos_and_white_lines(count: int) -> None:
    videos = clips(count)
    result = compare("side by side", videos, NONE[:count])
    line = (result.shape[-1] - count * 90) // (count - 1)
    assert line >= 2 and result.shape == (3, 3, 60, count * 90 + (count - 1) * line)
    for k, video in enumerate(videos):
        left = k * (90 + line)
        assert torch.equal(result[..., left : left + 90], video)
        assert k == 0 or bool((result[..., left - line : left] == 1).all())


@pytest.mark.parametrize("mode", list(COMPARE))
@pytest.mark.parametrize("count", [2, 3])
def test_labels_change_only_the_corner_of_their_own_part(mode: str, count: int) -> None:
    videos = clips(count, 2, 128, 200)
    plain = compare(mode, videos, NONE[:count])
    for k in range(count):
        labels = tuple("ab" if i == k else "" for i in range(count))
        result = compare(mode, videos, labels)
        assert result.shape == plain.shape
        if mode == "difference":
            # Its label is the gain, names or not.
            assert torch.equal(result, plain)
            continue
        down, across = changed(result[0], plain[0])
        parts = {"wipe": [200 * k // count for k in range(count)], "side by side": [k * 202 for k in range(count)]}
        left, top = parts.get(mode, [0] * count)[k], k * 66 if mode == "temporal profile" else 0
        assert left < across.start and across.stop < left + 60 and top < down.start and down.stop < top + 40
        box = result[0][:, down, across]
        assert box.max() > 0.9 and box.median() < 0.4


def test_a_difference_tells_names_and_gain() -> None:
    videos = clips(2, 1, 200, 400)
    pictures = [compare("difference", [videos[0]] * 2, labels, gain=gain) for labels, gain in LEGENDS]
    assert not any(torch.equal(a, b) for i, a in enumerate(pictures) for b in pictures[:i])


@pytest.mark.parametrize(
    ("height", "width", "drawn"), [(64, 400, True), (20, 40, True), (12, 400, False), (64, 9, False)]
)
def test_a_label_stays_inside_whatever_the_room(height: int, width: int, drawn: bool) -> None:
    whole = torch.full((3, height + 9, width + 9), 0.5)
    draw_label(whole[:, :height, :width], "a rather long name of a video\nthat goes on", 10)
    assert bool((whole[:, height:] == 0.5).all()) and bool((whole[:, :, width:] == 0.5).all())
    assert bool((whole != 0.5).any()) == drawn


@pytest.mark.parametrize("position", [0.03, 0.2, 0.5, 0.9])
def test_long_labels_of_a_wipe_end_with_their_part(position: float) -> None:
    videos, split = clips(2, 1, 100, 200), round(200 * position)
    plain = compare("wipe", videos, ("", ""), position=position)
    left = compare("wipe", videos, ("a very long name of a video", ""), position=position)
    right = compare("wipe", videos, ("", "a very long name of a video"), position=position)
    assert torch.equal(left[..., split:], plain[..., split:]) and torch.equal(right[..., :split], plain[..., :split])
    assert torch.equal(left, plain) == (position == 0.03) and torch.equal(right, plain) == (position == 0.9)


def test_a_label_that_fits_is_not_cut() -> None:
    part = torch.zeros(2, 3, 40, 300)
    draw_label(part[0], "name", 10)
    draw_label(part[1][..., :60], "name", 10)
    assert torch.equal(part[0], part[1])


def test_wipe_at_its_ends_is_one_video() -> None:
    for count in (2, 3):
        videos = clips(count)
        assert torch.equal(compare("wipe", videos, NONE[:count], position=1.0), videos[0])
        assert torch.equal(compare("wipe", videos, NONE[:count], position=0.0), videos[-1])


def test_wipe_splits_where_it_is_told() -> None:
    a, b = clips()
    result = compare("wipe", [a, b], ("", ""), position=0.4)
    assert torch.equal(result[..., :35], a[..., :35]) and torch.equal(result[..., 37:], b[..., 37:])
    assert bool((result[..., 35:37] == 1).all())


def test_wipe_of_three_shows_thirds_in_the_middle() -> None:
    videos = clips(3)
    result = compare("wipe", videos, NONE)
    for k, video in enumerate(videos):
        inside = slice(30 * k + 1, 30 * k + 29)
        assert torch.equal(result[..., inside], video[..., inside])


def test_a_sweep_goes_from_the_last_video_to_the_first() -> None:
    a, b = clips(2, 10)
    result = compare("wipe", [a, b], ("", ""), position=0.9, sweep=True)
    assert torch.equal(result[0], b[0]) and torch.equal(result[-1], a[-1])
    shares = [float((result[i] == a[i]).all(0).all(0).float().mean()) for i in range(10)]
    assert all(early < late for early, late in pairwise(shares))
    one = compare("wipe", [a[:1], b[:1]], ("", ""), position=1.0, sweep=True)
    assert torch.equal(one, a[:1])


def test_difference_of_equal_videos_is_the_zero_colour_outside_the_label() -> None:
    video = clips()[0]
    result = compare("difference", [video, video.clone(), video], ("a", "b", "c"))
    zero = heat_colors(torch.zeros(1, 1))
    line = result.shape[-1] - 180
    for part in (result[..., :90], result[..., 90 + line :]):
        assert bool((part[..., 30:, :] == zero).all())


@pytest.mark.parametrize("gain", [1.0, 4.0, 8.0])
def test_difference_is_the_mean_of_the_channels_times_gain(gain: float) -> None:
    a = torch.full((2, 3, 50, 60), 0.25)
    b = a + torch.tensor([0.25, -0.125, 0.0]).view(3, 1, 1)
    result = compare("difference", [a, b], ("a", "b"), gain=gain)
    expected = heat_colors(torch.full((1, 1), 0.125 * gain))
    assert result.shape == a.shape and (result[..., 30:, :] - expected).abs().max() < 1e-6
    assert torch.equal(compare("difference", [b, a], ("a", "b"), gain=gain)[..., 30:, :], result[..., 30:, :])


def test_difference_is_against_the_first() -> None:
    a, b, c = (torch.full((1, 3, 50, 60), value) for value in (0.0, 0.05, 0.1))
    result = compare("difference", [a, b, c], NONE, gain=5.0)
    for value, part in ((0.25, result[..., 30:, :60]), (0.5, result[..., 30:, -60:])):
        assert (part - heat_colors(torch.full((1, 1), value))).abs().max() < 1e-6


def test_heat_rises_evenly_in_lightness_and_ends_where_it_is_told() -> None:
    ramp = heat_colors(torch.linspace(0, 1, 101)[None])
    lightness = rgb2lab(ramp.permute(1, 2, 0).numpy())[0, :, 0]
    steps = np.diff(lightness)
    assert lightness[0] < 1 and lightness[-1] > 95
    assert steps.min() > 0 and steps.max() < 2.5 * steps.mean()
    beyond = heat_colors(torch.tensor([[-1.0, 2.0, float("inf"), float("nan")]]))
    assert torch.equal(beyond[:, 0, 0], ramp[:, 0, 0])
    assert all(torch.equal(beyond[:, 0, k], ramp[:, 0, -1]) for k in (1, 2, 3))


@pytest.mark.parametrize("frames", [1, 5, 64, 100])
def test_profile_of_a_static_video_has_constant_columns(frames: int) -> None:
    videos = [video[:1].expand(frames, -1, -1, -1) for video in clips(3)]
    result = compare("temporal profile", videos, NONE, row=0.5)
    height = frames * -(-64 // frames)
    line = (result.shape[2] - 3 * height) // 2
    assert height >= 64 and line >= 2 and result.shape == (1, 3, 3 * height + 2 * line, 90)
    for k, video in enumerate(videos):
        part = result[0, :, k * (height + line) :][:, :height]
        assert torch.equal(part, video[0, :, 30:31].expand(-1, height, -1))


@pytest.mark.parametrize(("row", "y"), [(0.0, 0), (0.26, 15), (1.0, 59)])
def test_profile_repeats_the_row_of_each_frame_in_order(row: float, y: int) -> None:
    a, b = clips(2, 16)
    result = compare("temporal profile", [a, b], ("", ""), row=row)
    for i in range(16):
        assert torch.equal(result[0, :, 4 * i : 4 * i + 4], a[i, :, y : y + 1].expand(-1, 4, -1))
        bottom = result[0, :, -64:][:, 4 * i : 4 * i + 4]
        assert torch.equal(bottom, b[i, :, y : y + 1].expand(-1, 4, -1))


@pytest.mark.parametrize("mode", list(COMPARE))
def test_inputs_and_dtype_are_kept_and_runs_agree(mode: str) -> None:
    videos = clips()
    before = [video.clone() for video in videos]
    result = compare(mode, videos, ("a", "b"))
    assert all(torch.equal(video, old) for video, old in zip(videos, before, strict=True))
    assert torch.equal(compare(mode, videos, ("a", "b")), result)
    half = compare(mode, [video.half() for video in videos], ("a", "b"))
    assert half.dtype == torch.float16 and half.shape == result.shape
    assert result.dtype == torch.float32 and result.min() >= 0 and result.max() <= 1


@pytest.mark.parametrize("mode", list(COMPARE))
def test_even_frames_give_even_pictures_and_the_smallest_works(mode: str) -> None:
    for height, width in ((270, 480), (1, 1), (2, 700)):
        result = compare(mode, clips(2, 2, height, width), ("first", "second"))
        assert height == 1 or (result.shape[2] % 2 == 0 and result.shape[3] % 2 == 0)


def test_unknown_mode_lists_the_known_ones() -> None:
    with pytest.raises(SettingError, match=r"'onion'.*side by side, wipe, difference, temporal profile"):
        compare("onion", clips(), ("a", "b"))


@pytest.mark.parametrize("count", [0, 1, 4])
def test_two_or_three_videos(count: int) -> None:
    with pytest.raises(SettingError, match=rf"got {count} videos: expected 2 or 3"):
        compare("wipe", clips(4)[:count], ("a",) * count)


def test_sizes_that_differ_are_both_named() -> None:
    a, b, c = clips(3)
    with pytest.raises(SettingError, match=r"input 1 \(x\) is 3 frames of 90x60 .*input 3 \(z\).* of 45x60.*resize"):
        compare("wipe", [a, b, c[..., ::2]], ("x", "y", "z"))
    with pytest.raises(SettingError, match=r"3 frames.*input 2 \(y\) is 2 frames.*cut the longer one"):
        compare("wipe", [a, b[:2]], ("x", "y"))


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_alpha_are_refused_with_advice(channels: int) -> None:
    a, b = clips()
    with pytest.raises(SettingError, match=rf"input 2 \(y\) has {channels} channels: expected the 3 of RGB"):
        compare("wipe", [a, b[:, :1].expand(-1, channels, -1, -1)], ("x", "y"))


@pytest.mark.parametrize("video", [torch.rand(3, 60, 90), torch.zeros(3, 3, 60, 90, dtype=torch.uint8)])
def test_other_tensors_are_refused(video: torch.Tensor) -> None:
    with pytest.raises(SettingError, match=r"input 1 \(x\) is a torch.*expected floating-point RGB"):
        compare("wipe", [video, clips()[0]], ("x", "y"))


def test_empty_videos_are_refused() -> None:
    a, b = clips()
    for empty in (slice(0, 0), (slice(None), slice(None), slice(0, 0))):
        with pytest.raises(SettingError, match=r"input 1 \(x\) is empty"):
            compare("wipe", [a[empty], b[empty]], ("x", "y"))


def test_settings_out_of_range_are_named() -> None:
    for name in ("position", "row"):
        for value in (-0.1, 1.1, float("nan")):
            with pytest.raises(SettingError, match=name):
                compare("wipe", clips(), ("a", "b"), **{name: value})
    for gain in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(SettingError, match="gain"):
            compare("difference", clips(), ("a", "b"), gain=gain)
    with pytest.raises(SettingError, match="1 labels for 2 videos"):
        compare("wipe", clips(), ("a",))
