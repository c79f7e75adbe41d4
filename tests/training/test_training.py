"""The recipes' parts: reproducible data, honest degradation, losses that mean what they say."""

from __future__ import annotations

import re

import pytest
import torch
from diffusers.models.attention import TemporalBasicTransformerBlock
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import AutoencoderKLTemporalDecoder
from diffusers.models.resnet import TemporalResnetBlock
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel
from torch import nn

from tests.support.tensors import generator
from tests.support.tiny_training import descended
from training.data.data import Source, camera_clip, halve, random_clip, video_clip
from training.losses.losses import band_error, charbonnier, frequency, laplacian, temporal_difference
from training.tasks.svd import UNET_LITE, edm_loss, is_temporal, velocity
from training.tasks.vae import SHAPE, detail, picture_vae, scaled_vae, temporal_vae
from vsr_ops.backbones.svd import SVD
from vsr_ops.checkpoints.svd import match_host_epsilon
from vsr_ops.sampling.tiling import TileSize


@pytest.fixture
def photo() -> torch.Tensor:
    return (torch.rand(3, 96, 120, generator=generator(0)) * 255).to(torch.uint8)


def test_a_seed_gives_the_same_clip_and_another_seed_another(photo: torch.Tensor) -> None:
    sources = [Source("a", photo[None])]
    draw = [random_clip(sources, [], 3, 32, generator(seed), 0.5) for seed in (5, 5, 6)]
    assert draw[0].shape == (3, 3, 32, 32)
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    assert float(draw[0].min()) >= 0 and float(draw[0].max()) <= 1


def test_a_still_camera_shows_a_constant_picture_as_it_is() -> None:
    grey = torch.full((3, 80, 80), 77, dtype=torch.uint8)
    clip = camera_clip(grey, 4, 32, generator(1))
    assert (clip - 77 / 255).abs().max() < 1e-5


def test_video_crops_are_consecutive_frames() -> None:
    video = torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1).expand(20, 3, 40, 40)
    for seed in range(4):
        times = video_clip(video, 5, 16, generator(seed))[:, 0, 0, 0] * 255
        steps = (times[1:] - times[:-1]).round()
        assert torch.equal(steps.abs(), torch.ones(4)) and len(set(steps.tolist())) == 1


def test_halving_averages_blocks() -> None:
    pixels = torch.tensor([[10, 20], [30, 40]], dtype=torch.uint8).expand(1, 3, 2, 2)
    assert halve(pixels).tolist() == [[[[25]]] * 3]


def test_a_temporal_decoder_starts_still_over_time() -> None:
    torch.manual_seed(0)
    decoder = temporal_vae(picture_vae()).decoder.eval()
    z = torch.randn(3, 4, 4, 4)
    with torch.no_grad():
        together = decoder(z, torch.zeros(1, 3), num_frames=3)
        alone = torch.cat([decoder(z[i : i + 1], torch.zeros(1, 1), num_frames=1) for i in range(3)])
    assert (together - alone).norm() / alone.norm() < 1e-5


def test_scaling_the_latents_leaves_the_pictures(photo: torch.Tensor) -> None:
    torch.manual_seed(0)
    vae = temporal_vae(picture_vae()).eval()
    spread = torch.tensor([0.5, 1.0, 2.0, 3.0])
    frames = photo[None, :, :32, :32].float() / 127.5 - 1
    with torch.no_grad():
        z = vae.encoder(frames)[:, :4]
        before = vae.decoder(z, torch.zeros(1, 1), num_frames=1)
        state = scaled_vae(vae.state_dict(), spread)
        vae.load_state_dict({name: value for name, value in state.items() if not name.startswith("quant_conv")})
        scaled = vae.encoder(frames)[:, :4]
        after = vae.decoder(scaled, torch.zeros(1, 1), num_frames=1)
    torch.testing.assert_close(scaled * 0.18215 * spread.view(4, 1, 1), z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def edm_sample(seed: int, videos: int = 2) -> dict[str, torch.Tensor]:
    rng = generator(seed)
    shape = (videos, 2, 4, 8, 8)
    sigma = (2 * torch.randn(videos, generator=rng)).exp()
    clean, lr, noise = (torch.randn(shape, generator=rng) for _ in range(3))
    return {"clean": clean, "lr": lr, "context": torch.zeros(videos, 1, 32), "sigma": sigma, "noise": noise}


def test_the_loss_of_a_perfect_denoiser_is_zero() -> None:
    """A network that answers with the v of the true clip has no loss, whatever the noise level; one whose v is wrong by
    a constant has its square: EDM's weight makes levels count alike."""
    sample = edm_sample(4)

    class Perfect(nn.Module):
        wrong = 0.0

        def forward(self, scaled: torch.Tensor, c_noise: torch.Tensor, *_: torch.Tensor) -> object:
            sigma = (4 * c_noise).exp().view(-1, 1, 1, 1, 1)
            noisy = scaled[:, :, :4] * (sigma**2 + 1).sqrt()
            v = (noisy / (sigma**2 + 1) - sample["clean"]) * (sigma**2 + 1).sqrt() / sigma
            return type("Output", (), {"sample": v + self.wrong})()

    network = Perfect()
    assert float(edm_loss(network, **sample)) < 1e-4
    network.wrong = 0.5
    assert float(edm_loss(network, **sample)) == pytest.approx(0.25, rel=1e-2)


def small_unet() -> UNetSpatioTemporalConditionModel:
    torch.manual_seed(0)
    small = {**UNET_LITE, "block_out_channels": [32, 32, 32, 32], "num_attention_heads": [1, 1, 1, 1]}
    unet = UNetSpatioTemporalConditionModel(**small)
    loose = [m for name, m in unet.named_modules() if re.search(r"\.norm[12]$", name) and getattr(m, "eps", 0) == 1e-6]
    assert match_host_epsilon(unet) == len(loose) > 10 and all(m.eps == 1e-5 for m in loose)
    return unet


def test_the_loss_is_that_of_the_denoiser_that_samples() -> None:
    """DC-VSR equation 11 with equation 12's D taken from the pipeline: the mean of (s^2 + 1) / s^2 |D(y + n) - y|^2."""
    unet, sample = small_unet(), edm_sample(5)
    vae = AutoencoderKLTemporalDecoder(**SHAPE, scaling_factor=0.18215)
    model = SVD(unet, vae, None, TileSize(8, 8, 2), torch.device("cpu"), torch.float32)
    terms: list[torch.Tensor] = []
    with torch.no_grad():
        for clean, lr, noise, sigma in zip(*(sample[k] for k in ("clean", "lr", "noise", "sigma")), strict=True):
            denoised = model.denoise(clean + sigma * noise, float(sigma), lr, torch.zeros(1, 1, 32), 2)
            terms.append((sigma**2 + 1) / sigma**2 * (denoised - clean).square())
        loss = edm_loss(unet, **sample)
    assert float(loss) == pytest.approx(float(torch.stack(terms).mean()), rel=1e-3)


def test_lite_unet_learns_on_one_batch() -> None:
    unet, sample = small_unet(), edm_sample(6, videos=1)
    sample["lr"] = sample["clean"] / 0.18215
    losses = descended(lambda: (edm_loss(unet, **sample), {}), unet, 2e-3, 6)["loss"]
    assert losses[-1] < 0.5 * losses[0]


def test_stage_two_freezes_the_temporal_layers_and_nothing_else() -> None:
    """By the classes of a real UNet's modules, not by their names."""
    unet = small_unet()
    temporal = {
        id(parameter)
        for module in unet.modules()
        if isinstance(module, (TemporalBasicTransformerBlock, TemporalResnetBlock))
        for parameter in module.parameters()
    }
    embedding = {id(p) for n, m in unet.named_modules() if n.endswith("time_pos_embed") for p in m.parameters()}
    frozen = {id(parameter) for name, parameter in unet.named_parameters() if is_temporal(name)}
    assert len(temporal) > 100 and len(embedding) > 10
    assert frozen == temporal | embedding


def test_without_its_temporal_layers_a_unet_still_hears_them() -> None:
    """Frozen layers still pass gradients on to those before them."""
    unet, sample = small_unet(), edm_sample(7, videos=1)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(not is_temporal(name))
    velocity(unet, sample["clean"], sample["lr"], sample["context"], sample["sigma"]).square().mean().backward()
    assert unet.conv_in.weight.grad is not None and unet.conv_in.weight.grad.abs().sum() > 0
    assert all(p.grad is None for n, p in unet.named_parameters() if is_temporal(n))


def test_detail_ignores_a_colour_cast() -> None:
    x = torch.rand(2, 3, 32, 32, generator=generator(6))
    assert (detail(x + 0.3) - detail(x)).abs().max() < 1e-5
    assert detail(x).abs().max() > 0.1


def test_charbonnier_is_its_epsilon_at_zero_and_the_absolute_error_far_from_it() -> None:
    x = torch.rand(2, 3, 8, 8, generator=generator(8))
    assert float(charbonnier(x, x, 1e-3)) == pytest.approx(1e-3)
    assert float(charbonnier(x + 2, x, 1e-3)) == pytest.approx(2, rel=1e-5)


def test_frequency_loss_knows_a_wave_by_its_two_coefficients() -> None:
    """A cosine of amplitude a over n columns has n*a/2 in one bin of an orthonormal transform of an n x n picture."""
    n, amplitude = 16, 0.5
    wave = amplitude * torch.cos(2 * torch.pi * 3 * torch.arange(n) / n).expand(1, 1, n, n)
    bins = n * (n // 2 + 1) * 2  # of the real transform, real and imaginary
    assert float(frequency(wave, torch.zeros_like(wave))) == pytest.approx(n * amplitude / 2 / bins, rel=1e-4)
    assert float(frequency(wave, wave)) == 0


def test_bands_and_what_is_left_add_up_to_the_picture() -> None:
    x = torch.rand(1, 3, 16, 16, generator=generator(9))
    fine, coarse = laplacian(x, 2)
    rest = torch.nn.functional.avg_pool2d(x, 4)
    grown = coarse + torch.nn.functional.interpolate(rest, scale_factor=2.0, mode="bilinear")
    again = fine + torch.nn.functional.interpolate(grown, scale_factor=2.0, mode="bilinear")
    assert (again - x).abs().max() < 1e-6


def test_the_error_of_bands_ignores_a_cast() -> None:
    x = torch.rand(1, 3, 16, 16, generator=generator(9))
    assert float(band_error(x + 0.3, x)) < 1e-6 < float(band_error(x * 1.1, x))


def test_temporal_difference_ignores_what_stands_still() -> None:
    x = torch.rand(2, 4, 3, 8, 8, generator=generator(10))
    assert float(temporal_difference(x + 0.2, x)) < 1e-6
    flicker = x + torch.tensor([0.0, 0.1, 0.0, 0.1]).view(1, 4, 1, 1, 1)
    assert float(temporal_difference(flicker, x)) == pytest.approx(0.1, rel=1e-4)
    assert float(temporal_difference(x[:, :1] + 1, x[:, :1])) == 0
