"""SVD whose concat latents are the upscaled LR video, frame by frame (DC-VSR, section 3), at lite and at full size.

Stage 1 trains all UNet weights, stage 2 all but the temporal attention and temporal residual layers (supplementary A).
The VAE is frozen, so clips are encoded once, into shards beside the run, before the first step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel
from torch import Tensor, nn

from training.data.latents import Latents, LatentSettings, LatentsTask
from training.loop.curve import rows_of
from training.loop.draws import uniform
from training.loop.recipe import Recipe, from_table
from training.loop.state import upscaler_note, weights_of
from training.loop.task import Batch
from training.tasks.vae import TEMPORAL, read_vae
from vsr_ops.backbones.attention import OneTokenAttention
from vsr_ops.backbones.svd import MICRO_CONDITIONS, SVD, Backbone, build_svd, sigmas
from vsr_ops.checkpoints.svd import LITE, SVDWeights, match_host_epsilon, read_svd, write_svd
from vsr_ops.errors import SettingError

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
#: Modules of the UNet that stage 2 freezes: temporal attention with its frame embedding, temporal residual blocks.
TEMPORAL_LAYERS = ("temporal_transformer_blocks", "time_pos_embed", "temporal_res_block")
#: Attention projections that LoRA adapts; stage 2 leaves the temporal ones out.
LORA = r".*\battn[12]\.(to_q|to_k|to_v|to_out\.0)"
LORA_SPATIAL = r"^(?!.*temporal_transformer_blocks).*\battn[12]\.(to_q|to_k|to_v|to_out\.0)"
#: Steps of the sampler in a run's sample pictures.
PICTURE_STEPS = 8


@dataclass(frozen=True)
class SVDModelSettings:
    """Either `start`: an SVD file or folder, "lite", or the run of an earlier stage. Or `vae`, the run of a temporal
    VAE (it may also replace the start's), and the shape of a new UNet.

    `stage` is 1 or 2; `lora_rank` above 0 trains that rank's adapters instead (needs peft); `checkpointing` computes
    activations twice instead of keeping them.
    """

    start: str = ""
    vae: str = ""
    stage: int = 1
    lora_rank: int = 0
    checkpointing: bool = False
    block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    num_attention_heads: tuple[int, ...] = (2, 2, 2, 2)
    layers_per_block: int = 1
    cross_attention_dim: int = 32


@dataclass(frozen=True)
class SVDLossSettings:
    """Log-normal noise levels (mean and deviation of ln sigma), and the share of samples without LR latents and image
    embedding, so that guidance has an unconditional branch."""

    log_mean: float = 0.0
    log_deviation: float = 2.0
    drop: float = 0.1


class SVDTask(LatentsTask):
    """Task "svd". A sample is one clip's latents, its LR latents, context, noise level and noise."""

    def __init__(self, recipe: Recipe, data: Path, out: Path) -> None:
        self.shape = from_table(SVDModelSettings, recipe.model, "model")
        self.weights = from_table(SVDLossSettings, recipe.loss, "loss")
        self.data = from_table(LatentSettings, recipe.data, "data")
        if self.shape.stage not in (1, 2):
            raise SettingError(f"model.stage is {self.shape.stage}: expected 1 (all weights) or 2 (spatial ones)")
        if not (self.shape.start or self.shape.vae):
            raise SettingError(
                "model.start and model.vae are empty: expected an SVD to start from (--set"
                " model.start=svd.safetensors), or the run of a temporal VAE (--set model.vae=runs/vae)"
            )
        super().__init__(data, out, Latents, self.data)

    def make_coder(self) -> SVD:
        return build_svd(self.base(), torch.device("cpu"), torch.float32)

    def base(self) -> SVDWeights:
        """The model before training, float32."""
        shape = self.shape
        if shape.start:
            weights = read_start(shape.start)
            if shape.vae:
                config, state = read_vae(Path(shape.vae), TEMPORAL)
                weights = replace(weights, vae_config=config, vae=state)
            return weights
        config, state = read_vae(Path(shape.vae), TEMPORAL)
        unet_config = unet_shape(shape, self.data.frames)
        unet = UNetSpatioTemporalConditionModel(**unet_config).state_dict()
        return SVDWeights(unet_config, config, None, unet, state, None, self.tile, {})

    @property
    def tile(self) -> tuple[int, int, int]:
        return self.data.size // 8, self.data.size // 8, self.data.frames

    def build(self) -> nn.Module:
        weights = self.base()
        with torch.device("meta"):
            unet = UNetSpatioTemporalConditionModel(**weights.unet_config)
        unet.load_state_dict(weights.unet, assign=True)
        match_host_epsilon(unet)
        for name, module in unet.named_modules():
            if name.endswith(".attn2"):
                cast(Any, module).set_processor(OneTokenAttention())
        if self.shape.checkpointing:
            unet.enable_gradient_checkpointing()
        return with_lora(unet, self.shape.lora_rank, self.shape.stage) if self.shape.lora_rank else unet

    def trains(self, name: str) -> bool:
        if self.shape.lora_rank:
            return "lora_" in name
        return self.shape.stage == 1 or not is_temporal(name)

    def sample(self, rng: torch.Generator) -> Batch:
        clip = self._latents.draw(rng)
        sigma = (self.weights.log_mean + self.weights.log_deviation * torch.randn((), generator=rng)).exp()
        kept = float(uniform(rng, 0, 1) >= self.weights.drop)
        return {
            "clean": clip["clean"],
            "lr": clip["lr"] * kept,
            "context": clip["context"] * kept,
            "sigma": sigma.clamp(0.002, 700),
            "noise": torch.randn(clip["clean"].shape, generator=rng),
        }

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        return edm_loss(model, **batch), {}

    def picture(self, model: nn.Module, batch: Batch) -> Tensor:
        """The middle frame of two clips, sampled in few steps from noise and decoded on the CPU."""
        two = {key: value[:2] for key, value in batch.items()}
        result = sampled(model, two["lr"], two["context"], two["noise"])
        coder = self.coder(torch.device("cpu"))
        factor = coder.scaling_factor
        return middle_frames(coder, {"LR": two["lr"], "sampled": result / factor, "truth": two["clean"] / factor})

    def export(self, model: nn.Module, path: Path, trained_on: str) -> None:
        unet = cast(Any, model).merge_and_unload() if self.shape.lora_rank else model
        noted = upscaler_note(self.data.upscaler)
        write_svd(path, replace(self.base(), unet=unet.state_dict(), tile=self.tile, metadata=noted), trained_on)


def unet_shape(shape: SVDModelSettings, frames: int) -> dict[str, Any]:
    """diffusers' keyword arguments of a new UNet: attention on all levels but the lowest, as SVD has it."""
    levels = len(shape.block_out_channels) - 1
    return {
        **UNET_LITE,
        "down_block_types": ["CrossAttnDownBlockSpatioTemporal"] * levels + ["DownBlockSpatioTemporal"],
        "up_block_types": ["UpBlockSpatioTemporal"] + ["CrossAttnUpBlockSpatioTemporal"] * levels,
        "block_out_channels": list(shape.block_out_channels),
        "num_attention_heads": list(shape.num_attention_heads),
        "layers_per_block": shape.layers_per_block,
        "cross_attention_dim": shape.cross_attention_dim,
        "num_frames": frames,
    }


def is_temporal(name: str) -> bool:
    """Whether a module or parameter belongs to a temporal attention or temporal residual layer."""
    return any(part in TEMPORAL_LAYERS for part in name.split("."))


def with_lora(unet: nn.Module, rank: int, stage: int) -> nn.Module:
    """Low-rank adapters on the attention projections. Raises SettingError where peft is missing."""
    try:
        from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise SettingError(
            f"model.lora_rank is {rank}, which needs peft: pip install peft, or set model.lora_rank to 0"
        ) from error
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA if stage == 1 else LORA_SPATIAL)
    return get_peft_model(cast(Any, unet), config)


def middle_frames(coder: Backbone, columns: Mapping[str, Tensor]) -> Tensor:
    """A picture of columns by name, each of clips of unscaled latents `(n, frames, 4, h, w)`: their middle frames,
    decoded on the CPU, a row for each clip."""
    pictures: list[tuple[str, Tensor]] = []
    with torch.autocast("cpu", enabled=False):
        for name, clips in columns.items():
            middle = clips.shape[1] // 2
            frames = [coder.decode(clip[middle : middle + 1].float().cpu()) for clip in clips]
            pictures.append((name, torch.cat(frames)))
    return rows_of(pictures)


def edm_loss(unet: nn.Module, clean: Tensor, lr: Tensor, context: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """EDM's loss (DC-VSR equations 11 and 12) of a v-prediction network: lambda |D(y + n) - y|^2 with lambda =
    (sigma^2 + 1) / sigma^2, which weighs the network's own error evenly over noise levels.

    `clean` are scaled latents `(videos, frames, 4, h, w)` of deviation 1, `lr` the LR latents as the UNet takes them,
    `context` `(videos, tokens, dim)`, `sigma` `(videos,)`, `noise` of deviation 1 like `clean`.
    """
    wide = sigma.view(-1, 1, 1, 1, 1)
    noisy = clean + wide * noise
    target = (noisy / (wide**2 + 1) - clean) * (wide**2 + 1).sqrt() / wide
    return (velocity(unet, noisy, lr, context, sigma).float() - target).square().mean()


def velocity(unet: nn.Module, noisy: Tensor, lr: Tensor, context: Tensor, sigma: Tensor) -> Tensor:
    """The network's v for latents at noise level `sigma` `(videos,)`."""
    wide = sigma.view(-1, 1, 1, 1, 1)
    scaled = torch.cat([noisy / (wide**2 + 1).sqrt(), lr], dim=2)
    conditions = torch.tensor([MICRO_CONDITIONS], device=noisy.device).expand(noisy.shape[0], -1)
    return unet(scaled, sigma.log() / 4, context, conditions).sample


def sampled(unet: nn.Module, lr: Tensor, context: Tensor, noise: Tensor, steps: int = PICTURE_STEPS) -> Tensor:
    """Latents of deviation 1, by Euler's method from pure noise."""
    levels = sigmas(steps)
    return euler(unet, noise * levels[0], lr, context, levels)


def euler(unet: nn.Module, x: Tensor, lr: Tensor, context: Tensor, levels: Sequence[float]) -> Tensor:
    """Latents at the last of the falling noise `levels`, from `x` at the first."""
    for sigma, following in pairwise(levels):
        level = torch.full((x.shape[0],), sigma, device=x.device)
        v = velocity(unet, x, lr, context, level).float()
        denoised = x / (sigma**2 + 1) - v * (sigma / (sigma**2 + 1) ** 0.5)
        x = x + (x - denoised) / sigma * (following - sigma)
    return x


def read_start(name: str) -> SVDWeights:
    """The SVD that a recipe starts from: "lite", a file or folder, or an earlier run. Raises CheckpointError."""
    return read_svd(LITE if name == "lite" else Path(weights_of(name)))
