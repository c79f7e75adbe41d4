"""What the command line leaves to the model: steps, guidance, colour, refiner and upscaler that it was made for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vsr_ops.checkpoints.safefile import UPSCALER_KEY
from vsr_ops.cli.chosen import color_of, guidance_of, refiner_of, steps_of, upscaler_of
from vsr_ops.cli.options import make_parser
from vsr_ops.cli.settings import settings_of
from vsr_ops.errors import SettingError
from vsr_ops.modules.refiner import LITE_REFINER
from vsr_ops.pipeline.sampler import Settings

SVD, SD = ("--model", "svd.safetensors"), ("--model", "sd21.safetensors", "--control", "diffbir.pth")


def chosen(of: Callable[..., object], *given: object) -> object:
    return of(make_parser().parse_args([str(each) for each in ("upscale", "in.mp4", "out.mp4", *given)]))


@pytest.fixture
def saying(tmp_path: Path) -> Callable[[str], Path]:
    """A checkpoint that says which upscaler's pictures it was trained on."""

    def write(upscaler: str) -> Path:
        save_file({"a": torch.zeros(1)}, tmp_path / "own.safetensors", {UPSCALER_KEY: upscaler})
        return tmp_path / "own.safetensors"

    return write


@pytest.fixture
def alone(saying: Callable[[str], Path]) -> Path:
    """A UNet's file that says nothing."""
    save_file({"a": torch.zeros(1)}, saying("bicubic").with_name("unet.safetensors"))
    return saying("bicubic").with_name("unet.safetensors")


@pytest.mark.parametrize(
    ("given", "steps", "guidance", "color", "refiner", "upscaler"),
    [
        ((), 1, "none", "none", "lite", "dcm"),
        (("--refiner", "none"), 1, "none", "detail", "none", "dcm"),
        (("--guidance", "pag"), 1, "pag", "none", "lite", "dcm"),
        (("--guidance-scale", 1.5), 1, "dssag", "none", "lite", "dcm"),
        (("--cfg", 2), 1, "dssag", "none", "lite", "dcm"),
        (("--color", "adain"), 1, "none", "adain", "lite", "dcm"),
        (("--control", "lite"), 1, "none", "none", "lite", "dcm"),
        (SVD, 25, "dssag", "none", "none", "bicubic"),
        ((*SVD, "--refiner", LITE_REFINER), 25, "dssag", "none", str(LITE_REFINER), "bicubic"),
        (SD, 25, "none", "adain", "none", "dcm"),
        ((*SD, "--steps", 50, "--cfg", 2, "--refiner", "lite"), 50, "dssag", "none", "lite", "dcm"),
        ((*SD, "--sampler", "ddpm"), 50, "none", "adain", "none", "dcm"),
        ((*SD, "--upscaler", "swinir.pth"), 25, "none", "adain", "none", "swinir.pth"),
    ],
)
def test_each_kind_of_model_runs_as_it_was_made_to(
    given: tuple[object, ...], steps: int, guidance: str, color: str, refiner: str, upscaler: str
) -> None:
    found = [chosen(of, *given) for of in (steps_of, guidance_of, color_of, refiner_of, upscaler_of)]
    assert found == [steps, guidance, color, refiner, upscaler]
    settings = chosen(settings_of, *given)
    assert isinstance(settings, Settings)
    assert (settings.steps, settings.guidance, settings.color) == (steps, guidance, color)


def test_dc_vsr_is_a_unet_alone(alone: Path) -> None:
    given = ("--unet", alone)
    assert [chosen(of, *given) for of in (steps_of, color_of, refiner_of)] == [25, "none", "none"]
    assert chosen(upscaler_of, *given) == "bicubic"
    with pytest.warns(UserWarning, match="upscaler is dcm: the model was trained on .* by bicubic"):
        assert chosen(upscaler_of, *given, "--upscaler", "dcm") == "dcm"


@pytest.mark.parametrize("names", [("--model",), ("--control",), ("--model", "svd.safetensors", "--unet")])
def test_a_file_says_what_it_was_trained_on(names: tuple[str, ...], saying: Callable[[str], Path]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for stored, name in (("lite", "dcm"), ("bicubic", "bicubic")):
            assert chosen(upscaler_of, *names, saying(stored)) == name
            assert chosen(upscaler_of, *names, saying(stored), "--upscaler", name) == name
        assert chosen(upscaler_of, *names, saying("x4.pth"), "--upscaler", "models/x4.pth") == "models/x4.pth"
    with pytest.warns(UserWarning, match="upscaler is bicubic: the model was trained on .* by dcm"):
        chosen(upscaler_of, *names, saying("lite"), "--upscaler", "bicubic")


def test_an_upscaler_that_is_not_bundled_must_be_named(saying: Callable[[str], Path]) -> None:
    with pytest.raises(SettingError, match=r"enlarged by x4\.pth, which is not bundled.*give its file"):
        chosen(upscaler_of, "--model", saying("x4.pth"))


def test_only_the_bundled_svd_has_a_layout_of_its_own() -> None:
    cases = [
        ((), "balanced"),
        (SD, "paper"),
        (("--model", "svd.safetensors"), "paper"),
        (("--layout", "shifted"), "shifted"),
    ]
    for given, layout in cases:
        settings = chosen(settings_of, *given)
        assert isinstance(settings, Settings) and settings.layout == layout


def test_rho_reaches_the_settings() -> None:
    for given, rho in (((), 0.5), (("--rho", 2), 2.0)):
        settings = chosen(settings_of, *given)
        assert isinstance(settings, Settings) and settings.rho == rho


def test_the_bundled_models_own_steps_start_from_the_lr_latent() -> None:
    cases: list[tuple[tuple[object, ...], float | None]] = [
        ((), 3.0),
        (("--control", "lite"), 3.0),
        (("--start-sigma", 5), 5.0),
        (("--steps", 4, "--start-sigma", 5), 5.0),
        (("--steps", 4), None),
        (("--denoise", 0.5), None),
        (("--sampler", "ddpm"), None),
        (SVD, None),
        (SD, None),
    ]
    for given, start in cases:
        settings = chosen(settings_of, *given)
        assert isinstance(settings, Settings) and settings.start_sigma == start, given
