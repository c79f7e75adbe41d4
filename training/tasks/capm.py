"""CAPM for an SVD's UNet, which is frozen: EDM's loss on clips of known compression, in the decoder's levels."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from training.data.degradation import draw_bitrate, h264, shrink
from training.data.folder import Folder
from training.data.latents import SCALE, Latents, LatentSettings, LatentsTask, Pair
from training.loop.draws import generator_at, integer, uniform
from training.loop.recipe import Recipe, from_table
from training.loop.state import weights_of
from training.loop.task import Batch
from training.tasks.svd import edm_loss, middle_frames, read_start, sampled
from vsr_ops.backbones.svd import Backbone, build_svd
from vsr_ops.checkpoints.svd import SVDWeights
from vsr_ops.errors import SettingError
from vsr_ops.image.upscale import upscale_frames
from vsr_ops.modules.capm import CAPM, SVD_UNET, CAPMShape, attached, decoder_widths
from vsr_ops.modules.capm_file import CAPMs, load_capms, write_capms
from vsr_ops.modules.compression import COARSEST, rank_correlation
from vsr_ops.modules.dcm import UpscaleFn
from vsr_ops.video.codec import at_bit_rate


@dataclass(frozen=True)
class CAPMModelSettings:
    """`start`: the SVD, a file or folder, "lite", or a run. `capm`: the CAPM to go on from, a file, "lite", or a run,
    whose VAE half stays as it is; where it is empty or lacks the UNet's half: a new one of the other settings."""

    start: str = "lite"
    capm: str = ""
    components: int = CAPMShape.components
    code: int = CAPMShape.code
    prompt: int = CAPMShape.prompt
    size: int = CAPMShape.size
    weighing: str = CAPMShape.weighing


@dataclass(frozen=True)
class CAPMDataSettings(LatentSettings):
    """LatentSettings, but for `degradation`: a `clean_share` stays clean, the others go through H.264 at any CRF from
    `finest` to `coarsest`; or, where `bit_rate` has two, at any bit rate from the first to the second, in bits a second
    of 24 frames of 320x180, of which a smaller clip has its area's part (SDATC, section IV-A: 10K to 100K)."""

    clips: int = 256
    clean_share: float = 0.1
    upscaler: str = "lite"
    finest: int = 15
    coarsest: int = 35
    bit_rate: tuple[int, ...] = ()


@dataclass(frozen=True)
class CAPMLossSettings:
    """Log-normal noise levels (mean and deviation of ln sigma); the share of samples without LR latents (`drop`) and of
    those whose compression level is not told (`untold`); `agree` weighs how far d lies from what the level would have
    put in its place, so that features without a hint are read as with one."""

    log_mean: float = 0.0
    log_deviation: float = 2.0
    drop: float = 0.1
    untold: float = 0.5
    agree: float = 1.0


class CAPMChoices(Protocol):
    """What a recipe's [model] says of a new CAPM, as CAPMShape has it."""

    @property
    def components(self) -> int: ...
    @property
    def code(self) -> int: ...
    @property
    def prompt(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def weighing(self) -> str: ...


def capm_shape(backbone: str, widths: Mapping[str, int], chosen: CAPMChoices) -> CAPMShape:
    """The shape of a new CAPM beside a decoder of these widths."""
    return CAPMShape(backbone, widths, chosen.components, chosen.code, chosen.prompt, chosen.size, chosen.weighing)


def check_crfs(finest: int, coarsest: int) -> None:
    """Raises SettingError for a range of CRFs that there is not."""
    if not 0 <= finest <= coarsest <= COARSEST:
        raise SettingError(
            f"data.finest is {finest}, data.coarsest {coarsest}: expected 0 <= finest <= coarsest <= {COARSEST}"
        )


def check_bit_rate(rates: tuple[int, ...]) -> None:
    """Raises SettingError for a range of bit rates that there is not; none at all is one."""
    if rates and (len(rates) != 2 or not 0 < rates[0] <= rates[1]):
        raise SettingError(
            f"data.bit_rate is {list(rates)}: expected the lowest and the highest, above 0, in bits a second, such as"
            " [10000, 100000]"
        )


def drawn_crf(rng: torch.Generator, clean_share: float, finest: int, coarsest: int) -> int | None:
    """A clip's constant rate factor, None for the `clean_share` that stays clean."""
    if uniform(rng, 0, 1) < clean_share:
        return None
    return finest + integer(rng, coarsest - finest + 1)


class CAPMLatents(Latents):
    """Shards that also hold the compression level of each clip."""

    def __init__(self, folder: Path, settings: CAPMDataSettings) -> None:
        super().__init__(folder, settings)
        self._data = settings
        if settings.degradation != LatentSettings.degradation:
            raise SettingError(
                f"data.degradation is '{settings.degradation}': this task's clips go through H.264 at a known CRF;"
                " leave it out, and set data.finest and data.coarsest, or data.bit_rate"
            )
        check_crfs(settings.finest, settings.coarsest)
        check_bit_rate(settings.bit_rate)

    def draw(self, rng: torch.Generator) -> Batch:
        """What Latents draws, and the clip's level."""
        state = rng.get_state()
        number = integer(rng, self.settings.clips)
        rng.set_state(state)
        shard, index = self._clip(number)
        return {**super().draw(rng), "level": shard["level"][index].float()}

    def crf(self, rng: torch.Generator, small: Tensor) -> int | None:
        """The constant rate factor of the clip that `rng` began with, None for a clean one; draws nothing from it.
        `small` is the clip before compression: where bit rates are drawn, the factor is what meets one on it."""
        data, apart = self._data, generator_at(rng.initial_seed(), 1)
        crf = drawn_crf(apart, data.clean_share, data.finest, data.coarsest)
        if crf is None or not data.bit_rate:
            return crf
        height, width = small.shape[-2:]
        return at_bit_rate(small, draw_bitrate(apart, (height, width), data.bit_rate)).crf

    def _made_from(self, model: Backbone) -> dict[str, Any]:
        made = super()._made_from(model)
        if not self._data.bit_rate:  # shards from before there were bit rates are of such settings
            del made["settings"]["bit_rate"]
        return made

    def _pair(self, sources: Folder, upscale_fn: UpscaleFn | None, rng: torch.Generator) -> Pair:
        data = self._data
        clean = sources.clip(data.frames, data.size, rng, data.video_share)
        small = shrink(clean, SCALE)
        crf = self.crf(rng, small)
        low = small if crf is None else h264(small, crf)
        upscaled = upscale_frames(low, (data.size, data.size), upscale_fn=upscale_fn)
        return clean, upscaled, {"level": torch.tensor((crf or 0) / COARSEST)}


class CAPMTask(LatentsTask):
    """Task "capm". A sample is what CAPMLatents draws, a noise level, noise, and the hint (NaN: not told)."""

    def __init__(self, recipe: Recipe, data: Path, out: Path) -> None:
        self.shape = from_table(CAPMModelSettings, recipe.model, "model")
        self.weights = from_table(CAPMLossSettings, recipe.loss, "loss")
        settings = from_table(CAPMDataSettings, recipe.data, "data")
        if not self.shape.start:
            raise SettingError("model.start is empty: expected the SVD that stays as it is (--set model.start=lite)")
        if min(self.shape.components, self.shape.code, self.shape.prompt, self.shape.size) < 1:
            raise SettingError(f"the CAPM of {self.shape}: expected at least 1 of each; correct [model]")
        super().__init__(data, out, CAPMLatents, settings)
        self._first: Batch | None = None

    def prepare(self, device: torch.device) -> None:
        super().prepare(device)
        self._first = one_batch(self.sample)

    def make_coder(self) -> Backbone:
        return build_svd(self.base(), torch.device("cpu"), torch.float32)

    def base(self) -> SVDWeights:
        """The SVD, float32."""
        return read_start(self.shape.start)

    def build(self) -> nn.Module:
        svd = build_svd(self.base(), torch.device("cpu"), torch.float32)
        widths = decoder_widths(svd.unet.config["block_out_channels"])
        shape = self.shape
        capm = self._before().unet
        if capm is None:
            capm = CAPM(capm_shape(SVD_UNET, widths, shape))
            if self._first is not None:
                with settling(capm, cast(nn.Module, svd.unet)):
                    edm_loss(svd.unet, **of_edm(self._first))
        capm.check_fits(SVD_UNET, widths)
        return nn.ModuleDict({"unet": cast(nn.Module, svd.unet), "capm": capm})

    def _before(self) -> CAPMs:
        """What the run goes on from."""
        return load_capms(weights_of(self.shape.capm)) if self.shape.capm else CAPMs()

    def trains(self, name: str) -> bool:
        return name.startswith("capm.")

    def sample(self, rng: torch.Generator) -> Batch:
        weights, clip = self.weights, self._latents.draw(rng)
        sigma = (weights.log_mean + weights.log_deviation * torch.randn((), generator=rng)).exp()
        kept = float(uniform(rng, 0, 1) >= weights.drop)
        told = uniform(rng, 0, 1) >= weights.untold
        return {
            "clean": clip["clean"],
            "lr": clip["lr"] * kept,
            "context": clip["context"] * kept,
            "kept": torch.tensor(kept),
            "sigma": sigma.clamp(0.002, 700),
            "noise": torch.randn(clip["clean"].shape, generator=rng),
            "level": clip["level"],
            "hint": clip["level"] if told else torch.full_like(clip["level"], torch.nan),
        }

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        unet, capm = parts_of(model)
        frames = batch["clean"].shape[1]
        level, hint, kept = (batch[key].repeat_interleave(frames) for key in ("level", "hint", "kept"))
        with watched(capm, unet) as features, attached(capm, unet, hint):
            edm = edm_loss(unet, **of_edm(batch))
        agree = (disagreement(capm, features, level) * kept).mean()  # without LR latents there is nothing to read
        readings = torch.stack([capm.reading(name, value) for name, value in features.items()]).mean(0)
        rank = rank_correlation(readings, level)
        return edm + self.weights.agree * agree, {
            "edm": float(edm.detach()),
            "agree": float(agree.detach()),
            "rank": rank,
        }

    def picture(self, model: nn.Module, batch: Batch) -> Tensor:
        """The middle frame of two clips, sampled from one noise without CAPM, and with it told the level."""
        unet, capm = parts_of(model)
        lr, context, noise, truth = (batch[key][:2] for key in ("lr", "context", "noise", "clean"))
        plain = sampled(unet, lr, context, noise)
        with attached(capm, unet, batch["level"][:2].repeat_interleave(lr.shape[1])):
            prompted = sampled(unet, lr, context, noise)
        coder = self.coder(torch.device("cpu"))
        factor = coder.scaling_factor
        columns = {"LR": lr, "without": plain / factor, "CAPM": prompted / factor, "truth": truth / factor}
        return middle_frames(coder, columns)

    def export(self, model: nn.Module, path: Path, trained_on: str) -> None:
        write_capms(path, replace(self._before(), unet=parts_of(model)[1]), trained_on)


def of_edm(batch: Batch) -> dict[str, Tensor]:
    """What `edm_loss` takes of a batch."""
    return {key: batch[key] for key in ("clean", "lr", "context", "sigma", "noise")}


def one_batch(sample: Callable[[torch.Generator], Batch], count: int = 4) -> Batch:
    """`count` samples that no step of training draws."""
    samples = [sample(generator_at(0, -1 - number)) for number in range(count)]
    return {key: torch.stack([each[key] for each in samples]) for key in samples[0]}


def parts_of(model: nn.Module) -> tuple[nn.Module, CAPM]:
    """(UNet, CAPM)."""
    both = cast(Any, model)
    return both["unet"], both["capm"]


@contextmanager
def watched(capm: CAPM, unet: nn.Module) -> Generator[dict[str, Tensor], None, None]:
    """Keeps the features that come to each level, as they are before CAPM where this is entered first."""
    features: dict[str, Tensor] = {}

    def hook(level: str) -> Any:
        def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
            features[level] = output

        return keep

    handles = [unet.get_submodule(level).register_forward_hook(hook(level)) for level in capm.shape.widths]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


def disagreement(capm: CAPM, features: Mapping[str, Tensor], level: Tensor) -> Tensor:
    """How far d, read in features by level, lies from what the compression levels `(n,)` stand for: `(levels, n)`. It
    moves what reads, not what is read."""
    codes = {name: capm.code(name, value.detach()).float() for name, value in features.items()}
    meant = {name: capm.embedded(name, level).detach().float() for name in codes}
    return torch.stack([(codes[name] - meant[name]).square().mean(1) for name in codes])


@contextmanager
def settling(capm: CAPM, decoder: nn.Module) -> Generator[None, None, None]:
    """A CAPM takes the scale of its features from what `decoder` makes within, without gradients."""
    with torch.no_grad(), watched(capm, decoder) as features:
        yield
    capm.settle(features)
