"""Decode Video with modules and exact tiles, on the host's own autoencoders."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from .conftest import NAME

#: As far as a picture of tiles may be from that of one pass.
ALLOWED = 2 / 255


def module(name: str) -> ModuleType:
    """One of the pack's own, as the host has loaded it."""
    return importlib.import_module(f"{NAME}.{name}")


def filled(made: torch.nn.Module) -> Any:
    """With weights that do something, of about the size that keeps what passes through."""
    rng = torch.Generator().manual_seed(3)
    for parameter in made.parameters():
        fan = parameter[0].numel() if parameter.ndim > 1 else 1
        values = torch.randn(parameter.shape, generator=rng) / max(fan, 1) ** 0.5
        parameter.data.copy_(values if parameter.ndim > 1 else 1 + 0.1 * values)
    return made.eval()


@pytest.fixture(scope="module")
def frames() -> Tensor:
    """A moving picture, not of whole latents."""
    coarse = torch.rand(1, 3, 12, 10, generator=torch.Generator().manual_seed(1))
    large = torch.nn.functional.interpolate(coarse, scale_factor=12, mode="bicubic").clamp(0, 1)[0]
    return torch.stack([large[:, 4 * i : 4 * i + 94, :77] for i in range(3)]).movedim(1, -1).contiguous()


@pytest.fixture(scope="module")
def latent(nodes: dict[str, Any], lite: tuple[Any, Any], frames: Tensor) -> dict[str, Any]:
    """Its latent, 12 x 10."""
    return nodes["VSRSVDConditioning"].execute(*lite, frames, 127, 8, 0.0, "LR latent", "one scene").args[2]


@pytest.fixture(scope="module")
def decode(nodes: dict[str, Any], lite: tuple[Any, Any], latent: dict[str, Any]) -> Any:
    """The node on that latent."""
    return lambda **named: nodes["VSRDecode"].execute(lite[1], latent, 0, **named).args[0]


@pytest.fixture
def cfw(lite: tuple[Any, Any]) -> Any:
    widths = module("vsr_ops.vae.layout").level_widths(lite[1].first_stage_model)
    return (
        module("vsr_ops.modules.cfw")
        .CFW(module("vsr_ops.modules.cfw").CFWShape((1,), (widths[1],), 1, 4, "svd"))
        .eval()
    )


@pytest.fixture
def stam(lite: tuple[Any, Any]) -> Any:
    widths = module("vsr_ops.vae.layout").residual_widths(lite[1].first_stage_model)
    blocks = tuple((name, widths[name]) for name in ("mid_1", "up_0_0"))
    return module("vsr_ops.modules.stam").STAM(module("vsr_ops.modules.stam").STAMShape(blocks, backbone="svd")).eval()


def test_without_modules_and_tiles_it_is_the_decoder_it_was(
    host: ModuleType, lite: tuple[Any, Any], decode: Any, latent: dict[str, Any], frames: Tensor
) -> None:
    adapter, size = host.HostVAE(lite[1]), tuple(frames.shape[1:3])
    before = module("vsr_ops.vae.latents").decode_video(adapter, latent["samples"], adapter.chunk, (), size)
    assert float((decode() - before.movedim(1, -1)).abs().max()) < 1e-5
    assert torch.equal(decode(reference=frames, w=0.3), decode())


def test_tiles_are_the_picture_of_one_pass(decode: Any) -> None:
    whole = decode()
    assert whole.std() > 0.05
    one, tiled = decode(tile=64), decode(tile=5)
    assert float((one - whole).abs().max()) < 1e-5
    assert 0 < float((tiled - whole).abs().max()) <= ALLOWED


def picture_vae() -> Any:
    """The host's own VAE of Stable Diffusion, tiny, of random weights."""
    import comfy.sd
    from comfy.ldm.models.autoencoder import AutoencoderKL

    shape = {"double_z": True, "z_channels": 4, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32}
    shape |= {"ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
    config = {"params": {"ddconfig": shape, "embed_dim": 4}}
    return comfy.sd.VAE(sd=filled(AutoencoderKL(**config["params"])).state_dict(), config=config)


def test_tiles_of_the_hosts_picture_vae_are_one_pass(host: ModuleType, nodes: dict[str, Any]) -> None:
    vae = picture_vae()
    latent = {"samples": torch.randn(2, 4, 11, 9, generator=torch.Generator().manual_seed(2))}
    whole = nodes["VSRDecode"].execute(vae, latent, 0).args[0]
    tiled = nodes["VSRDecode"].execute(vae, latent, 0, tile=6).args[0]
    assert whole.shape == (2, 88, 72, 3) and whole.std() > 0.02
    assert 0 < float((tiled - whole).abs().max()) <= ALLOWED


@pytest.mark.parametrize("name", ["lite", "picture"])
def test_a_frame_is_encoded_as_the_host_does_in_one_pass(
    host: ModuleType, lite: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    vae = lite[1] if name == "lite" else picture_vae()
    rng = torch.Generator().manual_seed(4)
    coarse = torch.rand(1, 3, 12, 10, generator=rng)
    frame = torch.nn.functional.interpolate(coarse, (13 * 8, 22 * 8), mode="bicubic").clamp(0, 1)
    whole = vae.encode(frame.movedim(1, -1))
    assert torch.equal(next(host.encoded(vae, frame, 13, 22))[None], whole.float())
    monkeypatch.setattr(module("nodes.host.picture"), "VAE_TILE", 6)
    tiled = next(host.encoded(vae, frame, 13, 22))[None]
    assert 0 < float((tiled - whole).abs().max()) <= 1e-4 * float(whole.abs().max())


def test_what_is_no_plain_mode_is_left_to_the_host(host: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = picture_vae()
    frame = torch.rand(1, 3, 64, 48, generator=torch.Generator().manual_seed(5))
    expected = next(host.encoded(vae, frame, 8, 6))
    vae.first_stage_model.regularization.sample = True
    asked: list[int] = []
    encode = vae.encode
    monkeypatch.setattr(vae, "encode", lambda pixels: asked.append(1) or encode(pixels))
    assert not torch.equal(next(host.encoded(vae, frame, 8, 6)), expected) and asked == [1]


def test_fresh_modules_and_w_of_zero_change_nothing(decode: Any, frames: Tensor, cfw: Any, stam: Any) -> None:
    plain = decode(tile=5)
    assert torch.equal(decode(tile=5, reference=frames, cfw=cfw, w=1.0), plain)
    assert torch.equal(decode(tile=5, stam=stam), plain)
    assert torch.equal(decode(reference=frames, cfw=filled(cfw), w=0.0), decode())


def test_modules_act_and_are_taken_back(decode: Any, frames: Tensor, cfw: Any, stam: Any) -> None:
    plain = decode()
    for named in ({"reference": frames, "cfw": filled(cfw), "w": 1.0}, {"stam": filled(stam)}):
        changed = decode(**named)
        assert changed.shape == plain.shape and float((changed - plain).abs().max()) > 1e-2
    devices = {parameter.device for made in (cfw, stam) for parameter in made.parameters()}
    management = importlib.import_module("comfy.model_management")
    assert devices == {management.vae_offload_device()}


def test_what_does_not_fit_is_said_in_one_line(decode: Any, frames: Tensor, cfw: Any) -> None:
    for named, word in (
        ({"cfw": filled(cfw)}, "CFW and SATeCo need a reference"),
        ({"cfw": filled(cfw), "reference": frames[:2]}, "the reference is"),
        ({"w": 1.5}, "w is 1.5"),
    ):
        with pytest.raises(ValueError, match=word) as caught:
            decode(**named)
        assert "\n" not in str(caught.value)


def test_it_stops_when_asked_and_the_vae_is_left_as_it_was(
    lite: tuple[Any, Any], decode: Any, interrupted: type[BaseException]
) -> None:
    with pytest.raises(interrupted):
        decode(tile=5)
    assert not any("forward" in vars(part) for part in lite[1].first_stage_model.modules())


@pytest.mark.parametrize(("node", "kind"), [("VSRLoadCFW", "cfw"), ("VSRLoadSTAM", "stam")])
def test_the_bundled_one_and_the_artists_files_are_found(
    nodes: dict[str, Any], decode: Any, frames: Tensor, node: str, kind: str, request: pytest.FixtureRequest
) -> None:
    """The bundled one mends a picture, of which it leaves nearly all; a file is what was written."""

    def options() -> list[str]:
        return nodes[node].define_schema().inputs[0].options

    assert options() == ["lite"]
    bundled = nodes[node].execute("lite").args[0]
    mended = decode(reference=frames, **{kind: bundled}) - decode()
    assert 1e-3 < float(mended.abs().mean()) < 0.1
    place = Path(importlib.import_module("folder_paths").models_dir) / f"vsr_{kind}"
    place.mkdir(parents=True, exist_ok=True)
    file, own = place / "own.safetensors", module(f"vsr_ops.modules.{kind}")
    written = filled(request.getfixturevalue(kind))
    getattr(own, f"write_{kind}")(file, written, "nothing")
    try:
        assert options() == ["lite", "own.safetensors"]
        read = nodes[node].execute("own.safetensors").args[0]
        assert read.shape == written.shape
        for key, value in written.state_dict().items():
            torch.testing.assert_close(read.state_dict()[key], value, atol=1e-3, rtol=1e-3)
        taken = {item.id: item.io_type for item in nodes["VSRDecode"].define_schema().inputs}
        assert nodes[node].define_schema().outputs[0].io_type == taken[kind]
        with pytest.raises(ValueError, match=rf"'\.\./own\.safetensors'.*models/vsr_{kind}"):
            nodes[node].execute("../own.safetensors")
    finally:
        file.unlink()
    assert options() == ["lite"]
