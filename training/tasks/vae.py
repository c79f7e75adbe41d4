"""A small VAE of Stable Video Diffusion's shape (8x, 4 channels): first of pictures, then its decoder over time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import AutoencoderKLTemporalDecoder
from diffusers.models.resnet import ResnetBlock2D, TemporalResnetBlock
from einops import rearrange, reduce
from torch import Tensor, nn

from training.data.folder import Folder
from training.loop.curve import rows_of
from training.loop.recipe import Recipe, from_table
from training.loop.task import Batch
from training.losses.losses import band_error, psnr, temporal_difference
from vsr_ops.checkpoints.module_file import read_module, write_module
from vsr_ops.errors import CheckpointError, SettingError

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
PICTURE, TEMPORAL = "picture_vae", "vae"
#: Samples that an exported VAE's latents are measured on.
MEASURED = 16


@dataclass(frozen=True)
class VAEModelSettings:
    """Channels of the four levels; `picture` is the run, or exported file, of the picture VAE that the temporal one
    starts from."""

    block_out_channels: tuple[int, ...] = (32, 32, 64, 128)
    layers_per_block: int = 1
    picture: str = ""


@dataclass(frozen=True)
class VAEDataSettings:
    """Clips of `frames` frames of `size` x `size` pixels, a multiple of 8."""

    size: int = 128
    frames: int = 1
    video_share: float = 0.25


@dataclass(frozen=True)
class VAELossSettings:
    """`latent_noise`, in latent deviations, keeps the decoder calm when the sampler is slightly off; `scale` pulls the
    latents' deviation towards 1 (picture VAE); `change` weighs the change from frame to frame (temporal decoder)."""

    latent_noise: float = 0.04
    scale: float = 0.01
    change: float = 0.2


class PictureVAE:
    """Task "vae_picture". A sample is truth `(frames, 3, h, w)` in [-1, 1] and noise for its latent."""

    kind = PICTURE

    def __init__(self, recipe: Recipe, data: Path, out: Path) -> None:
        self._folder = Folder(data)
        self.shape = from_table(VAEModelSettings, recipe.model, "model")
        self.data = from_table(VAEDataSettings, recipe.data, "data")
        self.weights = from_table(VAELossSettings, recipe.loss, "loss")
        if self.data.size % 8 or min(self.data.size, self.data.frames) < 1:
            raise SettingError(
                f"data.size is {self.data.size}, data.frames {self.data.frames}: expected a multiple of 8, and at least"
                " one frame"
            )
        if bool(self.shape.picture) != (self.kind == TEMPORAL):
            needs = "expected the run of a picture VAE" if self.kind == TEMPORAL else "this task starts from nothing"
            raise SettingError(f"model.picture is '{self.shape.picture}': {needs}; set it so")

    @property
    def data_summary(self) -> str:
        return self._folder.summary

    def prepare(self, device: torch.device) -> None:
        self._folder.load()

    def build(self) -> nn.Module:
        return picture_vae(shape_of(self.shape))

    def trains(self, name: str) -> bool:
        return True

    def sample(self, rng: torch.Generator) -> Batch:
        data = self.data
        truth = self._folder.clip(data.frames, data.size, rng, data.video_share)
        noise = torch.randn(data.frames, 4, data.size // 8, data.size // 8, generator=rng)
        return {"truth": truth * 2 - 1, "noise": noise}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        mean, result = reconstruct(model, batch, self.weights.latent_noise)
        truth = flat(batch["truth"])
        loss = reconstruction_loss(result, truth) + self.weights.scale * scale_penalty(mean)
        return loss, {"psnr": psnr(result, truth, 2.0), "deviation": float(mean.detach().float().std())}

    def picture(self, model: nn.Module, batch: Batch) -> Tensor:
        _, result = reconstruct(model, batch, 0.0)
        first = rearrange(result, "(b t) c h w -> b t c h w", b=batch["truth"].shape[0])[:, 0]
        return rows_of([("truth", batch["truth"][:, 0] / 2 + 0.5), ("VAE", first / 2 + 0.5)])

    def export(self, model: nn.Module, path: Path, trained_on: str) -> None:
        write_module(path, self.kind, shape_of(self.shape), model.state_dict(), trained_on, torch.float32)


class TemporalVAE(PictureVAE):
    """Task "vae_temporal". As SVD was made: the latent space stays, only the decoder learns about time."""

    kind = TEMPORAL

    def build(self) -> nn.Module:
        picture = picture_vae(shape_of(self.shape))
        picture.load_state_dict(read_vae(Path(self.shape.picture), PICTURE)[1])
        return temporal_vae(picture, shape_of(self.shape))

    def trains(self, name: str) -> bool:
        return not name.startswith("encoder.")

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        _, result = reconstruct(model, batch, self.weights.latent_noise)
        truth = flat(batch["truth"])
        clips_of = "(b t) c h w -> b t c h w"
        result_clips = rearrange(result, clips_of, b=batch["truth"].shape[0])
        loss = decoder_loss(result, truth) + self.weights.change * temporal_difference(result_clips, batch["truth"])
        return loss, {"psnr": psnr(detail(result.float()), detail(truth), 2.0)}

    def export(self, model: nn.Module, path: Path, trained_on: str) -> None:
        samples = (self.sample(torch.Generator().manual_seed(number))["truth"] for number in range(MEASURED))
        state = scaled_vae(model.state_dict(), latent_spread(model, samples))
        config = {**shape_of(self.shape), "scaling_factor": SCALE}
        write_module(path, self.kind, config, state, trained_on, torch.float32)


def shape_of(shape: VAEModelSettings) -> dict[str, Any]:
    """diffusers' keyword arguments."""
    channels = list(shape.block_out_channels)
    return {
        **SHAPE,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "block_out_channels": channels,
        "layers_per_block": shape.layers_per_block,
    }


def picture_vae(shape: dict[str, Any] = SHAPE) -> AutoencoderKL:
    """Stage one: a VAE of single pictures. Residual branches start at zero, so that the first steps are quick."""
    up = ("UpDecoderBlock2D",) * len(shape["block_out_channels"])
    model = AutoencoderKL(**shape, up_block_types=cast("Any", up), use_quant_conv=False, use_post_quant_conv=False)
    for block in model.modules():
        if isinstance(block, ResnetBlock2D):
            nn.init.zeros_(block.conv2.weight)
            nn.init.zeros_(cast(Tensor, block.conv2.bias))
    return model


def cut_middle(model: AutoencoderKL, layers: int) -> AutoencoderKL:
    """Leaves in the decoder's middle what the temporal decoder of so many layers per block has: with one, its first
    residual block alone. So nothing is lost where that decoder starts from this one."""
    middle = cast(Any, model.decoder.mid_block)
    if layers == 1:
        middle.resnets, middle.attentions = middle.resnets[:1], nn.ModuleList()
    return model


def temporal_vae(picture: AutoencoderKL | None = None, shape: dict[str, Any] = SHAPE) -> AutoencoderKLTemporalDecoder:
    """Stage two: SVD's VAE. Given a picture VAE, its decoder starts as that VAE's: the temporal branches add zero and
    the last convolution over time passes each frame through. (But for the second half of the middle block: with one
    layer per block, diffusers' temporal decoder has no such half.)"""
    model = AutoencoderKLTemporalDecoder(**shape, scaling_factor=SCALE)
    model.quant_conv = nn.Identity()  # type: ignore[assignment]  # the original layout has none
    if picture is None:
        return model
    model.encoder.load_state_dict(picture.encoder.state_dict())
    names = {
        name.replace(f"resnets.{i}.", f"resnets.{i}.spatial_res_block."): value
        for name, value in picture.decoder.state_dict().items()
        for i in [name.partition("resnets.")[2].partition(".")[0]]
        if not (name.startswith("mid_block.resnets.1.") and shape["layers_per_block"] == 1)
    }
    missing, unexpected = model.decoder.load_state_dict(names, strict=False)
    # With one layer per block the middle's attention is there, but idle.
    new = [name for name in missing if not name.startswith("mid_block.attentions.")]
    assert not unexpected and all("temporal" in name or "time" in name for name in new), (missing, unexpected)
    for block in model.decoder.modules():
        if isinstance(block, TemporalResnetBlock):
            nn.init.zeros_(block.conv2.weight)
            nn.init.zeros_(cast(Tensor, block.conv2.bias))
    last = model.decoder.time_conv_out
    nn.init.dirac_(last.weight)
    nn.init.zeros_(cast(Tensor, last.bias))
    return model


def flat(video: Tensor) -> Tensor:
    return rearrange(video, "b t c h w -> (b t) c h w")


def encoded(model: nn.Module, frames: Tensor) -> Tensor:
    """The latent's mean, `(frames, 4, h/8, w/8)`, of frames in [-1, 1]."""
    return cast(Any, model).encoder(frames)[:, :4]


def latent_spread(model: nn.Module, samples: Iterable[Tensor]) -> Tensor:
    """Root mean square of each latent channel over samples of frames in [-1, 1], `(4,)`."""
    with torch.no_grad():
        squares = [reduce(encoded(model, frames).square(), "t c h w -> c", "mean") for frames in samples]
    return torch.stack(squares).mean(0).sqrt()


def reconstruct(model: nn.Module, batch: Batch, noise: float) -> tuple[Tensor, Tensor]:
    """(latent mean, reconstruction) of a batch, all frames along the first axis."""
    clips_, frames = batch["truth"].shape[:2]
    mean = encoded(model, flat(batch["truth"]))
    z = mean + noise * flat(batch["noise"])
    decoder = cast(Any, model).decoder
    if isinstance(model, AutoencoderKLTemporalDecoder):
        return mean, decoder(z, torch.zeros(clips_, frames, device=z.device), num_frames=frames)
    return mean, decoder(z)


def reconstruction_loss(result: Tensor, truth: Tensor) -> Tensor:
    """Half squared, half absolute error (PSNR without blur alone), plus the absolute error of fine bands."""
    error = (result - truth).float()
    return 4 * error.square().mean() + 0.5 * error.abs().mean() + 0.25 * band_error(result, truth)


def detail(x: Tensor) -> Tensor:
    """What a colour correction by low frequencies leaves alone; the pipeline takes the rest from the LR video."""
    low = F.avg_pool2d(x, 8)
    return x - F.interpolate(low, scale_factor=8.0, mode="bicubic")


def decoder_loss(result: Tensor, truth: Tensor) -> Tensor:
    """The temporal stage's: mostly detail, so that capacity goes where the colour correction does not reach."""
    structure = reconstruction_loss(detail(result.float()), detail(truth))
    return structure + 0.2 * (result - truth).float().square().mean()


def scale_penalty(z: Tensor) -> Tensor:
    """Pulls every latent channel's deviation towards 1; `z` is `(frames, 4, h, w)`."""
    spread = reduce(z.float().square(), "b c h w -> c", "mean").sqrt()
    return spread.log().square().mean()


def scaled_vae(state: dict[str, Tensor], spread: Tensor) -> dict[str, Tensor]:
    """The VAE with its latents divided by `spread * SCALE`, so that SCALE brings them to deviation 1 as SVD's are.

    Folded into the encoder's last and the decoder's first convolution: pictures come out the same. The variance, which
    is not trained, becomes zero.
    """
    state = {name: value.clone() for name, value in state.items()}
    factor = (spread * SCALE).view(4, 1, 1, 1)
    state["encoder.conv_out.weight"][:4] /= factor
    state["encoder.conv_out.bias"][:4] /= factor.flatten()
    state["encoder.conv_out.weight"][4:] = 0
    state["encoder.conv_out.bias"][4:] = -30
    state["decoder.conv_in.weight"] *= factor.view(1, 4, 1, 1)
    state["quant_conv.weight"] = torch.eye(8).view(8, 8, 1, 1)
    state["quant_conv.bias"] = torch.zeros(8)
    return state


def read_vae(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors) of an exported VAE, or of the one that the run in the folder `path` left.

    Raises CheckpointError.
    """
    file = path / "weights.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; expected the weights of a finished run of a {kind}")
    stored = read_module(file, kind)
    return stored.config, stored.tensors
