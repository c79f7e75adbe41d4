"""Zero terminal SNR: Lin et al.'s algorithm as diffusers has it, the denoiser there, and how a model says that it has
it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from tests.conftest import randomise
from tests.support.tensors import randn, relative
from vsr_ops.backbones.sd import SD, ZERO, model_sigmas, sigma_at, timestep_of
from vsr_ops.checkpoints.sd import SDWeights
from vsr_ops.checkpoints.text_file import Texts
from vsr_ops.errors import SettingError
from vsr_ops.pipeline.sampler import Settings, sample
from vsr_ops.sampling.tiling import TileSize, plan_tiles

if TYPE_CHECKING:
    from vsr_ops.backbones.svd import SVD

CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "attention_head_dim": (1, 2),
    "cross_attention_dim": 16,
    "use_linear_projection": True,
}


def model_of(tiny: SVD, **more: Any) -> SD:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**TINY).eval().requires_grad_(False)
    randomise(unet, 3)
    return SD(unet, tiny.vae, None, TileSize(8, 8, 4), CPU, torch.float32, **more)


# --- The schedule -----------------------------------------------------------------------------------------------------


def test_the_schedule_is_lins() -> None:
    """As diffusers computes it, in float64: its last alpha_bar is zero, where a finite level stands for it here."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = (1 - rescale_zero_terminal_snr(betas)).cumprod(0)
    ours = 1 / (model_sigmas(True) ** 2 + 1)
    assert float(kept[-1]) == 0 and float(ours[-1]) == pytest.approx(ZERO, rel=1e-9)
    assert relative(model_sigmas(True)[:-1], ((1 - kept) / kept).sqrt()[:-1]) < 1e-9
    assert float(model_sigmas(True)[0]) == pytest.approx(float(model_sigmas()[0]), rel=1e-9)
    assert (model_sigmas(True).diff() > 0).all()


def test_timesteps_and_levels_are_inverse() -> None:
    assert [timestep_of(float(model_sigmas(True)[t]), True) for t in (0, 1, 500, 998, 999)] == [0, 1, 500, 998, 999]
    assert sigma_at(999, True) == pytest.approx(float(model_sigmas(True)[-1]))
    assert timestep_of(1e9, True) == 999


# --- The denoiser -----------------------------------------------------------------------------------------------------


def test_an_exact_network_finds_the_truth_from_noise_alone(tiny: SVD) -> None:
    model, clean, noise = model_of(tiny, zero_snr=True), randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1)
    for sigma in (0.05, 1.0, 200.0, model.sigma_max):
        v = (noise - sigma * clean) / (sigma**2 + 1) ** 0.5
        model.unet.forward = lambda *_, v=v, **__: (v,)
        found = model.denoise(clean + sigma * noise, sigma, clean, model.context(None), 2)
        # v holds the clean latents as they are at the end: rounding does not grow with sigma
        assert relative(found, clean) < 1e-5


def test_the_unet_is_told_the_timestep_of_its_own_schedule(tiny: SVD) -> None:
    seen: list[int] = []
    for zero in (False, True):
        model = model_of(tiny, zero_snr=zero)
        inner = model.unet.forward
        model.unet.forward = lambda x, t, *a, inner=inner, **k: (seen.append(int(t)), inner(x, t, *a, **k))[1]
        x = randn(2, 4, 8, 8)
        with torch.no_grad():
            model.denoise(x, float(model_sigmas(zero)[700]), x, model.context(None), 2)
    assert seen == [700, 700] and float(model_sigmas(True)[700]) > 1.1 * float(model_sigmas()[700])


def test_the_main_job_samples_from_noise_alone(tiny: SVD) -> None:
    """Four Euler steps give what the same steps of x0 and noise give, computed apart."""
    lr, plan, model = randn(4, 4, 8, 8), plan_tiles(4, 8, 8, TileSize(8, 8, 4)), model_of(tiny, zero_snr=True)
    noise = randn(4, 4, 8, 8, seed=7)
    settings = Settings(steps=4, guidance="none")
    found = sample(model, lr, plan, settings, noise=noise)
    levels = model.sigmas(4)
    assert levels[0] == pytest.approx(model.sigma_max) and levels[0] > 4000
    x = noise.double() * (levels[0] ** 2 + 1) ** 0.5
    for sigma, following in pairwise(levels):
        with torch.no_grad():
            x0 = model.denoise(x.float(), sigma, lr, model.context(None), 4).double()
        x = x0 + (x - x0) * following / sigma
    assert torch.isfinite(found).all() and relative(found, x) < 1e-3


# --- What a model says ------------------------------------------------------------------------------------------------


def test_what_is_told_stands_over_what_the_file_seems() -> None:
    seems = SDWeights({}, "epsilon", {}, (8, 8, 4))
    assert seems.told() == seems
    assert seems.told(zero_snr=True) == replace(seems, prediction="v_prediction", zero_snr=True)
    assert seems.told("v_prediction") == replace(seems, prediction="v_prediction")
    zero = replace(seems, prediction="v_prediction", zero_snr=True)
    assert zero.told() == zero and zero.told(zero_snr=False) == replace(zero, zero_snr=False)
    with pytest.raises(SettingError, match="prediction is 'epsilon' with a zero terminal SNR"):
        zero.told("epsilon")
    with pytest.raises(SettingError, match="prediction is 'v': expected one of v_prediction, epsilon"):
        seems.told("v")


# --- Texts ------------------------------------------------------------------------------------------------------------


def test_a_text_is_the_prompt_and_the_other_branch_the_negative(tiny: SVD) -> None:
    """CFG of a prompt against its negative, by hand."""
    texts = Texts(randn(1, 77, 16, seed=1), randn(1, 77, 16, seed=2))
    model, zeros = model_of(tiny, texts=texts), model_of(tiny)
    assert model.context(None) is texts.prompt and model.negative_context() is texts.negative
    assert not zeros.context(None).any() and zeros.negative_context().shape == (1, 1, 16)
    lr, plan, noise = randn(4, 4, 8, 8), plan_tiles(4, 8, 8, TileSize(8, 8, 4)), randn(4, 4, 8, 8, seed=7)
    found = sample(model, lr, plan, Settings(steps=1, guidance="cfg", cfg=4.0), noise=noise)
    sigma = model.sigma_max
    x = noise * (sigma**2 + 1) ** 0.5
    with torch.no_grad():
        one, other = (model.denoise(x, sigma, lr, text, 4) for text in (texts.prompt, texts.negative))
    assert relative(found, other + 4 * (one - other)) < 1e-4


def test_a_text_of_another_width_is_refused_with_both(tiny: SVD) -> None:
    texts = Texts(randn(1, 77, 24), randn(1, 77, 24))
    with pytest.raises(SettingError, match="the text is 24 wide, the UNet's cross-attention takes 16"):
        model_of(tiny, texts=texts)
