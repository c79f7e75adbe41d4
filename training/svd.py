"""Recipe: a small SVD whose concat latents are the upscaled LR video, frame by frame (DC-VSR, section 4.2).

First `latents` renders and encodes training pairs into shards (it may run beside the training, which picks up new
shards); then `train` fits the UNet to them with EDM's loss.

    python -m training.svd latents --data ../shared/clips --vae runs/picture --out runs/latents --clips 1536
    python -m training.svd train --latents runs/latents --out runs/unet --minutes 60
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel
from einops import rearrange, reduce
from torch import Tensor

from training.data import clips, load_sources, uniform
from training.degradation import degrade
from training.loop import Progress, Run, learning_rate
from training.vae import SCALE, picture_vae
from vsr_ops.checkpoint import match_host_epsilon
from vsr_ops.resize import resize_bicubic
from vsr_ops.svd import MICRO_CONDITIONS

FRAMES = 8
UNET_LITE: dict[str, Any] = {
    "in_channels": 8,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlockSpatioTemporal"] * 3 + ["DownBlockSpatioTemporal"],
    "up_block_types": ["UpBlockSpatioTemporal"] + ["CrossAttnUpBlockSpatioTemporal"] * 3,
    "block_out_channels": [64, 64, 64, 64],
    "layers_per_block": 1,
    "transformer_layers_per_block": 1,
    "num_attention_heads": [2, 2, 2, 2],
    "cross_attention_dim": 32,
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 96,
    "num_frames": FRAMES,
}
#: Share of samples without LR latents, so that guidance has an unconditional branch.
DROP = 0.1
#: Log-normal noise levels of the loss: wide, as a schedule of few steps visits all of 0.002 to 700.
LOG_MEAN, LOG_DEVIATION = 0.0, 2.0


def latent_spread(folder: Path) -> Tensor:
    """Deviation of each latent channel over the first shard, `(4,)`: what the files' scaling is made from."""
    shard = torch.load(folder / "shard_0000.pt", weights_only=True)
    return reduce(shard["clean"].float().square(), "n t c h w -> c", "mean").sqrt()


def render(options: argparse.Namespace) -> None:
    """Encodes `options.clips` pairs, in shards of 32, as the VAE gives them (not yet scaled)."""
    photos, videos = load_sources(options.data)
    vae = picture_vae()
    vae.load_state_dict(torch.load(options.vae / "checkpoint.pt", weights_only=True)["average"])
    vae.eval()
    options.out.mkdir(parents=True, exist_ok=True)
    for number in range(options.clips // 32):
        path = options.out / f"shard_{number:04d}.pt"
        if path.exists():
            continue
        seed = options.seed + number
        stream, rng = clips(photos, videos, FRAMES, options.size, seed, 0.5), torch.Generator().manual_seed(seed)
        pairs: list[Tensor] = []
        for _ in range(32):
            clean = next(stream)
            upscaled = resize_bicubic(degrade(clean, rng), (options.size, options.size)).clamp(0, 1)
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                pairs.append(vae.encoder(torch.cat([clean, upscaled]) * 2 - 1)[:, :4].half())
        stacked = rearrange(torch.stack(pairs), "n (two t) c h w -> two n t c h w", two=2)
        torch.save({"clean": stacked[0].clone(), "lr": stacked[1].clone()}, path)
        print(f"{path.name}  {len(pairs)} clips", flush=True)


def edm_loss(unet: UNetSpatioTemporalConditionModel, clean: Tensor, lr: Tensor, rng: torch.Generator) -> Tensor:
    """EDM's loss (DC-VSR equations 11 and 12) of a v-prediction network, weighted evenly over noise levels.

    `clean` are scaled latents `(videos, frames, 4, h, w)` of deviation 1, `lr` the LR latents as the UNet takes them.
    """
    videos = clean.shape[0]
    log_sigma = LOG_MEAN + LOG_DEVIATION * torch.randn(videos, generator=rng)
    sigma = log_sigma.exp().clamp(0.002, 700).view(-1, 1, 1, 1, 1)
    keep = (torch.rand(videos, generator=rng) >= DROP).float().view(-1, 1, 1, 1, 1)
    noisy = clean + sigma * torch.randn(clean.shape, generator=rng)
    scaled = torch.cat([noisy / (sigma**2 + 1).sqrt(), lr * keep], dim=2)
    context = torch.zeros(videos, 1, UNET_LITE["cross_attention_dim"])
    conditions = torch.tensor([MICRO_CONDITIONS]).expand(videos, -1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        v = unet(scaled, sigma.flatten().log() / 4, context, conditions).sample
    target = (noisy / (sigma**2 + 1) - clean) * (sigma**2 + 1).sqrt() / sigma
    return (v.float() - target).square().mean()


class Shards:
    """Random batches from the shards in a folder, scaled; looks for new shards now and then."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._rng = folder, torch.Generator().manual_seed(seed)
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._seen: set[Path] = set()
        self.spread = latent_spread(folder)

    def refresh(self) -> int:
        for path in sorted(set(self._folder.glob("shard_*.pt")) - self._seen):
            shard = torch.load(path, weights_only=True)
            self._pairs += list(zip(shard["clean"], shard["lr"], strict=True))
            self._seen.add(path)
        return len(self._pairs)

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """(clean, lr) of `size` clips; played backwards half of the time."""
        chosen = torch.randint(len(self._pairs), (size,), generator=self._rng)
        unit = 1 / self.spread.view(4, 1, 1)
        pairs: list[tuple[Tensor, Tensor]] = []
        for index in chosen.tolist():
            clean, lr = (x.float() * unit for x in self._pairs[index])
            back = uniform(self._rng, 0, 1) < 0.5
            pairs.append((clean.flip(0), lr.flip(0)) if back else (clean, lr))
        clean, lr = (torch.stack(list(x)) for x in zip(*pairs, strict=True))
        return clean, lr / SCALE


def train(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    unet = UNetSpatioTemporalConditionModel(**UNET_LITE)
    match_host_epsilon(unet)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=options.lr, betas=(0.9, 0.99), weight_decay=1e-3)
    run = Run(unet, optimizer, options.out, decay=0.998)
    run.resume()
    shards, progress = Shards(options.latents, options.seed + run.step), Progress(options.out)
    rng = torch.Generator().manual_seed(options.seed + 7 + run.step)
    total = 0.0
    shards.refresh()
    while run.seconds < 60 * options.minutes:
        start = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run.seconds / (60 * options.minutes), options.lr)
        loss = edm_loss(unet, *shards.batch(options.batch), rng)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        run.step += 1
        run.update_average()
        run.seconds += time.monotonic() - start
        total += loss.item() / 50
        if run.step % 50 == 0:
            progress.row(run.step, loss=total, clips=shards.refresh(), minutes=run.seconds / 60)
            total = 0.0
        if run.step % 100 == 0:
            run.save()
    run.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    latents = commands.add_parser("latents")
    latents.set_defaults(run=render)
    latents.add_argument("--data", type=Path, required=True)
    latents.add_argument("--vae", type=Path, required=True, help="folder of the picture VAE's run")
    latents.add_argument("--out", type=Path, required=True)
    latents.add_argument("--clips", type=int, default=1536)
    latents.add_argument("--size", type=int, default=192)
    latents.add_argument("--seed", type=int, default=1000)
    fit = commands.add_parser("train")
    fit.set_defaults(run=train)
    fit.add_argument("--latents", type=Path, required=True)
    fit.add_argument("--out", type=Path, required=True)
    fit.add_argument("--minutes", type=float, default=60)
    fit.add_argument("--batch", type=int, default=2)
    fit.add_argument("--lr", type=float, default=1e-3)
    fit.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
