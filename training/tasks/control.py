"""A control for a Stable Diffusion: the loss of what that predicts, v or the noise, with the upscaled LR video's
latents as the hint (SDATC, section III-B). The SD is frozen, or its UNet's decoder learns too, as in the paper."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from training.data.latents import LatentsTask
from training.loop.draws import integer, uniform
from training.loop.recipe import Recipe, from_table
from training.loop.state import upscaler_note, weights_of
from training.loop.task import Batch
from training.tasks.sd import (
    FrameLatents,
    SDDataSettings,
    decoded_rows,
    noised,
    read_start_sd,
    sampled,
    start_file,
    unet_of,
    velocity,
)
from training.tasks.svd import read_start
from vsr_ops.backbones.sd import TIMESTEPS, build_sd, model_sigmas
from vsr_ops.backbones.svd import Backbone, build_svd
from vsr_ops.backbones.text import encode_texts
from vsr_ops.checkpoints.sd import TELLING_BIAS, is_own
from vsr_ops.checkpoints.sd_tuned import write_tuned_sd
from vsr_ops.checkpoints.text_encoder import read_text_encoder
from vsr_ops.checkpoints.text_file import read_texts
from vsr_ops.errors import SettingError
from vsr_ops.modules.control import Control, load_control, write_control

DECODER = ("up_blocks.", "conv_norm_out.", "conv_out.")
"""What the names of a UNet's decoder begin with."""


@dataclass(frozen=True)
class ControlModelSettings:
    """`start`: the SD ("lite", a file or a run); `vae`: the SVD whose VAE its latents are of ("lite", a file or a run),
    empty: the SD's own. `control`: the control to go on from ("lite", a file or a run), empty: a copy of the SD's
    encoder. `text`: what `python -m vsr_ops embed` made of the empty text, for a published SD without text encoder.
    `decoder`: whether the SD's UNet learns in its decoder too; the SD is then written beside the control.
    `checkpointing` computes the UNet's activations twice instead of keeping them."""

    start: str = "lite"
    vae: str = ""
    control: str = ""
    text: str = ""
    decoder: bool = False
    checkpointing: bool = False


@dataclass(frozen=True)
class ControlDataSettings(SDDataSettings):
    """A sample is one place in `crop_frames` frames that follow each other, with noise of one level."""

    crop_frames: int = 1


@dataclass(frozen=True)
class ControlLossSettings:
    """`drop`: the share of samples whose hint is zero, as guidance's unconditional branch has it."""

    drop: float = 0.1


class ClipLatents(FrameLatents):
    """A few frames of CAPMLatents' clips. Raises SettingError for more than there are."""

    free = (*FrameLatents.free, "crop_frames")

    def __init__(self, folder: Path, settings: ControlDataSettings) -> None:
        super().__init__(folder, settings)
        self._frames = settings.crop_frames
        if not 1 <= self._frames <= settings.frames:
            raise SettingError(
                f"data.crop_frames is {self._frames}: expected 1 to data.frames, which is {settings.frames}"
            )

    def draw(self, rng: torch.Generator) -> Batch:
        return self.draw_frames(rng, self._frames)


class ControlTask(LatentsTask):
    """Task "control". A sample is a few frames' latents and hints `(frames, 4, h, w)`, their timestep and noise."""

    def __init__(self, recipe: Recipe, data: Path, out: Path) -> None:
        self.shape = from_table(ControlModelSettings, recipe.model, "model")
        self.weights = from_table(ControlLossSettings, recipe.loss, "loss")
        settings = from_table(ControlDataSettings, recipe.data, "data")
        check_control(self.shape, self.weights)
        super().__init__(data, out, ClipLatents, settings)
        self._prediction = "v_prediction"

    def make_coder(self) -> Backbone:
        return coder_of(self.shape)

    def build(self) -> nn.Module:
        self._prediction, parts = build_parts(self.shape)
        return parts

    def trains(self, name: str) -> bool:
        return learns(self.shape, name)

    def sample(self, rng: torch.Generator) -> Batch:
        clip = self._latents.draw(rng)
        kept = float(uniform(rng, 0, 1) >= self.weights.drop)
        timestep = torch.tensor(integer(rng, TIMESTEPS))
        noise = torch.randn(clip["clean"].shape, generator=rng)
        return {"clean": clip["clean"], "hint": clip["hint"] * kept, "timestep": timestep, "noise": noise}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        return prediction_loss(model, by_frame(batch), self._prediction), {}

    def picture(self, model: nn.Module, batch: Batch) -> Tensor:
        return control_picture(model, first_frames(batch), self._prediction, self.coder(torch.device("cpu")))

    def export(self, model: nn.Module, path: Path, trained_on: str) -> None:
        export_parts(self.shape, model, path, trained_on, upscaler_note(self._latents.settings.upscaler))


def check_control(shape: ControlModelSettings, weights: ControlLossSettings) -> None:
    """Raises SettingError."""
    if not shape.start:
        raise SettingError("model.start is empty: expected the SD that the control is for (--set model.start=runs/sd)")
    if not 0 <= weights.drop <= 1:
        raise SettingError(f"loss.drop is {weights.drop}: expected a share from 0 to 1")


def coder_of(shape: ControlModelSettings) -> Backbone:
    """What has the VAE of the latents, on the CPU in float32."""
    cpu = torch.device("cpu")
    if shape.vae:
        return build_svd(read_start(shape.vae), cpu, torch.float32)
    return build_sd(read_start_sd(shape.start), cpu, torch.float32)


def build_parts(shape: ControlModelSettings) -> tuple[str, nn.ModuleDict]:
    """(what the SD predicts, its `unet` and the `control`, with the `context` that both are given). Raises
    CheckpointError, and SettingError for a control or text of another UNet, or an SD that cannot be trained so."""
    file = start_file(shape.start)
    if shape.decoder and (file.is_dir() or file.suffix != ".safetensors"):
        raise SettingError(
            f"model.start is {file} and model.decoder is true: expected one .safetensors file, in whose layout the"
            " tuned Stable Diffusion is written; give that, or set model.decoder to false"
        )
    weights = read_start_sd(shape.start)
    if weights.zero_snr:
        raise SettingError(
            f"{file}: its schedule ends in noise alone (zero terminal SNR), which this task does not train: expected"
            " Stable Diffusion's own, such as v2-1_768-ema-pruned.safetensors"
        )
    unet = unet_of(weights)
    if shape.control:
        control = load_control(weights_of(shape.control))
        control.check_fits(list(unet.config["block_out_channels"]), unet.config["cross_attention_dim"])
    else:
        control = Control.of(unet)
    if shape.checkpointing:
        unet.enable_gradient_checkpointing()
    parts = nn.ModuleDict({"unet": cast(nn.Module, unet), "control": control})
    parts.register_buffer("context", context_of(shape, unet.config["cross_attention_dim"]), persistent=False)
    return weights.prediction, parts


def context_of(shape: ControlModelSettings, width: int) -> Tensor:
    """What the UNet is told `(1, tokens, width)`, in training as in use: the empty text as the SD's own encoder has it,
    or one token of zeros for this pack's own. Raises SettingError for a published SD without an encoder or a text."""
    file = start_file(shape.start)
    if shape.text:
        context = read_texts(Path(shape.text)).prompt
    elif is_own(file):
        context = torch.zeros(1, 1, width)
    elif (encoder := read_text_encoder(file)) is not None:
        context = encode_texts(encoder, "", "", torch.device("cpu")).prompt
    else:
        raise SettingError(
            f"{file}: has no text encoder, and a published Stable Diffusion was trained with one: expected the encoded"
            " empty text; make it with `python -m vsr_ops embed` from the model's own encoder, and give it as"
            " model.text"
        )
    if context.shape[-1] != width:
        raise SettingError(
            f"the text is {context.shape[-1]} wide, the UNet of {file} takes {width}: give one of its own encoder"
        )
    return context


def learns(shape: ControlModelSettings, name: str) -> bool:
    """Whether a parameter of `build_parts`' model does: the control's, and those of the UNet's decoder, but for the one
    by which a published SD's prediction is told."""
    tuned = name.removeprefix("unet.")
    return name.startswith("control.") or (shape.decoder and tuned.startswith(DECODER) and tuned != TELLING_BIAS)


def export_parts(
    shape: ControlModelSettings, model: nn.Module, path: Path, trained_on: str, notes: dict[str, str]
) -> None:
    """The control, and where the UNet's decoder learnt the whole SD beside it, `..._sd.safetensors`, in the layout of
    the one that it started from: ComfyUI and this pack load it as they load that."""
    unet, control = parts_of(model)
    write_control(path, control, trained_on, notes)
    if shape.decoder:
        tuned = {key: value for key, value in unet.state_dict().items() if learns(shape, f"unet.{key}")}
        target = path.with_name(f"{path.stem}_sd{path.suffix}")
        config = {key: value for key, value in cast(Any, unet).config.items() if not key.startswith("_")}
        write_tuned_sd(target, start_file(shape.start), config, tuned, {"vsr.trained_on": trained_on, **notes})


def by_frame(batch: Batch) -> Batch:
    """A batch of clips as one of their frames: what a clip has one of, each of its frames has."""
    frames = batch["clean"].shape[1]
    return {
        key: value.flatten(0, 1) if value.ndim > 1 else value.repeat_interleave(frames) for key, value in batch.items()
    }


def first_frames(batch: Batch, count: int = 2) -> Batch:
    """The first frame of the first `count` clips, as `by_frame` gives frames."""
    return by_frame({key: value[:count, :1] if value.ndim > 1 else value[:count] for key, value in batch.items()})


def prediction_loss(model: nn.Module, frames: Batch, prediction: str) -> Tensor:
    """Of what the controlled UNet predicts (SDATC, section III-A), of a batch of frames."""
    scaled, target = noised(frames["clean"], frames["noise"], frames["timestep"])
    found = controlled(model, frames["hint"], scaled, frames["timestep"])
    if prediction == "epsilon":
        target = frames["noise"]
    return (found - target).square().mean()


def control_picture(model: nn.Module, frames: Batch, prediction: str, coder: Backbone) -> Tensor:
    """Frames sampled from one noise without and with the control."""
    noise, context = frames["noise"], cast(Tensor, model.context)
    columns = {
        "LR": frames["hint"],
        "without": sampled_by(partial(velocity, parts_of(model)[0], tokens=context), noise, prediction),
        "control": sampled_by(partial(controlled, model, frames["hint"]), noise, prediction),
        "truth": frames["clean"],
    }
    return decoded_rows(coder, columns)


def sampled_by(predict: Callable[[Tensor, Tensor], Tensor], noise: Tensor, prediction: str) -> Tensor:
    """`sampled` by a UNet of either prediction."""
    if prediction == "v_prediction":
        return sampled(predict, noise)
    return sampled(lambda scaled, timestep: as_velocity(predict(scaled, timestep), scaled, timestep), noise)


def parts_of(model: nn.Module) -> tuple[nn.Module, Control]:
    """(UNet, control)."""
    both = cast(Any, model)
    return both["unet"], both["control"]


def as_velocity(noise: Tensor, scaled: Tensor, timestep: Tensor) -> Tensor:
    """The v of latents, as the UNet takes them, whose noise is said: `sqrt(s^2 + 1) eps - s x`."""
    wide = model_sigmas().to(scaled)[timestep].view(-1, 1, 1, 1)
    return (wide**2 + 1).sqrt() * noise - wide * scaled


def controlled(model: nn.Module, hint: Tensor, scaled: Tensor, timestep: Tensor) -> Tensor:
    """What the UNet predicts with the control, all as the UNet takes it."""
    unet, control = parts_of(model)
    context = cast(Tensor, model.context)
    skips, middle = control(scaled, timestep, context, hint)
    added = {"down_block_additional_residuals": tuple(skips), "mid_block_additional_residual": middle}
    return velocity(unet, scaled, timestep, context, **added)
