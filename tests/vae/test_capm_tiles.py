"""CAPM in a VAE's decoder: tiles and chunks that are one pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import randomise
from tests.support.small_vaes import stream
from tests.support.tensors import randn
from tests.support.tiny_capm import filled
from vsr_ops.errors import SettingError
from vsr_ops.modules.capm import CAPM, SD_VAE, SVD_VAE, CAPMShape, attached, decoder_widths
from vsr_ops.vae.capm_tiles import TiledCAPM

LATENT = 4
"""Pixels of a latent of `decoder_of`'s."""


def decoder_of(temporal: bool) -> Any:
    """A VAE of three levels: pictures', or SVD's."""
    from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder

    shape: dict[str, Any] = {"block_out_channels": (32, 32, 32), "layers_per_block": 1, "latent_channels": 4}
    shape["down_block_types"] = ("DownEncoderBlock2D",) * 3
    if temporal:
        vae: Any = AutoencoderKLTemporalDecoder(**shape)
    else:
        vae = AutoencoderKL(**shape, up_block_types=("UpDecoderBlock2D",) * 3)
    randomise(vae, 2)
    return vae.eval()


def half_of(temporal: bool) -> CAPM:
    widths = decoder_widths((32, 32, 32))
    return filled(CAPMShape(SVD_VAE if temporal else SD_VAE, widths, code=8, prompt=6, size=4))


def uneven(*shape: int) -> Tensor:
    """Latents whose tiles look different."""
    slow = nn.functional.interpolate(randn(*shape[:2], 3, 3), shape[-2:], mode="bilinear")
    return slow + 0.3 * randn(*shape, seed=1)


@torch.no_grad()
def one_pass(vae: Any, z: Tensor, model: CAPM, hint: Tensor | None, strength: float = 1.0) -> Tensor:
    """The VAE's own decoder with the CAPM attached; frames of a picture VAE one by one."""
    if hasattr(vae.decoder, "time_conv_out"):
        with attached(model, vae.decoder, hint, strength):
            return vae.decode(z, num_frames=z.shape[0]).sample / 2 + 0.5
    out: list[Tensor] = []
    for index, frame in enumerate(z):
        with attached(model, vae.decoder, None if hint is None else hint[index : index + 1], strength):
            out.append(vae.decode(frame[None]).sample / 2 + 0.5)
    return torch.cat(out)


@pytest.mark.parametrize(
    ("temporal", "hint"),
    [(True, None), (False, torch.tensor([0.2, 0.8])), (True, torch.tensor([0.5, torch.nan]))],
)
def test_a_decoder_in_tiles_is_one_pass(temporal: bool, hint: Tensor | None) -> None:
    vae, model, z = decoder_of(temporal), half_of(temporal), uneven(2, 4, 13, 9)
    whole = one_pass(vae, z, model, hint)
    assert (whole - one_pass(vae, z, model, hint, 0)).abs().max() > 0.1, "it acts"
    one = torch.stack(list(stream(vae, z, capm=model, levels=hint)))
    assert (one - whole).abs().max() < 1e-5
    for kept, allowed in ((None, 1e-5), (0.0, 1e-3)):
        tiles = torch.stack(list(stream(vae, z, capm=model, levels=hint, tile=5, kept=kept)))
        assert (tiles - whole).abs().max() <= allowed


def test_a_tile_s_own_code_would_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: it does where each tile takes the weights that it would have alone, or no margin."""
    vae, model, z = decoder_of(False), half_of(False), uneven(1, 4, 13, 9)
    whole = one_pass(vae, z, model, None)

    def off() -> float:
        return float((torch.stack(list(stream(vae, z, capm=model, tile=5, kept=0.0))) - whole).abs().max())

    with monkeypatch.context() as patch:
        patch.setattr(TiledCAPM, "_code", lambda self, name, x, place, own: self.model.code(name, x))
        assert off() > 5e-3
    with monkeypatch.context() as patch:
        patch.setattr("vsr_ops.vae.capm_tiles.WINDOW", 1)
        assert off() > 5e-3


def test_levels_go_with_their_frames_through_chunks_and_cuts() -> None:
    vae, model, z = decoder_of(True), half_of(True), uneven(7, 4, 4, 5)
    levels = torch.linspace(0, 1, 7)
    out = torch.stack(list(stream(vae, z, (3,), capm=model, levels=levels, chunk=4)))
    assert (out[:3] - one_pass(vae, z[:3], model, levels[:3])).abs().max() < 1e-5
    assert (out[3:] - one_pass(vae, z[3:], model, levels[3:])).abs().max() < 1e-5


def test_a_fresh_capm_or_strength_zero_leaves_the_picture_as_it_is() -> None:
    vae, model, z = decoder_of(True), half_of(True), uneven(2, 4, 6, 9)
    for tile in (64, 5):
        plain = torch.stack(list(stream(vae, z, tile=tile)))
        assert torch.equal(torch.stack(list(stream(vae, z, tile=tile, capm=model, strength=0))), plain)
        fresh = torch.stack(list(stream(vae, z, tile=tile, capm=CAPM(model.shape), levels=torch.zeros(2))))
        assert torch.equal(fresh, plain)


def test_a_decoder_refuses_another_s_capm_and_levels() -> None:
    vae, model, z = decoder_of(False), half_of(False), uneven(2, 4, 4, 4)
    for given, words in (
        ({"capm": half_of(True)}, "svd-vae, this model is sd-vae"),
        ({"capm": filled(CAPMShape(SD_VAE, {"up_blocks.0": 48}))}, "'up_blocks.0': 48.*'up_blocks.0': 32"),
        ({"capm": model, "levels": torch.zeros(3)}, "3 compression levels, the latent is of 2 frames"),
        ({"capm": model, "levels": torch.tensor([0.5, 1.5])}, "hint"),
        ({"capm": model, "strength": 2.5}, "strength is 2.5"),
    ):
        with pytest.raises(SettingError, match=words) as caught:
            stream(vae, z, **given)
        assert "\n" not in str(caught.value)
