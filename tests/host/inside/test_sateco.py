"""SATeCo in the host: off is off, its guide is cut with the tiles, wiring order is nothing, the decoder's half acts."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.tensors import randn, relative

from .small_sd import SHAPE, apply_control, real_control, wire
from .test_decode_host import module
from .wiring import dssag, ksampled, refused, sampled, tiled

NAMES = ("up_blocks.0", "up_blocks.1")
FOLDER = "vsr_sateco"


@pytest.fixture(scope="session")
def sateco(host: ModuleType) -> ModuleType:
    return module("vsr_ops.modules.sateco")


def some(sateco: ModuleType, fresh: bool = False, backbone: str = "sd-unet", widths: tuple[int, ...] = (64, 32)) -> Any:
    """For the small UNets of two levels."""
    named = dict(zip(NAMES, widths, strict=True))
    shape = sateco.SATeCoShape(backbone, named, dict.fromkeys(NAMES, 16), 8, 8, shrinks=dict.fromkeys(NAMES, 1))
    torch.manual_seed(2)
    made = sateco.SATeCo(shape).eval().requires_grad_(False)
    for parameter in () if fresh else made.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made


def lr(samples: Tensor | None = None) -> dict[str, Any]:
    return {"samples": randn(*SHAPE, seed=7) if samples is None else samples}


@pytest.fixture
def on(host: ModuleType, sateco: ModuleType) -> Any:
    """Puts it on a MODEL."""

    def put(model: Any, spatial: float = 1.0, temporal: float = 1.0, latent: Any = None, half: Any = None) -> Any:
        adapting = sateco.HostSATeCo(half or some(sateco), sateco.Strengths(spatial, temporal))
        return host.patch_sateco(model, adapting, latent or lr())

    return put


def test_a_fresh_one_and_strength_0_change_nothing(host: ModuleType, sd: Any, sateco: ModuleType, on: Any) -> None:
    plain = sampled(host, sd, wire())
    assert torch.equal(sampled(host, on(sd, half=some(sateco, fresh=True)), wire()), plain)
    assert on(sd, 0.0, 0.0) is sd
    acting = on(sd)
    found = sampled(host, acting, wire())
    assert relative(found, plain) > 1e-2
    off = on(acting, 0.0, 0.0)
    assert torch.equal(sampled(host, off, wire()), plain) and not off.get_nested_additional_models()
    assert torch.equal(sampled(host, sd, wire()), plain), "nothing stays"
    assert torch.equal(ksampled(acting, wire()), found), "under the host's own sampler"
    for strengths in ((1.0, 0.0), (0.0, 1.0)):
        assert relative(sampled(host, on(sd, *strengths), wire()), found) > 1e-3


@pytest.mark.parametrize("kind", ["SD 1.5", "SD 2.1"])
def test_its_guide_goes_with_the_tiles(
    host: ModuleType, nodes: dict[str, Any], models: dict[str, Any], on: Any, kind: str
) -> None:
    """One tile of the whole is the UNet without tiles; and latents that change in one place matter there alone."""
    short = (4, 4, 16, 16)
    given = lr(randn(*short, seed=7))
    whole = sampled(host, on(models[kind], latent=given), wire(short), 1.0, 1)
    one = sampled(host, tiled(nodes, on(models[kind], latent=given), "none"), wire(short), 1.0, 1)
    assert relative(one, whole) < 1e-5
    wide = (4, 4, 16, 48)
    samples = randn(*wide, seed=7)
    changed = samples.clone()
    changed[..., :8] = changed[..., :8].flip(-1)
    first, other = (
        sampled(host, tiled(nodes, on(models[kind], latent=lr(each)), "none"), wire(wide), 1.0, 1)
        for each in (samples, changed)
    )
    apart = (first - other).abs().amax((0, 1, 2))
    assert float(apart[:8].min()) > 1e-4 and torch.equal(apart[16:], torch.zeros(32))


def test_any_order_of_wiring_is_the_same(
    host: ModuleType, nodes: dict[str, Any], sd: Any, sateco: ModuleType, on: Any
) -> None:
    """With CAPM, DSSAG, tiles, and a control."""
    capm = module("vsr_ops.modules.capm")
    torch.manual_seed(0)
    prompts = capm.CAPM(capm.CAPMShape(capm.SD_UNET, {NAMES[0]: 64, NAMES[1]: 32}, code=8, prompt=8, size=4)).eval()
    for parameter in prompts.requires_grad_(False).parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    half = some(sateco)

    def prompted(model: Any) -> Any:
        return host.patch_capm(model, capm.HostCAPM(prompts, torch.tensor(0.5), 1.0))

    def adapted(model: Any) -> Any:
        return on(model, half=half)

    def others(model: Any) -> Any:
        return tiled(nodes, dssag(nodes, model), "none")

    wired = apply_control(real_control(sd, zero=False), wire())
    orders = ((prompted, adapted, others), (others, adapted, prompted), (adapted, others, prompted))
    found: list[Tensor] = []
    for order in orders:
        model = sd
        for patch in order:
            model = patch(model)
        found.append(sampled(host, model, wired, 1.0, 1))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert relative(sampled(host, others(prompted(sd)), wired, 1.0, 1), found[0]) > 1e-3
    assert relative(sampled(host, others(adapted(sd)), wired, 1.0, 1), found[0]) > 1e-3


def test_frames_of_other_scenes_do_not_matter(host: ModuleType, sd: Any, on: Any) -> None:
    """Of a video that comes whole: its cuts are the LATENT's."""
    known = module("nodes.session.known")
    samples, cut = randn(*SHAPE, seed=7), 3
    changed = torch.cat([samples[:cut], samples[cut:].flip(-1)])
    frames = torch.rand(SHAPE[0], 3, SHAPE[2] * 8, SHAPE[3] * 8)
    found, other = (
        sampled(
            host,
            on(sd, latent={"samples": each, known.KNOWN: known.KnownVideo.of(frames, each, (cut,))}),
            wire(),
            1.0,
            1,
        )
        for each in (samples, changed)
    )
    assert relative(other[:cut], found[:cut]) < 1e-6 and relative(other[cut:], found[cut:]) > 1e-3


def test_the_node_reads_a_file_of_both_halves(
    host: ModuleType, nodes: dict[str, Any], sd: Any, sateco: ModuleType, lite: Any
) -> None:
    import folder_paths

    file = module("vsr_ops.modules.sateco_file")
    layout = module("vsr_ops.vae.layout")
    vae = lite[1].first_stage_model
    widths, taps = layout.output_widths(vae), layout.level_widths(vae)
    names = list(widths)[1:3]
    shape = sateco.SATeCoShape(
        f"{layout.backbone_of(vae)}-vae",
        {name: widths[name] for name in names},
        dict.fromkeys(names, 16),
        8,
        8,
        taps={name: taps[max(taps) - int(name[-1])] for name in names},
    )
    torch.manual_seed(3)
    beside = sateco.SATeCo(shape)
    for parameter in beside.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    place = Path(folder_paths.models_dir) / FOLDER
    place.mkdir(parents=True, exist_ok=True)
    path = place / "own.safetensors"
    file.write_satecos(path, file.SATeCos(some(sateco), beside), "noise")
    try:
        model, adapting = nodes["VSRSATeCo"].execute(sd, "own.safetensors", lr(), 1.0, 1.0).args
        assert relative(sampled(host, model, wire()), sampled(host, sd, wire())) > 1e-2
        z, pictures = randn(3, 4, 12, 16), torch.rand(3, 96, 128, 3)
        decode = nodes["VSRDecode"]
        plain = decode.execute(lite[1], {"samples": z}, 0, reference=pictures).args[0]
        found = decode.execute(lite[1], {"samples": z}, 0, reference=pictures, sateco=adapting).args[0]
        assert relative(found, plain) > 1e-3
        tiles = decode.execute(lite[1], {"samples": z}, 0, reference=pictures, sateco=adapting, tile=8).args[0]
        assert relative(tiles, found) < 1e-3
        with refused("reference"):
            decode.execute(lite[1], {"samples": z}, 0, sateco=adapting)
    finally:
        path.unlink()


def test_what_does_not_fit_is_said_in_one_line(
    host: ModuleType, models: dict[str, Any], sd: Any, sateco: ModuleType, on: Any
) -> None:
    with pytest.raises(ValueError, match=r"made for backbone svd-unet, this model is sd-unet: give.*\Z"):
        on(sd, half=some(sateco, backbone="svd-unet"))
    with pytest.raises(ValueError, match=r"made for levels .*: give the model it was trained on\Z"):
        on(sd, half=some(sateco, widths=(64, 64)))
    with refused("NaN"):
        on(sd, latent=lr(torch.full(SHAPE, torch.nan)))
    for other in ((SHAPE[0] - 1, *SHAPE[1:]), (*SHAPE[:3], SHAPE[3] - 8)):
        with refused("lr_latent is", "the same video"):
            sampled(host, on(sd, latent=lr(randn(*other))), wire(), 1.0, 1)
    with pytest.raises(ValueError, match="no half for a VAE's decoder"):
        host.with_sateco(module("vsr_ops.vae.decoder_modules").DecoderModules(), sateco.HostSATeCo(None, sateco.FULL))
    with pytest.raises(ValueError, match="expected a number from 0"):
        sateco.Strengths(3.0, 1.0)
