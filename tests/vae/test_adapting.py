"""SATeCo in the decoder: tiles are one pass, which is the VAE's own modules with the adapters behind its levels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.small_vaes import CELL, noise, picture_vae, pictures, streamed, video_vae
from tests.support.tiny_capm import filled
from vsr_ops.errors import SettingError
from vsr_ops.modules.capm import CAPMShape
from vsr_ops.modules.cfw import CFW, CFWShape
from vsr_ops.modules.sateco import SATeCo, SATeCoShape, Strengths
from vsr_ops.modules.stam import STAM, STAMShape
from vsr_ops.modules.windows import WINDOW
from vsr_ops.sampling.tiling import Span
from vsr_ops.vae.adapting import adapting
from vsr_ops.vae.layout import level_widths, output_widths
from vsr_ops.vae.places import needed_span

NAMES = ("up_blocks.1", "up_blocks.2")
BOTH = Strengths()


def some(vae: Any, backbone: str = "sd-vae") -> SATeCo:
    """One for every level but the deepest, in which nothing is zero."""
    widths, taps = output_widths(vae), level_widths(vae)
    shape = SATeCoShape(
        backbone,
        {name: widths[name] for name in NAMES},
        dict.fromkeys(NAMES, 16),
        guide=6,
        head=8,
        taps={name: taps[2 - int(name[-1])] for name in NAMES},
    )
    torch.manual_seed(1)
    model = SATeCo(shape)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def plainly(vae: Any, model: SATeCo, z: Tensor, reference: Tensor, strengths: Strengths = BOTH) -> Tensor:
    """The VAE's own decoder over whole frames, what the encoder saw handed to hooks behind each level."""
    taps: dict[int, Tensor] = {}
    handles = [
        down.resnets[-1].register_forward_hook(lambda m, i, out, level=level: taps.update({level: out}))
        for level, down in enumerate(vae.encoder.down_blocks)
    ]
    vae.encoder(reference * 2 - 1)

    def hook(name: str) -> Any:
        def adapt(module: nn.Module, inputs: Any, out: Tensor) -> Tensor:
            guide = model.guide_of(name, taps[2 - int(name[-1])])
            return model(name, out, guide, len(out), strengths)

        return adapt

    for name in NAMES:
        block = vae.decoder.up_blocks[int(name[-1])].resnets[-1]
        handles.append(block.register_forward_hook(hook(name)))
    try:
        timed = {"num_frames": len(z)} if hasattr(vae.decoder, "time_conv_out") else {}
        return vae.decode(z, **timed).sample / 2 + 0.5
    finally:
        for handle in handles:
            handle.remove()


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("strengths", [BOTH, Strengths(0.7, 0), Strengths(0, 1.3)])
@pytest.mark.parametrize(("height", "width", "tile"), [(8, 10, 10), (9, 13, 5)])
def test_tiles_are_one_pass_of_the_decoders_own_modules(
    height: int, width: int, tile: int, strengths: Strengths
) -> None:
    vae = picture_vae()
    model, z, seen = some(vae), noise(3, 4, height, width), pictures(3, 3, height * CELL, width * CELL)
    whole = plainly(vae, model, z, seen, strengths)
    assert apart(whole, streamed(vae, z)) > 1e-2, "it acts"
    named = {"sateco": model, "strengths": strengths, "tile": tile}
    assert apart(streamed(vae, z, reference=seen, **named), whole) < 2e-5
    assert apart(streamed(vae, z, reference=seen, kept=0.0, **named), whole) < 1e-3


def test_beside_a_decoder_that_sees_time() -> None:
    vae = video_vae()
    model, z, seen = some(vae, "svd-vae"), noise(3, 4, 8, 11), pictures(3, 3, 32, 44)
    whole = plainly(vae, model, z, seen)
    for how in ({"tile": 11}, {"tile": 6}, {"tile": 6, "kept": 0.0}):
        assert apart(streamed(vae, z, reference=seen, sateco=model, **how), whole) < 1e-3


def test_beside_every_other_module() -> None:
    vae, z, seen = picture_vae(), noise(2, 4, 9, 12), pictures(2, 3, 36, 48)
    torch.manual_seed(3)
    stam, cfw = STAM(STAMShape((("up_1_1", 8),), 8, 2)), CFW(CFWShape((1,), (8,), 1, 4))
    for parameter in [*stam.parameters(), *cfw.parameters()]:
        parameter.data += 0.05 * torch.randn_like(parameter)
    beside = {
        "stam": stam.eval(),
        "cfw": cfw.eval(),
        "capm": filled(CAPMShape("sd-vae", {"up_blocks.1": 8}, code=8, prompt=6, size=4)),
        "sateco": some(vae),
    }
    whole = streamed(vae, z, reference=seen, tile=12, **beside)
    assert apart(streamed(vae, z, reference=seen, tile=5, **beside), whole) < 2e-5
    assert apart(streamed(vae, z, reference=seen, tile=5, kept=0.0, **beside), whole) < 1e-3


def test_a_fresh_one_and_strength_0_leave_the_decoder_as_it_is() -> None:
    vae, z, seen = picture_vae(), noise(2, 4, 8, 8), pictures(2, 3, 32, 32)
    plain = streamed(vae, z)
    assert torch.equal(streamed(vae, z, sateco=some(vae), strengths=Strengths(0, 0)), plain)
    fresh = SATeCo(some(vae).shape).eval()
    # Together, as TFA asks for, frames are rounded otherwise than one by one.
    assert apart(streamed(vae, z, reference=seen, sateco=fresh), plain) < 1e-5


def test_frames_of_other_scenes_do_not_matter() -> None:
    vae, z, seen = picture_vae(), noise(4, 4, 8, 8), pictures(4, 3, 32, 32)
    found = streamed(vae, z, (2,), seen, sateco=some(vae))
    other = torch.cat([z[:2], z[2:].flip(-1)]), torch.cat([seen[:2], seen[2:].flip(-1)])
    changed = streamed(vae, other[0], (2,), other[1], sateco=some(vae))
    assert torch.equal(changed[:2], found[:2]) and not torch.equal(changed[2:], found[2:])
    assert not torch.equal(streamed(vae, z, (), seen, sateco=some(vae))[:2], found[:2])


@pytest.mark.parametrize("strengths", [BOTH, Strengths(1, 0)])
def test_what_lies_outside_the_needed_part_changes_nothing(strengths: Strengths) -> None:
    """And what lies inside does: of a tile in the middle of a level."""
    vae = picture_vae()
    model = some(vae)
    op, out, extent = adapting(model, strengths, "up_blocks.2", 0), Span(19, 23), 40
    need = needed_span(op, out, extent)
    assert (need.start, need.stop) == ((16 - 2, 24 + 2) if strengths.temporal else (18, 24))
    assert op.window == (WINDOW if strengths.temporal else 1) and op.guided is not None
    x, tap = noise(2, 8, extent, extent), noise(2, 8, extent, extent, seed=1)

    def middle(x: Tensor, tap: Tensor) -> Tensor:
        # Statistics are the whole picture's: what is changed must not change them.
        block = model.part("up_blocks.2")
        norm, block.sfa.norm = block.sfa.norm, nn.Identity()  # type: ignore[assignment]
        try:
            assert op.guided is not None
            return op.guided(tap, x, None, None)[..., out.slice, out.slice]
        finally:
            block.sfa.norm = norm

    found = middle(x, tap)
    outside = torch.ones(extent, extent, dtype=torch.bool)
    outside[need.slice, need.slice] = False
    noisy = (
        x + 3 * outside * noise(2, 8, extent, extent, seed=2),
        tap + 3 * outside * noise(2, 8, extent, extent, seed=3),
    )
    assert apart(middle(*noisy), found) < 1e-5
    edge = tap.clone()
    edge[..., need.start, out.slice] += 1
    assert apart(middle(x, edge), found) > 1e-6, "the outermost pixel of what the encoder sees is needed"


def test_what_is_refused() -> None:
    vae, z, seen = picture_vae(), noise(2, 4, 8, 8), pictures(2, 3, 32, 32)
    with pytest.raises(SettingError, match="need a reference"):
        streamed(vae, z, sateco=some(vae))
    with pytest.raises(SettingError, match="made for backbone sd-vae, this model is svd-vae"):
        streamed(video_vae(), z, reference=seen, sateco=some(vae))
    with pytest.raises(SettingError, match="made for levels"):
        deep = SATeCoShape("sd-vae", {"up_blocks.0": 16}, {"up_blocks.0": 8}, 6, 8, taps={"up_blocks.0": 16})
        streamed(vae, z, reference=seen, sateco=SATeCo(deep))
