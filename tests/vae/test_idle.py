"""Blocks that add nothing are not computed, and the picture is that of all blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from tests.modules.test_cfw import SMALL, filled
from tests.support.small_vaes import noise, pictures, streamed, video_vae
from vsr_ops.modules.idle import Idle, leave_out_idle
from vsr_ops.vae import lockstep
from vsr_ops.vae.budget import kept_bytes
from vsr_ops.vae.decoder_modules import DecoderModules
from vsr_ops.vae.layout import level_widths, residual_widths
from vsr_ops.vae.stream import Streaming, _assemble

#: The last layers that a thin decoder has at zero: a whole block, half of one; and an encoder's block and attention.
DECODER = ("up_blocks.2.resnets.1.spatial_res_block", "up_blocks.2.resnets.1.temporal_res_block")
HALF, OTHER_HALF = "up_blocks.2.resnets.0.temporal_res_block", "up_blocks.1.resnets.1.spatial_res_block"
ENCODER = ("down_blocks.0.resnets.0", "mid_block.attentions.0.to_out.0")


def silence(model: nn.Module, *layers: str) -> None:
    for layer in layers:
        for weight in model.get_submodule(layer).parameters():
            nn.init.zeros_(weight)


def thin() -> tuple[Any, Any]:
    """A VAE some of whose blocks add nothing, as it is and with these left out."""
    whole, less = video_vae(), video_vae()
    for vae in (whole, less):
        silence(vae.decoder, *(f"{block}.conv2" for block in (*DECODER, HALF, OTHER_HALF)))
        silence(vae.encoder, f"{ENCODER[0]}.conv2", ENCODER[1])
    leave_out_idle(less)
    return whole, less


@torch.no_grad()
def test_what_is_left_out_is_what_was_silenced_and_the_latents_are_the_same() -> None:
    whole, less = thin()
    idle = {name for name, part in less.named_modules() if isinstance(part, Idle)}
    blocks = ["up_blocks.2.resnets.1", HALF, OTHER_HALF]
    assert idle == {
        *(f"decoder.{name}" for name in blocks),
        "encoder.down_blocks.0.resnets.0",
        "encoder.mid_block.attentions.0",
    }
    x = 2 * pictures(2, 3, 32, 40) - 1
    torch.testing.assert_close(less.encoder(x), whole.encoder(x), atol=1e-5, rtol=0)
    assert residual_widths(less) == residual_widths(whole) and level_widths(less) == level_widths(whole)


@torch.no_grad()
@pytest.mark.parametrize("kept", [None, 0.0], ids=["once", "in passes"])
@pytest.mark.parametrize("with_cfw", [False, True])
def test_pictures_are_the_same(kept: float | None, with_cfw: bool) -> None:
    whole, less = thin()
    z, reference = noise(3, 4, 12, 14), pictures(3, 3, 48, 56)
    out: list[torch.Tensor] = []
    for vae in (whole, less):
        given = (
            {
                "cfw": filled(replace(SMALL, widths=(32, 32)[: len(SMALL.levels)], backbone="svd")),
                "w": 0.5,
                "reference": reference,
            }
            if with_cfw
            else {}
        )
        out.append(streamed(vae, z, tile=7, kept=kept, **given))
    assert float((out[0] - out[1]).abs().max()) <= (1e-5 if kept is None else 1e-3)


@torch.no_grad()
def test_a_level_on_which_no_frame_sees_another_is_held_for_one_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture's own resolution is most of what a decoder holds."""
    monkeypatch.setattr(lockstep, "TILE_BYTES", 1 << 12)
    whole, less = thin()
    z, took = noise(8, 4, 24, 20), list[int]()
    for vae in (whole, less):
        decoder = _assemble(vae, DecoderModules(), Streaming(tile=12))
        decoder(z, None)
        assert decoder.arena is not None and not decoder.arena.lent
        took.append(sum(part.nbytes for part in decoder.arena.free))
        said = kept_bytes(vae, DecoderModules(), 8, z.shape[-2:], 4)
        assert said / 2 <= took[-1] <= said
    assert took[1] < took[0] / 2


@pytest.mark.parametrize("value", [1e-8, float("nan")])
def test_a_block_that_adds_anything_stays(value: float) -> None:
    vae = video_vae()
    silence(vae.decoder, f"{DECODER[0]}.conv2", f"{DECODER[1]}.conv2")
    vae.decoder.get_submodule(DECODER[0]).conv2.bias.data[3] = value
    leave_out_idle(vae)
    assert [name for name, part in vae.named_modules() if isinstance(part, Idle)] == [f"decoder.{DECODER[1]}"]
