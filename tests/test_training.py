"""The recipes' parts: reproducible data, honest degradation, losses that mean what they say, a run that resumes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel
from torch import nn

from training.data import Source, camera_clip, halve, random_clip, video_clip
from training.degradation import degrade, h264
from training.export import scaled_vae
from training.loop import Run, learning_rate
from training.svd import UNET_LITE, edm_loss
from training.vae import detail, picture_vae, temporal_vae
from vsr_ops.checkpoint import match_host_epsilon


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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


def test_degradation_is_the_same_bit_for_bit_and_worse_at_a_higher_crf(photo: torch.Tensor) -> None:
    clip = camera_clip(photo, 5, 64, generator(2))
    assert torch.equal(degrade(clip, generator(3)), degrade(clip, generator(3)))
    assert degrade(clip, generator(3)).shape == (5, 3, 16, 16)
    errors = [float((h264(clip, crf) - clip).square().mean()) for crf in (15, 25, 35)]
    assert errors[0] < errors[1] < errors[2]


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


def test_the_loss_of_a_perfect_denoiser_is_zero() -> None:
    """A network that answers with the v of the true clip has no loss, whatever the noise level."""
    clean = torch.randn(2, 2, 4, 8, 8, generator=generator(4))

    class Perfect(nn.Module):
        def forward(self, scaled: torch.Tensor, c_noise: torch.Tensor, *_: torch.Tensor) -> object:
            sigma = (4 * c_noise).exp().view(-1, 1, 1, 1, 1)
            noisy = scaled[:, :, :4] * (sigma**2 + 1).sqrt()
            x0 = (noisy / (sigma**2 + 1) - clean) * (sigma**2 + 1).sqrt() / sigma
            return type("Output", (), {"sample": x0})()

    loss = edm_loss(Perfect(), clean, torch.zeros_like(clean), generator(5))  # type: ignore[arg-type]
    assert float(loss) < 1e-4


def test_lite_unet_learns_on_one_batch() -> None:
    torch.manual_seed(0)
    small = {**UNET_LITE, "block_out_channels": [32, 32, 32, 32], "num_attention_heads": [1, 1, 1, 1]}
    unet = UNetSpatioTemporalConditionModel(**small)
    assert match_host_epsilon(unet) > 0
    clean = torch.randn(1, 2, 4, 8, 8)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    losses: list[float] = []
    for _ in range(12):
        loss = edm_loss(unet, clean, clean / 0.18215, generator(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_detail_ignores_a_colour_cast() -> None:
    x = torch.rand(2, 3, 32, 32, generator=generator(6))
    assert (detail(x + 0.3) - detail(x)).abs().max() < 1e-5
    assert detail(x).abs().max() > 0.1


def test_a_run_resumes_where_it_stopped(tmp_path: Path) -> None:
    def steps(run: Run, count: int) -> None:
        for _ in range(count):
            x = torch.randn(4, 3, generator=generator(run.step))
            loss = (run.model(x) - x.sum(1, keepdim=True)).square().mean()
            run.optimizer.zero_grad()
            loss.backward()
            run.optimizer.step()
            run.step += 1
            run.update_average()

    def fresh(folder: Path) -> Run:
        torch.manual_seed(7)
        model = nn.Linear(3, 1)
        return Run(model, torch.optim.AdamW(model.parameters(), lr=0.05), folder)

    whole, first = fresh(tmp_path / "whole"), fresh(tmp_path / "split")
    steps(whole, 8)
    steps(first, 5)
    first.save()
    second = fresh(tmp_path / "split")
    second.resume()
    assert second.step == 5
    steps(second, 3)
    assert torch.equal(second.model.weight, whole.model.weight)  # type: ignore[arg-type]
    assert torch.equal(second.average.weight, whole.average.weight)  # type: ignore[arg-type]


def test_the_learning_rate_warms_up_and_falls() -> None:
    rates = [learning_rate(spent / 100, 1e-3) for spent in range(101)]
    assert rates[0] < 1e-5 and max(rates) == pytest.approx(1e-3, rel=0.01) and rates[-1] == pytest.approx(5e-5)
