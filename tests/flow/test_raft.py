"""RAFT: torchvision's network from a file of its weights, whatever the file's form, on sides of any size."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from skimage.data import chelsea
from torch import Tensor
from torchvision.models.optical_flow import raft_large, raft_small

from tests.support.refusals import refused
from vsr_ops.errors import CheckpointError, SettingError
from vsr_ops.flow.field import estimate_flow, latent_flow, streamed_flow
from vsr_ops.flow.raft import files, load_raft

CPU = torch.device("cpu")
SMALL = "raft_small_C_T_V2-01064c6d.pth"


@pytest.fixture(scope="module")
def photo() -> Tensor:
    return torch.from_numpy(chelsea()).permute(2, 0, 1).float() / 255


@pytest.fixture(scope="module")
def small() -> torch.nn.Module:
    """A small RAFT of random weights: about a million of them."""
    torch.manual_seed(3)
    return raft_small().eval()


@pytest.fixture(scope="module")
def large() -> torch.nn.Module:
    torch.manual_seed(4)
    return raft_large().eval()


def pair(photo: Tensor, height: int = 128, width: int = 136) -> Tensor:
    """Two frames; the second one shows what lies four pixels down and two across."""
    return torch.stack([photo[:, k * 4 : k * 4 + height, k * 2 : k * 2 + width] for k in range(2)])


def test_raft_is_torchvisions_on_padded_sides(photo: Tensor, small: torch.nn.Module, tmp_path: Path) -> None:
    torch.save(small.state_dict(), tmp_path / SMALL)
    video = torch.stack([photo[:, :132, :135], photo[:, 4:136, 2:137]])
    flow = estimate_flow(video, "raft_small", cuts=(), weights=tmp_path)
    grown = F.pad(video, (0, 1, 0, 4), mode="replicate") * 2 - 1
    with torch.no_grad():
        back = small(grown[1:], grown[:1])[-1][..., :132, :135]
    assert float(back.abs().max()) > 0.1, "an untrained RAFT moves something too"
    assert torch.allclose(flow.backward, back, atol=1e-5) and not torch.allclose(flow.forward, back, atol=1e-2)
    with pytest.raises(SettingError, match="127x132 pixels: expected at least 128"):
        estimate_flow(video[..., :127], "raft_small", cuts=(), weights=tmp_path)


def test_raft_without_weights_or_network_says_which_file_goes_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    with pytest.raises(CheckpointError, match=SMALL) as refused:
        estimate_flow(torch.zeros(2, 3, 128, 128), "raft_small", cuts=())
    assert str(tmp_path / "hub") in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(CheckpointError, match=r"raft_large_C_T_SKHT_V2-ff5fadd5[.]pth") as refused:
        estimate_flow(torch.zeros(2, 3, 128, 128), "raft_large", cuts=(), weights=tmp_path)
    assert f"in {tmp_path};" in str(refused.value)


def test_another_file_under_rafts_name_is_refused(tmp_path: Path) -> None:
    for content in (b"<html>", b""):
        (tmp_path / SMALL).write_bytes(content)
        with pytest.raises(CheckpointError, match="cannot be read as raft_small"):
            estimate_flow(torch.zeros(2, 3, 128, 128), "raft_small", cuts=(), weights=tmp_path)
    torch.save({"weight": torch.zeros(1)}, tmp_path / SMALL)
    with pytest.raises(CheckpointError, match="cannot be read as raft_small"):
        estimate_flow(torch.zeros(2, 3, 128, 128), "raft_small", cuts=(), weights=tmp_path)


@pytest.mark.parametrize("which", ["small", "large"])
def test_a_file_is_known_by_its_tensors_in_both_forms(
    which: str, photo: Tensor, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Under any name, with half the precision as well."""
    model: torch.nn.Module = request.getfixturevalue(which)
    frames = pair(photo)
    with torch.no_grad():
        expected = model(frames[:1] * 2 - 1, frames[1:] * 2 - 1)[-1]
    torch.save(model.state_dict(), tmp_path / "a.pth")
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    for name in ("a.pth", "a.safetensors"):
        assert torch.equal(load_raft(tmp_path / name, CPU)(frames[:1], frames[1:]), expected)
    half = {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    save_file(half, tmp_path / "half.safetensors")
    found = load_raft(tmp_path / "half.safetensors", CPU)(frames[:1], frames[1:])
    assert found.dtype == torch.float32 and not torch.equal(found, expected)
    assert torch.allclose(found, expected, atol=0.1 * float(expected.abs().max()))


def test_streamed_it_is_that_of_the_whole_video(photo: Tensor, small: torch.nn.Module, tmp_path: Path) -> None:
    torch.save(small.state_dict(), tmp_path / SMALL)
    video = torch.stack([photo[:, 4 * k : 4 * k + 132, : 3 * k + 136][..., -136:] for k in range(3)])
    whole = latent_flow(estimate_flow(video, "raft_small", cuts=(), weights=tmp_path), 17, 17, 8, 0.5)
    found = streamed_flow(iter(video), 3, (17, 17), 8, (), 0.5, estimate=load_raft(tmp_path / SMALL, CPU))
    for name in ("forward", "backward"):
        assert torch.allclose(getattr(found, name), getattr(whole, name), atol=1e-5)
    assert torch.equal(found.visible_now, whole.visible_now)
    assert float((found.forward - streamed_flow(iter(video), 3, (17, 17), 8, (), 0.5).forward).abs().mean()) > 0.01


def test_what_is_no_raft_is_refused(small: torch.nn.Module, large: torch.nn.Module, tmp_path: Path) -> None:
    def read(file: Path) -> object:
        return load_raft(file, CPU)

    refused(read, tmp_path / "none.pth", "no such file", *files())
    state = dict(small.state_dict())
    for change, words in (
        ({"feature_encoder.convnormrelu.0.weight": None}, "1 missing"),
        ({"feature_encoder.convnormrelu.0.weight": torch.full((32, 3, 7, 7), torch.nan)}, "NaN"),
        ({"more": torch.zeros(1)}, "1 unexpected"),
    ):
        changed = {key: value for key, value in (state | change).items() if value is not None}
        for name, save in (("a.pth", torch.save), ("a.safetensors", save_file)):
            save(changed, tmp_path / name)
            refused(read, tmp_path / name, words, "torchvision's own file", "https://")
    (tmp_path / "b.pth").write_bytes(b"\x80\x04c__builtin__\nprint\n(tR.")
    refused(read, tmp_path / "b.pth", "cannot be read as RAFT's weights", "raft_large", "raft_small")
    torch.save(large.state_dict(), tmp_path / "large.pth")
    refused(lambda file: load_raft(file, CPU, "raft_small"), tmp_path / "large.pth", "cannot be read as raft_small's")


def test_without_torchvision_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    for needs in (
        lambda: load_raft(tmp_path / SMALL, CPU),
        lambda: estimate_flow(torch.zeros(2, 3, 128, 128), "raft_large", ()),
    ):
        with pytest.raises(
            SettingError, match=r"needs torchvision .*expected the one that fits this torch; install it"
        ):
            needs()
