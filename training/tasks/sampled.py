"""Latents that a trained SVD samples from degraded clips, rendered once into shards that training draws from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.data.folder import Folder
from training.data.held_out import shrunk, truths
from training.data.latents import Latents, LatentSettings, Pair, fingerprint
from training.loop.draws import generator_at, integer, pick, uniform
from training.loop.state import weights_of, write_beside
from training.loop.task import Batch
from training.tasks.capm import CAPMDataSettings, CAPMLatents
from training.tasks.svd import euler, sampled
from vsr_ops.backbones.svd import DTYPES, Backbone, sigmas
from vsr_ops.errors import SettingError
from vsr_ops.image.resize import quantize8
from vsr_ops.image.upscale import upscale_frames
from vsr_ops.modules.compression import COARSEST
from vsr_ops.modules.dcm import UpscaleFn, load_dcm

CELL = 8
"""Pixels of a latent a side."""


@dataclass(frozen=True)
class SampledSettings(LatentSettings):
    """Every clip is sampled in one of the numbers of `steps`, from its LR latents with noise of `start_sigma` (0: from
    pure noise). A sample is `crop_frames` frames of `crop` x `crop`
    pixels of one; its latents are the sampled ones with probability `sampled_share`, else the true ones with noise of
    `latent_noise` deviations."""

    upscaler: str = "lite"
    steps: tuple[int, ...] = (3, 4, 5)
    start_sigma: float = 0.0
    crop: int = 96
    crop_frames: int = 4
    sampled_share: float = 0.8
    latent_noise: float = 0.15


class SampledLatents(Latents):
    """Shards of sampled and true latents, of the truth and of the enlarged input (the guide) as bytes.

    One tile of the clip's whole size is sampled, without guidance, under autocast in `precision`.
    """

    free = (*Latents.free, "crop", "crop_frames", "sampled_share", "latent_noise")

    def __init__(self, folder: Path, settings: SampledSettings, precision: str) -> None:
        super().__init__(folder, settings)
        self._drawn, self._precision = settings, precision
        crop, frames = settings.crop, settings.crop_frames
        if crop % CELL or not 16 <= crop <= settings.size or not 1 <= frames <= settings.frames:
            raise SettingError(
                f"data.crop is {crop}, data.crop_frames {frames}: expected a multiple of {CELL} from 16 to data.size"
                f" ({settings.size}), and 1 to data.frames ({settings.frames})"
            )
        if min(settings.steps) < 1:
            raise SettingError(f"data.steps is {list(settings.steps)}: expected numbers of at least 1")

    def draw(self, rng: torch.Generator) -> Batch:
        """One crop: latents of deviation 1 `(frames, 4, h, w)`, guide and truth `(frames, 3, 8h, 8w)` in [0, 1]; played
        backwards half of the time."""
        settings = self._drawn
        shard, index = self._clip(integer(rng, settings.clips))
        cells = settings.crop // CELL
        room = settings.size // CELL - cells + 1
        first = integer(rng, settings.frames - settings.crop_frames + 1)
        top, left = integer(rng, room), integer(rng, room)

        def cut(name: str, unit: int) -> Tensor:
            rows, columns = (slice(unit * start, unit * (start + cells)) for start in (top, left))
            return shard[name][index, first : first + settings.crop_frames, :, rows, columns].float()

        if uniform(rng, 0, 1) < settings.sampled_share:
            z = cut("sampled", 1)
        else:
            z = cut("clean", 1) * shard["factor"]
            z = z + settings.latent_noise * torch.randn(z.shape, generator=rng)
        sample = {"z": z, "guide": cut("guide", CELL) / 255, "truth": cut("truth", CELL) / 255}
        return {key: value.flip(0) for key, value in sample.items()} if integer(rng, 2) else sample

    def _made_from(self, model: Backbone) -> dict[str, Any]:
        unet = fingerprint(list(model.unet.state_dict().values()))
        return {**super()._made_from(model), "unet": unet, "precision": self._precision}

    def _pair(self, sources: Folder, upscale_fn: UpscaleFn | None, rng: torch.Generator) -> Pair:
        clean, upscaled, known = super()._pair(sources, upscale_fn, rng)
        return quantize8(clean), quantize8(upscaled), known  # what the shard's bytes hold

    def _encode(self, model: Backbone, clean: Tensor, upscaled: Tensor, rng: torch.Generator) -> Batch:
        encoded = super()._encode(model, clean, upscaled, rng)
        steps, start = pick(rng, self._drawn.steps), self._drawn.start_sigma
        noise = torch.randn(encoded["lr"].shape, generator=rng)
        lr, context, noise = (x[None].float().to(model.device) for x in (encoded["lr"], encoded["context"], noise))
        dtype = DTYPES[self._precision]
        with torch.no_grad(), torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            if start:
                x = lr * model.scaling_factor + start * noise
                z = euler(model.unet, x, lr, context, sigmas(steps, start))[0]
            else:
                z = sampled(model.unet, lr, context, noise, steps)[0]
        bytes_of = {"guide": upscaled, "truth": clean}
        return {
            "sampled": z.cpu().half(),
            "clean": encoded["clean"],
            **{name: (255 * pictures).round().to(torch.uint8) for name, pictures in bytes_of.items()},
            "factor": encoded["factor"],
        }


# --- Clips of known compression -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CompressedSettings(SampledSettings, CAPMDataSettings):
    """Both; `steps` of the sampler are what the pack's pictures are made with."""

    clips: int = 256
    clean_share: float = 0.1
    steps: tuple[int, ...] = (4,)
    sampled_share: float = 1.0


class CompressedLatents(SampledLatents, CAPMLatents):
    """SampledLatents' shards of CAPMLatents' clips, with the compression level of each."""

    #: Of the held-out clips: their CRFs and frames.
    CRFS, FRAMES = (15, 35), 5

    def draw(self, rng: torch.Generator) -> Batch:
        """What SampledLatents draws, and the clip's level."""
        state = rng.get_state()
        number = integer(rng, self.settings.clips)
        rng.set_state(state)
        shard, index = self._clip(number)
        return {**super().draw(rng), "level": shard["level"][index].float()}

    def held_out(self, root: Path, model: Backbone) -> dict[str, Batch]:
        """Clips that no training sees, as `draw` gives them, by name and CRF; made once. None where `root` has none.

        The middle of validation's small clips, `data.size` a side.
        """
        path, size = self.folder / "held_out.pt", self.settings.size
        if path.exists():
            return torch.load(path, weights_only=True)
        found = {
            name: clip for name, clip in truths(root, self.FRAMES, large=False).items() if min(clip.shape[-2:]) >= size
        }
        upscale_fn = None
        if found and self.settings.upscaler != "bicubic":
            upscale_fn = load_dcm(weights_of(self.settings.upscaler), model.device)
        made: dict[str, Batch] = {}
        for crf in self.CRFS:
            for clip in shrunk({name: _middle(truth, size) for name, truth in found.items()}, crf):
                upscaled = quantize8(upscale_frames(clip.small, (size, size), upscale_fn=upscale_fn))
                stored = self._encode(model, clip.truth, upscaled, generator_at(0, crf))
                made[f"{clip.name}, CRF {crf}"] = {
                    "z": stored["sampled"].float(),
                    "guide": upscaled,
                    "truth": clip.truth,
                    "level": torch.tensor(crf / COARSEST),
                }
        write_beside(path, made, "the shards are kept")
        return made


def _middle(video: Tensor, size: int) -> Tensor:
    top, left = ((side - size) // 2 for side in video.shape[-2:])
    return video[..., top : top + size, left : left + size]
