r"""Recipe: a small VAE of Stable Video Diffusion's shape (8x, 4 channels, temporal decoder).

python -m training.vae --data ../shared/clips --out runs/picture --minutes 30
python -m training.vae --data ../shared/clips --out runs/vae --stage temporal --picture runs/picture \
    --minutes 30 --size 128 --lr 8e-4
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import AutoencoderKLTemporalDecoder
from diffusers.models.resnet import ResnetBlock2D, TemporalResnetBlock
from einops import rearrange, reduce
from torch import Tensor, nn

from training.data import clips, load_sources
from training.loop import Progress, Run, learning_rate

SCALE = 0.18215
SHAPE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "block_out_channels": [32, 32, 64, 128],
    "layers_per_block": 1,
    "latent_channels": 4,
    "sample_size": 256,
}
#: Noise on the latent while training, in latent deviations: keeps the decoder calm when the sampler is slightly off.
LATENT_NOISE = 0.04


def picture_vae() -> AutoencoderKL:
    """Stage one: a VAE of single pictures. Residual branches start at zero, so that the first steps are quick."""
    model = AutoencoderKL(
        **SHAPE, up_block_types=cast("Any", ("UpDecoderBlock2D",) * 4), use_quant_conv=False, use_post_quant_conv=False
    )
    for block in model.modules():
        if isinstance(block, ResnetBlock2D):
            nn.init.zeros_(block.conv2.weight)
            nn.init.zeros_(cast(Tensor, block.conv2.bias))
    return model


def temporal_vae(picture: AutoencoderKL | None = None) -> AutoencoderKLTemporalDecoder:
    """Stage two: SVD's VAE. Given a picture VAE, its decoder starts as that VAE's: the temporal branches add zero and
    the last convolution over time passes each frame through. (But for the second half of the middle block: with one
    layer per block, diffusers' temporal decoder has no such half.)"""
    model = AutoencoderKLTemporalDecoder(**SHAPE, scaling_factor=SCALE)
    model.quant_conv = nn.Identity()  # type: ignore[assignment]  # the original layout has none
    if picture is None:
        return model
    model.encoder.load_state_dict(picture.encoder.state_dict())
    names = {
        name.replace(f"resnets.{i}.", f"resnets.{i}.spatial_res_block."): value
        for name, value in picture.decoder.state_dict().items()
        for i in [name.partition("resnets.")[2].partition(".")[0]]
        if not name.startswith("mid_block.resnets.1.")
    }
    missing, unexpected = model.decoder.load_state_dict(names, strict=False)
    assert not unexpected and all("temporal" in n or "time" in n for n in missing), (missing, unexpected)
    for block in model.decoder.modules():
        if isinstance(block, TemporalResnetBlock):
            nn.init.zeros_(block.conv2.weight)
            nn.init.zeros_(cast(Tensor, block.conv2.bias))
    last = model.decoder.time_conv_out
    nn.init.dirac_(last.weight)
    nn.init.zeros_(cast(Tensor, last.bias))
    return model


def laplacian(x: Tensor, levels: int = 3) -> list[Tensor]:
    """Band-pass images of `(frames, c, h, w)`, finest first."""
    bands: list[Tensor] = []
    for _ in range(levels):
        small = F.avg_pool2d(x, 2)
        bands.append(x - F.interpolate(small, scale_factor=2.0, mode="bilinear"))
        x = small
    return bands


def reconstruction_loss(result: Tensor, truth: Tensor) -> Tensor:
    """Half squared, half absolute error (PSNR without blur alone), plus the absolute error of fine bands."""
    error = (result - truth).float()
    bands = zip(laplacian(result.float()), laplacian(truth), strict=True)
    fine = sum((a - b).abs().mean() for a, b in bands)
    return 4 * error.square().mean() + 0.5 * error.abs().mean() + 0.25 * fine


def detail(x: Tensor) -> Tensor:
    """What a colour correction by low frequencies leaves alone; the pipeline takes the rest from the LR video."""
    low = F.avg_pool2d(x, 8)
    return x - F.interpolate(low, scale_factor=8.0, mode="bicubic")


def decoder_loss(result: Tensor, truth: Tensor) -> Tensor:
    """The temporal stage's: mostly detail, so that capacity goes where the colour correction does not reach."""
    change = (result[1:] - result[:-1]) - (truth[1:] - truth[:-1])
    return (
        reconstruction_loss(detail(result.float()), detail(truth))
        + 0.2 * (result - truth).float().square().mean()
        + 0.2 * change.float().abs().mean()
    )


def scale_penalty(z: Tensor) -> Tensor:
    """Pulls every latent channel's deviation towards 1; `z` is `(frames, 4, h, w)`."""
    spread = reduce(z.float().square(), "b c h w -> c", "mean").sqrt()
    return spread.log().square().mean()


def reconstruct(model: AutoencoderKL | AutoencoderKLTemporalDecoder, truth: Tensor) -> tuple[Tensor, Tensor]:
    """(latent mean, reconstruction) of `(frames, 3, h, w)` in [-1, 1]; one clip for the temporal decoder."""
    mean = rearrange(model.encoder(truth), "b (two c) h w -> two b c h w", two=2)[0]
    z = mean + LATENT_NOISE * torch.randn_like(mean)
    if isinstance(model, AutoencoderKLTemporalDecoder):
        frames = truth.shape[0]
        return mean, model.decoder(z, torch.zeros(1, frames), num_frames=frames)
    return mean, model.decoder(z)


def in_float32(convolution: nn.Conv3d) -> None:
    """Keeps one convolution out of autocast: the bfloat16 gradient of 3D convolutions has crashed on CPUs."""
    forward = convolution.forward

    def exact(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return forward(x.float())

    convolution.forward = exact  # pyright: ignore[reportAttributeAccessIssue]


def train(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    photos, videos = load_sources(options.data)
    temporal = options.stage == "temporal"
    model: AutoencoderKL | AutoencoderKLTemporalDecoder = picture_vae()
    if temporal:
        start = torch.load(options.picture / "checkpoint.pt", weights_only=True)
        model.load_state_dict(start["average"])
        model = temporal_vae(model)
        # As SVD was made: the latent space stays, only the decoder learns about time.
        model.encoder.requires_grad_(False)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=options.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    run = Run(model, optimizer, options.out)
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            in_float32(module)
    run.resume()
    progress = Progress(options.out)
    frames = options.batch if temporal else 1
    stream = clips(
        photos, videos, frames, options.size, options.seed + 1 + run.step, video_share=0.4 if temporal else 0.25
    )
    totals: dict[str, float] = {}
    while run.seconds < 60 * options.minutes:
        start_time = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run.seconds / (60 * options.minutes), options.lr)
        truth = torch.cat([next(stream) for _ in range(options.batch // frames)]) * 2 - 1
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=options.bf16):
            mean, result = reconstruct(model, truth)
        if temporal:
            loss = decoder_loss(result, truth)
        else:
            loss = reconstruction_loss(result, truth) + 0.01 * scale_penalty(mean)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        run.step += 1
        run.update_average()
        run.seconds += time.monotonic() - start_time
        error = result.detach().float() - truth
        mse = (detail(error) if temporal else error).square().mean().item() / 4
        for name, value in {"loss": loss.item(), "mse": mse, "std": mean.float().std().item()}.items():
            totals[name] = totals.get(name, 0.0) + value / 100
        if run.step % 100 == 0:
            psnr = -10 * math.log10(totals["mse"])
            progress.row(run.step, **totals, psnr=psnr, minutes=run.seconds / 60)
            totals = {}
            run.save()
    run.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of pictures and videos")
    parser.add_argument("--out", type=Path, required=True, help="folder of this run; a checkpoint there is resumed")
    parser.add_argument("--stage", choices=("picture", "temporal"), default="picture")
    parser.add_argument("--picture", type=Path, help="folder of the picture run, for the temporal stage")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8, help="frames a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
