"""SATeCo's adapters for a Stable Diffusion's UNet, which is frozen: the loss of what that predicts on clips whose
frames share a noise level, guided by the upscaled LR video's latents (SATeCo's second stage)."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from training.data.latents import LatentsTask
from training.loop.draws import generator_at, integer
from training.loop.recipe import Recipe, from_table
from training.loop.state import weights_of
from training.loop.task import Batch
from training.tasks.control import (
    ClipLatents,
    ControlDataSettings,
    ControlModelSettings,
    by_frame,
    coder_of,
    context_of,
    sampled_by,
)
from training.tasks.sd import decoded_rows, noised, read_start_sd, unet_of, velocity
from vsr_ops.backbones.sd import TIMESTEPS
from vsr_ops.backbones.svd import Backbone
from vsr_ops.errors import SettingError
from vsr_ops.modules.capm import SD_UNET, decoder_widths
from vsr_ops.modules.sateco import FULL, SATeCo, SATeCoShape, attached
from vsr_ops.modules.sateco_file import SATeCos, load_satecos, write_satecos


@dataclass(frozen=True)
class SATeCoModelSettings:
    """`start`: the SD ("lite", a file or a run); `vae`: the SVD whose VAE its latents are of, empty: the SD's own;
    `text`: as the control's. `sateco`: a file or a run, whose VAE half joins what is written; the run goes on from its
    half for the UNet, and where there is none makes a new one: `inner` channels of TFA by level, deepest first, in
    heads of `head`, and `guide` channels of the guide."""

    start: str = "lite"
    vae: str = ""
    text: str = ""
    sateco: str = ""
    inner: tuple[int, ...] = (320, 320, 192, 128)
    guide: int = SATeCoShape.guide
    head: int = SATeCoShape.head


@dataclass(frozen=True)
class SATeCoDataSettings(ControlDataSettings):
    """As the control's: a sample is one place in `crop_frames` frames that follow each other."""

    crop_frames: int = 6


@dataclass(frozen=True)
class SATeCoLossSettings:
    """Nothing to set: the SD's own loss at timesteps drawn evenly."""


class SATeCoTask(LatentsTask):
    """Task "sateco". A sample is a few frames' latents and LR latents `(frames, 4, h, w)`, one timestep, noise by
    frame."""

    def __init__(self, recipe: Recipe, data: Path, out: Path) -> None:
        self.shape = from_table(SATeCoModelSettings, recipe.model, "model")
        from_table(SATeCoLossSettings, recipe.loss, "loss")
        settings = from_table(SATeCoDataSettings, recipe.data, "data")
        self._control = ControlModelSettings(self.shape.start, self.shape.vae, text=self.shape.text)
        super().__init__(data, out, ClipLatents, settings)
        self._prediction = "v_prediction"
        self._first: Batch | None = None

    def make_coder(self) -> Backbone:
        return coder_of(self._control)

    def prepare(self, device: torch.device) -> None:
        super().prepare(device)
        self._first = {key: value[None] for key, value in self.sample(generator_at(0, -1)).items()}

    def build(self) -> nn.Module:
        weights = read_start_sd(self.shape.start)
        if weights.zero_snr:
            raise SettingError(
                f"{self.shape.start}: its schedule ends in noise alone (zero terminal SNR), which this task does not"
                " train: expected Stable Diffusion's own"
            )
        self._prediction, unet = weights.prediction, unet_of(weights)
        parts = nn.ModuleDict({"unet": cast(nn.Module, unet)})
        width = unet.config["cross_attention_dim"]
        parts.register_buffer("context", context_of(self._control, width), persistent=False)
        sateco = self._before().unet
        fresh = sateco is None
        sateco = sateco or SATeCo(unet_shape_of(self.shape, list(unet.config["block_out_channels"])))
        sateco.check_fits(SD_UNET, decoder_widths(unet.config["block_out_channels"]))
        parts["sateco"] = sateco.requires_grad_(True)
        if fresh and self._first is not None:
            with torch.no_grad(), settling(sateco, cast(nn.Module, unet)):
                self.loss(parts, self._first)
        return parts

    def _before(self) -> SATeCos:
        return load_satecos(weights_of(self.shape.sateco)) if self.shape.sateco else SATeCos()

    def trains(self, name: str) -> bool:
        return name.startswith("sateco.")

    def sample(self, rng: torch.Generator) -> Batch:
        clip = self._latents.draw(rng)
        timestep = torch.tensor(integer(rng, TIMESTEPS))
        noise = torch.randn(clip["clean"].shape, generator=rng)
        return {"clean": clip["clean"], "hint": clip["hint"], "timestep": timestep, "noise": noise}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        frames = by_frame(batch)
        scaled, target = noised(frames["clean"], frames["noise"], frames["timestep"])
        with adapted(model, frames["hint"], batch["clean"].shape[1]):
            found = self._predict(model, scaled, frames["timestep"])
        target = frames["noise"] if self._prediction == "epsilon" else target
        return (found - target).square().mean(), {}

    def _predict(self, model: nn.Module, scaled: Tensor, timestep: Tensor) -> Tensor:
        parts = cast(Any, model)
        return velocity(parts["unet"], scaled, timestep, cast(Tensor, parts.context))

    def picture(self, model: nn.Module, batch: Batch) -> Tensor:
        """The first two frames of a clip, sampled from one noise without and with the adapters."""
        clip = {key: value[0] for key, value in batch.items()}
        predict = partial(self._predict, model)
        columns = {"LR": clip["hint"], "without": sampled_by(predict, clip["noise"], self._prediction)}
        with adapted(model, clip["hint"], len(clip["hint"])):
            columns["SATeCo"] = sampled_by(predict, clip["noise"], self._prediction)
        columns["truth"] = clip["clean"]
        shown = {name: latents[:2] for name, latents in columns.items()}
        return decoded_rows(self.coder(torch.device("cpu")), shown)

    def export(self, model: nn.Module, path: Path, trained_on: str) -> None:
        write_satecos(path, SATeCos(cast(Any, model)["sateco"], self._before().vae), trained_on)


def unet_shape_of(shape: SATeCoModelSettings, block_out_channels: Sequence[int]) -> SATeCoShape:
    """For the decoder of a UNet of these widths. Raises SettingError."""
    widths = decoder_widths(block_out_channels)
    if len(shape.inner) != len(widths):
        raise SettingError(f"model.inner is {list(shape.inner)}: expected one for each of {len(widths)} levels")
    # A level's output lies behind its upsampler, where it has one.
    last = len(widths) - 2
    shrinks = {name: 1 << max(last - index, 0) for index, name in enumerate(widths)}
    inner = dict(zip(widths, shape.inner, strict=True))
    return SATeCoShape(SD_UNET, widths, inner, shape.guide, shape.head, shrinks=shrinks)


def adapted(model: nn.Module, lr: Tensor, frames: int) -> Any:
    """Within, the UNet of `model` goes through its SATeCo, guided by LR latents `(clips * frames, 4, h, w)`."""
    parts = cast(Any, model)
    return attached(parts["sateco"], parts["unet"], lambda: (lr, frames), FULL)


@contextmanager
def settling(sateco: SATeCo, decoder: nn.Module) -> Generator[None, None, None]:
    """Within, what the levels of a diffusers decoder give is looked at; at the end a new module is settled by it."""
    seen: dict[str, Tensor] = {}

    def look(level: str) -> Any:
        return lambda module, inputs, output: seen.update({level: output.detach()})

    handles = [decoder.get_submodule(name).register_forward_hook(look(name)) for name in sateco.shape.widths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    sateco.settle(seen)
