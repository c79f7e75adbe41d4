"""STAM: the exact identity at its start, its equation, time alone, tiles as in one pass, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import randomise
from tests.support.small_vaes import noise, picture_vae, pictures, stream, streamed
from vsr_ops.checkpoints.module_file import write_module
from vsr_ops.errors import CheckpointError, SettingError
from vsr_ops.modules import stam
from vsr_ops.modules.cfw import CFW, CFWShape
from vsr_ops.modules.stam import STAM, STAMBlock, STAMShape, load_stam, write_stam
from vsr_ops.vae.layout import residual_widths


def filled(vae: Any, inner: int = 4) -> STAM:
    model = STAM(STAMShape(tuple(residual_widths(vae).items()), inner, heads=2))
    randomise(model, 5)
    with torch.no_grad():
        for name in model.names:
            model.block(name).a.fill_(0.7)
            model.block(name).b.fill_(0.4)
    return model.eval()


def test_a_fresh_one_is_the_exact_identity() -> None:
    vae, z = picture_vae(), noise(3, 4, 5, 6)
    fresh = STAM(STAMShape(tuple(residual_widths(vae).items()))).eval()
    with torch.no_grad():
        for name, width in residual_widths(vae).items():
            x = noise(3, width, 6, 5)
            assert torch.equal(fresh.block(name)(x), x)
            assert torch.equal(fresh.block(name)(x.half()), x.half())
        together = vae.decode(z).sample / 2 + 0.5
    torch.testing.assert_close(streamed(vae, z, stam=fresh), together, atol=1e-5, rtol=0)


def test_a_fresh_one_learns() -> None:
    block = STAMBlock(8, 8, 2)
    block(noise(3, 8, 4, 4)).square().sum().backward()
    assert all(bool(side.grad.any()) for side in (block.out.weight, block.a, block.b) if side.grad is not None)
    assert block.out.weight.grad is not None


def test_it_is_its_equation() -> None:
    """Attention of one head, written out position by position."""
    block, x = STAMBlock(4, 4, 1), noise(5, 4, 3, 2)
    randomise(block, 1)
    with torch.no_grad():
        out = block(x)
        convolved = block.conv(x.transpose(0, 1)[None])[0].transpose(0, 1)
        for row in range(3):
            for col in range(2):
                q, k, v = block.qkv(block.norm(convolved[:, :, row, col])).chunk(3, -1)
                added = block.out(torch.softmax(q @ k.T / 2, -1) @ v)
                spatial = x[:, :, row, col]
                expected = block.a * spatial + block.b * (spatial + added)
                assert torch.allclose(out[:, :, row, col], expected, atol=1e-5)


def test_positions_in_parts_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = STAMBlock(4, 4, 2), noise(3, 4, 5, 7)
    randomise(block, 1)
    with torch.no_grad():
        whole = block(x)
        monkeypatch.setattr(stam, "POSITIONS", 4)
        assert torch.allclose(block(x), whole, atol=1e-6)


@pytest.mark.parametrize(("height", "width", "tile"), [(9, 14, 7), (12, 7, 6)])
def test_tiles_are_one_pass(height: int, width: int, tile: int) -> None:
    vae, z = picture_vae(), noise(3, 4, height, width)
    model = filled(vae)
    ways = ((64, None), (tile, None), (tile, 0.0))
    whole, once, passes = (streamed(vae, z, stam=model, tile=side, kept=kept) for side, kept in ways)
    assert float((once - whole).abs().max()) <= 1e-5
    assert float((passes - whole).abs().max()) <= 1e-3
    assert float((whole - streamed(vae, z)).abs().max()) > 0.05


def test_with_cfw_tiles_are_one_pass_too() -> None:
    vae, z, reference = picture_vae(), noise(2, 4, 10, 12), pictures(2, 3, 40, 48)
    fuse = CFW(CFWShape((1,), (8,), blocks=1, grow=4))
    randomise(fuse, 4)
    named: dict[str, Any] = {"stam": filled(vae), "cfw": fuse.eval(), "reference": reference, "w": 0.5}
    ways = ((64, None), (6, None), (6, 0.0))
    whole, once, passes = (streamed(vae, z, tile=side, kept=kept, **named) for side, kept in ways)
    assert float((once - whole).abs().max()) <= 1e-5
    assert float((passes - whole).abs().max()) <= 1e-3
    assert float((whole - streamed(vae, z, stam=named["stam"])).abs().max()) > 0.05


def test_frames_see_their_chunk_and_no_cut_is_passed() -> None:
    vae, z = picture_vae(), noise(6, 4, 4, 4)
    changed, model = torch.cat([z[:5], -z[5:]]), filled(vae)
    assert torch.equal(streamed(vae, z, (3,), stam=model)[:3], streamed(vae, changed, (3,), stam=model)[:3])
    together = streamed(vae, z, stam=model) - streamed(vae, changed, stam=model)
    assert bool((together.flatten(1).abs().amax(1) > 1e-5).all())
    first, second = (streamed(vae, video, stam=model, chunk=4)[:2] for video in (z, changed))
    assert torch.equal(first, second), "the last frame is in a later chunk"


@pytest.mark.parametrize(
    ("shape", "both"),
    [
        (STAMShape((("mid_0", 12),)), ("12 channels", "16 channels")),
        (STAMShape((("up_7_0", 16),)), ("up_7_0", "no such block")),
        (STAMShape((("mid_0", 16),), backbone="svd"), ("svd", "sd")),
    ],
)
def test_one_made_for_another_vae_is_refused_with_both(shape: STAMShape, both: tuple[str, str]) -> None:
    with pytest.raises(SettingError) as caught:
        stream(picture_vae(), noise(1, 4, 4, 4), stam=STAM(shape))
    assert all(name in str(caught.value) for name in both) and "\n" not in str(caught.value)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    model = filled(picture_vae()).half().float()
    write_stam(tmp_path / "s.safetensors", model, "nothing")
    read = load_stam(tmp_path / "s.safetensors")
    assert read.shape == model.shape and not read.training
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in read.state_dict().items())


def test_other_kinds_and_configurations_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    write_module(path, "cfw", {}, {"a": torch.zeros(2)}, "nothing")
    with pytest.raises(CheckpointError, match="'cfw', expected kind 'stam'"):
        load_stam(path)
    for config in ({}, {"blocks": [["mid_0"]]}, {"blocks": [["mid_0", 8]], "depth": 2}, {"blocks": [["mid_0", 6]]}):
        write_module(path, stam.KIND, config, {"a": torch.zeros(2)}, "nothing")
        with pytest.raises(CheckpointError, match="no STAM's"):
            load_stam(path)
    write_module(path, stam.KIND, {"blocks": [["mid_0", 12]]}, STAM(STAMShape((("mid_0", 8),))).state_dict(), "nothing")
    with pytest.raises(CheckpointError, match="of the wrong shape"):
        load_stam(path)
