"""CFW: StableSR's layout, files of both kinds, identities, and what it adds, tiled as in one pass."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.conftest import randomise
from tests.support.small_vaes import CELL, noise, picture_vae, pictures, stream, streamed
from vsr_ops.checkpoints.module_file import write_module
from vsr_ops.checkpoints.safefile import read_pickle
from vsr_ops.errors import CheckpointError, SettingError
from vsr_ops.modules import cfw
from vsr_ops.modules.cfw import CFW, CFWShape, load_cfw, write_cfw

SMALL = CFWShape((1,), (8,), blocks=1, grow=4)


def published(level: int, c: int, blocks: int = 2, grow: int = 32) -> dict[str, tuple[int, ...]]:
    """StableSR's Fuse_sft_block_RRDB of `c` channels: what its decoder stores, without the decoder's prefix."""
    weights: dict[str, tuple[int, ...]] = {
        "encode_enc_1.norm1": (2 * c,),
        "encode_enc_1.conv1": (c, 2 * c, 3, 3),
        "encode_enc_1.norm2": (c,),
        "encode_enc_1.conv2": (c, c, 3, 3),
        "encode_enc_1.conv_out": (c, 2 * c, 1, 1),
        "encode_enc_3.norm1": (c,),
        "encode_enc_3.conv1": (c, c, 3, 3),
        "encode_enc_3.norm2": (c,),
        "encode_enc_3.conv2": (c, c, 3, 3),
    }
    for block in range(blocks):
        for rdb in ("rdb1", "rdb2", "rdb3"):
            name = f"encode_enc_2.{block}.{rdb}"
            weights[f"{name}.conv1"] = (grow, c, 3, 3)
            weights[f"{name}.conv2"] = (grow, c + grow, 3, 3)
            weights[f"{name}.conv3"] = (grow, c + 2 * grow, 3, 3)
            weights[f"{name}.conv4"] = (grow, c + 3 * grow, 3, 3)
            weights[f"{name}.conv5"] = (c, c + 4 * grow, 3, 3)
    table = {f"fusion_layer_{level}.{name}.weight": shape for name, shape in weights.items()}
    return table | {f"fusion_layer_{level}.{name}.bias": shape[:1] for name, shape in weights.items()}


def random_state(prefix: str = "") -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(5)
    table = published(1, 32, grow=8) | published(2, 64, grow=8)
    return {prefix + key: torch.randn(shape, generator=rng) for key, shape in table.items()}


def filled(shape: CFWShape = SMALL) -> CFW:
    model = CFW(shape)
    randomise(model, 4)
    return model.eval()


# --- What it adds -----------------------------------------------------------------------------------------------------


def test_a_fresh_one_and_w_of_zero_are_the_plain_decoder() -> None:
    vae, z, reference = picture_vae(), 3 * noise(2, 4, 6, 7), pictures(2, 3, 24, 28)
    plain = streamed(vae, z)
    assert torch.equal(streamed(vae, z, cfw=CFW(SMALL).eval(), reference=reference, w=1.0), plain)
    assert torch.equal(streamed(vae, z, cfw=filled(), reference=reference, w=0.0), plain)
    assert torch.equal(streamed(vae, z, cfw=filled(), w=0.0), plain)
    assert not torch.allclose(streamed(vae, z, cfw=filled(), reference=reference, w=0.1), plain, atol=1e-2)


def test_a_fresh_one_learns() -> None:
    model, pair = CFW(SMALL), (noise(1, 8, 6, 6), noise(1, 8, 6, 6, seed=1))
    model.fuse(1, *pair, w=1.0).square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None and bool(p.grad.any())]
    assert gradients and all(bool(torch.isfinite(g).all()) and float(g.norm()) < 100 for g in gradients)


def test_fuse_is_linear_in_w() -> None:
    model, encoded, decoded = filled(), noise(2, 8, 6, 6), noise(2, 8, 6, 6, seed=1)
    with torch.no_grad():
        whole = model.fuse(1, encoded, decoded, 1.0) - decoded
        assert torch.allclose(model.fuse(1, encoded, decoded, 0.25), decoded + 0.25 * whole, atol=1e-5)
        assert model.fuse(1, encoded, decoded, 0.0) is decoded
        assert not torch.allclose(whole, model.fuse(1, 1 - encoded, decoded, 1.0) - decoded, atol=1e-2)
        assert model.fuse(1, encoded.half(), decoded.half(), 0.5).dtype == torch.float16


@torch.no_grad()
def by_hand(vae: Any, model: CFW, z: Tensor, reference: Tensor, w: float) -> Tensor:
    """One frame in one pass through diffusers' blocks: level 1's features after its blocks, before it is resized."""
    x = vae.encoder.conv_in(2 * reference - 1)
    x = vae.encoder.down_blocks[0](x)
    for block in vae.encoder.down_blocks[1].resnets:
        encoded = x = block(x, None)
    h = vae.decoder.mid_block(vae.decoder.conv_in(vae.post_quant_conv(z)))
    h = vae.decoder.up_blocks[0](h)
    for block in vae.decoder.up_blocks[1].resnets:
        h = block(h, None)
    h = vae.decoder.up_blocks[1].upsamplers[0](h + w * model.layer(1)(encoded, h))
    h = vae.decoder.conv_norm_out(vae.decoder.up_blocks[2](h))
    return vae.decoder.conv_out(nn.functional.silu(h)) / 2 + 0.5


@pytest.mark.parametrize(("height", "width", "tile"), [(5, 6, 64), (16, 13, 8), (12, 25, 9)])
def test_tiles_are_one_pass(height: int, width: int, tile: int) -> None:
    vae, model = picture_vae(), filled()
    z, reference = 3 * noise(1, 4, height, width), pictures(1, 3, height * CELL, width * CELL)
    whole = by_hand(vae, model, z, reference, 0.75)
    for kept, allowed in ((None, 1e-5), (0.0, 1e-3)):
        tiled = streamed(vae, z, cfw=model, reference=reference, tile=tile, kept=kept)
        assert float((tiled - whole).abs().max()) <= allowed < 0.1 < float(whole.std())


def test_levels_may_be_several() -> None:
    vae, model = picture_vae(), filled(CFWShape((0, 1), (8, 8), blocks=1, grow=4))
    z, reference = 3 * noise(1, 4, 11, 10), pictures(1, 3, 44, 40)
    named: dict[str, Any] = {"cfw": model, "reference": reference, "w": 0.5}
    whole, once, passes = (streamed(vae, z, tile=t, kept=k, **named) for t, k in ((64, None), (6, None), (6, 0.0)))
    assert float((once - whole).abs().max()) <= 1e-5
    assert float((passes - whole).abs().max()) <= 1e-3


@pytest.mark.parametrize(("height", "width"), [(30, 29), (18, 25)], ids=["of latents", "of a UNet's factor"])
def test_a_reference_of_the_size_before_padding_will_do(height: int, width: int) -> None:
    vae, model, z, reference = picture_vae(), filled(), 3 * noise(2, 4, 8, 8), pictures(2, 3, height, width)
    padded = nn.functional.pad(reference, (0, 32 - width, 0, 32 - height), mode="replicate")
    assert torch.equal(*(streamed(vae, z, cfw=model, reference=r) for r in (reference, padded)))


@pytest.mark.parametrize("shape", [None, (1, 3, 48, 52), (2, 3, 16, 52), (2, 3, 48, 56)])
def test_a_reference_of_another_video_is_refused(shape: tuple[int, ...] | None) -> None:
    reference = None if shape is None else pictures(*shape)
    with pytest.raises(SettingError, match="reference") as caught:
        stream(picture_vae(), noise(2, 4, 12, 13), cfw=filled(), reference=reference)
    assert "\n" not in str(caught.value) and (shape is None or str(shape) in str(caught.value))


@pytest.mark.parametrize(
    ("shape", "both"),
    [
        (CFWShape((1,), (12,), 1, 4), ("12 channels", "8 channels")),
        (CFWShape((2,), (16,), 1, 4), ("level 2", "2 as its deepest")),
        (CFWShape((5,), (8,), 1, 4), ("level 5", "no such level")),
        (CFWShape((1,), (8,), 1, 4, backbone="svd"), ("svd", "sd")),
    ],
)
def test_one_made_for_another_vae_is_refused_with_both(shape: CFWShape, both: tuple[str, str]) -> None:
    with pytest.raises(SettingError) as caught:
        stream(picture_vae(), noise(1, 4, 4, 4), cfw=CFW(shape), reference=pictures(1, 3, 16, 16))
    assert all(name in str(caught.value) for name in both) and "\n" not in str(caught.value)


# --- Files ------------------------------------------------------------------------------------------------------------


def test_the_published_layout_is_the_default() -> None:
    with torch.device("meta"):
        model = CFW()
    found = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert found == published(1, 256) | published(2, 512)


@pytest.mark.parametrize("prefix", ["", "decoder.", "first_stage_model.decoder."])
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_stablesrs_files_load_whole(tmp_path: Path, prefix: str, suffix: str) -> None:
    state, path = random_state(prefix), tmp_path / f"vqgan_cfw{suffix}"
    whole = state | {"decoder.conv_in.weight": torch.zeros(2), "encoder.down.0.block.0.norm1.weight": torch.ones(2)}
    if suffix == ".ckpt":
        torch.save({"state_dict": whole, "epoch": 3, "global_step": 7}, path)
    else:
        save_file(whole, path)
    model = load_cfw(path)
    assert model.shape == CFWShape((1, 2), (32, 64), blocks=2, grow=8, backbone="sd")
    assert {prefix + key for key in model.state_dict()} == set(state)
    assert all(torch.equal(value, state[prefix + key]) for key, value in model.state_dict().items())


def test_what_is_written_is_read(tmp_path: Path) -> None:
    model = filled().half().float()
    write_cfw(tmp_path / "c.safetensors", model, "nothing")
    read = load_cfw(tmp_path / "c.safetensors")
    assert read.shape == SMALL and not read.training
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in read.state_dict().items())
    assert not any(parameter.requires_grad for parameter in read.parameters())


class Trap:
    """What a pickle could do to who opens it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_in_a_pickle_runs(tmp_path: Path) -> None:
    torch.save({"state_dict": Trap(tmp_path / "ran")}, tmp_path / "c.ckpt")
    with pytest.raises(CheckpointError, match="not a pickle of tensors alone") as caught:
        load_cfw(tmp_path / "c.ckpt")
    assert not (tmp_path / "ran").exists() and "\n" not in str(caught.value)


WANTED = re.compile(r"(?:^|\.)layer\.")


def test_of_a_pickle_the_wanted_tensors_are_read(tmp_path: Path) -> None:
    state = {"a.layer.weight": torch.ones(2, dtype=torch.float16), "other.weight": torch.zeros(1), "layer.step": 3}
    for stored in (state, {"state_dict": state, "epoch": 1}):
        torch.save(stored, tmp_path / "m.pt")
        (read,) = read_pickle(tmp_path / "m.pt", WANTED).items()
        assert read[0] == "a.layer.weight" and torch.equal(read[1], torch.ones(2))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("where", ["value", "beside"])
def test_a_pickle_that_would_run_code_is_refused_in_one_line(tmp_path: Path, legacy: bool, where: str) -> None:
    path, trap = tmp_path / "m.pt", Trap(tmp_path / "ran")
    stored = {"layer.weight": trap} if where == "value" else {"state_dict": {"layer.weight": torch.ones(1)}, "x": trap}
    torch.save(stored, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match="not a pickle of tensors alone") as caught:
        read_pickle(path, WANTED)
    assert not (tmp_path / "ran").exists() and "\n" not in str(caught.value)
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("damage", [b"", b".", b"\x80\x02}", b"<html>", b"PK\x03\x04 cut short", b"\x80\x02u."])
def test_a_damaged_pickle_is_refused_in_one_line(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "m.pt").write_bytes(damage)
    with pytest.raises(CheckpointError, match="expected a state dict") as caught:
        read_pickle(tmp_path / "m.pt", WANTED)
    assert "\n" not in str(caught.value) and "m.pt" in str(caught.value)


def test_what_a_trainer_left_in_a_pickle_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning files its callbacks' states under their classes, which need not be installed here."""
    place = "pytorch_lightning.callbacks.model_checkpoint"
    module = ModuleType(place)
    left = type("ModelCheckpoint", (), {"__module__": place})
    monkeypatch.setattr(module, "ModelCheckpoint", left, raising=False)
    path, score = tmp_path / "c.ckpt", np.float64(0.5)
    with monkeypatch.context() as patch:
        for parent in ("pytorch_lightning", "pytorch_lightning.callbacks", place):
            patch.setitem(sys.modules, parent, module)
        torch.save({"callbacks": {left: {"best": score}}, "state_dict": random_state("decoder.")}, path)
    assert load_cfw(path).shape.widths == (32, 64)


def test_other_kinds_are_refused_with_both(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_module(path, "refiner", {}, {"a": torch.zeros(2)}, "nothing")
    with pytest.raises(CheckpointError, match="'refiner', expected kind 'cfw'"):
        load_cfw(path)
    save_file({"decoder.conv_in.weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="another kind of weights than cfw"):
        load_cfw(path)
    for stored in ({"a": 1}, [1, 2]):
        torch.save(stored, tmp_path / "x.pt")
        with pytest.raises(CheckpointError, match=r"another kind|expected a state dict"):
            load_cfw(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="no such file"):
        load_cfw(tmp_path / "nothing.ckpt")


@pytest.mark.parametrize(
    ("gone", "word"), [("2.encode_enc_3.conv2.bias", "missing"), ("1.encode_enc_3.conv1.weight", "lack")]
)
def test_a_part_of_one_is_refused(tmp_path: Path, gone: str, word: str) -> None:
    state = random_state()
    del state[f"fusion_layer_{gone}"]
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=word) as caught:
        load_cfw(tmp_path / "x.safetensors")
    assert gone in str(caught.value)


@pytest.mark.parametrize("config", [{"levels": [1]}, {"levels": [1], "widths": [8], "depth": 3}, {"levels": 1}])
def test_a_configuration_of_something_else_is_refused(tmp_path: Path, config: dict[str, object]) -> None:
    write_module(tmp_path / "c.safetensors", cfw.KIND, config, filled().state_dict(), "nothing")
    with pytest.raises(CheckpointError, match="no CFW's"):
        load_cfw(tmp_path / "c.safetensors")


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    state = random_state()
    state["fusion_layer_1.encode_enc_3.conv1.weight"][0] = float("nan")
    torch.save(state, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match="NaN"):
        load_cfw(tmp_path / "c.pth")
