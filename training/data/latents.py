"""Clips as a frozen VAE sees them, encoded once into shards that training draws from."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from training.data.folder import Folder, check_degradation, degraded
from training.loop.draws import generator_at, integer
from training.loop.state import weights_of, write_beside, writing
from training.loop.task import Batch
from vsr_ops.backbones.svd import Backbone
from vsr_ops.checkpoints.safefile import json_object
from vsr_ops.errors import SettingError
from vsr_ops.image.upscale import upscale_frames
from vsr_ops.modules.dcm import UpscaleFn, load_dcm
from vsr_ops.system.outputs import claimed, whole

SHARD = 16
SCALE = 4

Pair = tuple[Tensor, Tensor, Batch]
"""Clean and enlarged clips `(frames, 3, size, size)`, and tensors that go into the shard beside their latents."""


@dataclass(frozen=True)
class LatentSettings:
    """`clips` clips of `frames` frames of `size` x `size` pixels (a multiple of 64), degraded in a way of DEGRADATIONS
    but for a `clean_share`, and enlarged again: `upscaler` is "bicubic", or a DCM's file or run ("lite": the bundled
    one). `latents` is a folder to share between runs; empty: the run's own.
    """

    size: int = 192
    frames: int = 8
    clips: int = 1536
    degradation: str = "lite"
    clean_share: float = 0.2
    upscaler: str = "bicubic"
    video_share: float = 0.5
    seed: int = 1000
    latents: str = ""


class Latents:
    """`shard_0000.pt` ... in a folder, and `latents.json`, which says what they were made from."""

    #: Settings that may change: more clips of the same kind may join, and where they lie does not matter.
    free: tuple[str, ...] = ("latents", "clips")

    def __init__(self, folder: Path, settings: LatentSettings) -> None:
        if settings.size % 64 or min(settings.size, settings.clips, settings.frames) < 1:
            raise SettingError(
                f"data.size is {settings.size}, data.clips {settings.clips}, data.frames {settings.frames}: expected a"
                " size in multiples of 64, and at least one clip of one frame"
            )
        check_degradation(settings.degradation)
        self.folder, self.settings = folder, settings
        self._shards: dict[int, Batch] = {}

    @property
    def summary(self) -> str:
        return f"{self.settings.clips} clips encoded as {self._digest()}"

    def render(self, sources: Folder, model: Backbone) -> None:
        """Encodes the shards that are not there. Raises SettingError where those there are of other settings or another
        VAE, VideoError while another run adds to them, DiskError when the disk is full."""
        made_from = json.loads(json.dumps(self._made_from(model)))  # as it is read back
        note = self.folder / "latents.json"
        found = (json_object(note.read_text(errors="replace")) or {}) if note.exists() else None
        if found not in (None, made_from):
            what = ", ".join(key for key in made_from if (found or {}).get(key) != made_from[key])
            raise SettingError(
                f"{self.folder}: latents of another recipe ({what} differ); give data.latents another folder"
            )
        with writing(note, "nothing is lost"):
            self.folder.mkdir(parents=True, exist_ok=True)
        if found is not None and not self._missing():
            return  # nothing to write, so that any number of runs may be here
        with claimed(self.folder):
            if not note.exists():
                with writing(note, "nothing is lost"), whole(note) as part:
                    part.write_text(json.dumps(made_from, sort_keys=True))
            self._render(sources, model)

    def _missing(self) -> list[int]:
        return [number for number in range(self._count) if not self._path(number).exists()]

    def _render(self, sources: Folder, model: Backbone) -> None:
        missing = self._missing()
        upscale_fn = None
        if missing and self.settings.upscaler != "bicubic":
            upscale_fn = load_dcm(weights_of(self.settings.upscaler), model.device)
        with tqdm(total=SHARD * len(missing), unit="clip", desc="rendering clips", disable=not missing) as bar:
            for number in missing:
                made: list[Batch] = []
                for i in range(SHARD):
                    rng = generator_at(self.settings.seed, SHARD * number + i)
                    clean, upscaled, known = self._pair(sources, upscale_fn, rng)
                    made.append({**self._encode(model, clean, upscaled, rng), **known})
                    bar.update()
                self._write(number, made)

    def draw(self, rng: torch.Generator) -> Batch:
        """One clip: clean latents of deviation 1 and LR latents `(frames, 4, h, w)`, context `(1, dim)`; played
        backwards half of the time where the context knows no frame."""
        shard, index = self._clip(integer(rng, self.settings.clips))
        clip = {key: shard[key][index].float() for key in ("clean", "lr", "context")}
        clip["clean"] = clip["clean"] * shard["factor"]
        backwards = integer(rng, 2) == 1 and not clip["context"].any()
        return {key: value.flip(0) if backwards and key != "context" else value for key, value in clip.items()}

    @property
    def _count(self) -> int:
        return -(-self.settings.clips // SHARD)

    def _made_from(self, model: Backbone) -> dict[str, Any]:
        settings = {key: value for key, value in asdict(self.settings).items() if key not in self.free}
        return {"settings": settings, "vae": digest(model)}

    def _digest(self) -> str:
        note = self.folder / "latents.json"
        return hashlib.sha256(note.read_bytes()).hexdigest()[:8] if note.exists() else "new"

    def _path(self, number: int) -> Path:
        return self.folder / f"shard_{number:04d}.pt"

    def _clip(self, number: int) -> tuple[Batch, int]:
        """The shard that holds a clip, and the clip's place there."""
        shard, index = divmod(number, SHARD)
        if shard not in self._shards:
            self._shards[shard] = torch.load(self._path(shard), weights_only=True, mmap=True)
        return self._shards[shard], index

    def _pair(self, sources: Folder, upscale_fn: UpscaleFn | None, rng: torch.Generator) -> Pair:
        """A clean clip, its degraded one enlarged again, and what is known of how it was degraded."""
        settings = self.settings
        clean = sources.clip(settings.frames, settings.size, rng, settings.video_share)
        low = degraded(settings.degradation, clean, rng, SCALE, settings.clean_share)
        return clean, upscale_frames(low, (settings.size, settings.size), upscale_fn=upscale_fn), {}

    def _encode(self, model: Backbone, clean: Tensor, upscaled: Tensor, rng: torch.Generator) -> Batch:
        """One clip of a shard; `factor` is one number for all of it."""
        with torch.no_grad():
            pairs = [torch.cat([model.encode(frame[None]) for frame in clip]) for clip in (clean, upscaled)]
            context = model.context(upscaled[:1]).float().cpu()[0]
        latents = {"clean": pairs[0].half(), "lr": pairs[1].half(), "context": context.half()}
        return {**latents, "factor": torch.tensor(model.scaling_factor)}

    def _write(self, number: int, made: list[Batch]) -> None:
        shard = {key: torch.stack([clip[key] for clip in made]) for key in made[0] if key != "factor"}
        write_beside(self._path(number), {**shard, "factor": made[0]["factor"]}, "the shards before it are kept")


class LatentsTask(ABC):
    """What tasks on the latents of a frozen VAE share. Shards are rendered before the first step, in `data.latents` or
    beside the run; afterwards the VAE waits on the CPU to decode sample pictures."""

    def __init__(self, data: Path, out: Path, kind: Callable[[Path, Any], Latents], settings: LatentSettings) -> None:
        self._folder = Folder(data)
        self._latents = kind(Path(settings.latents) if settings.latents else out / "latents", settings)
        self._coder: Backbone | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the VAE: processes that draw samples need none."""
        return {**self.__dict__, "_coder": None}

    @abstractmethod
    def make_coder(self) -> Backbone:
        """What has the VAE, on the CPU in float32."""

    @property
    def data_summary(self) -> str:
        return self._latents.summary

    def prepare(self, device: torch.device) -> None:
        self._latents.render(self._folder, self.coder(device))
        self.coder(torch.device("cpu"))  # what trains needs the room

    def coder(self, device: torch.device) -> Backbone:
        """The VAE, and the image encoder where there is one, on `device`; the UNet has no weights."""
        if self._coder is None:
            self._coder = self.make_coder()
            self._coder.unet.to("meta")
        for part in (self._coder.vae, self._coder.image_encoder):
            if part is not None:
                part.to(device)
        self._coder.device = device
        return self._coder


def digest(model: Backbone) -> str:
    """Of the weights that encode."""
    encoder = [value for name, value in model.vae.state_dict().items() if not name.startswith("decoder.")]
    return fingerprint([*encoder, torch.tensor(model.scaling_factor, dtype=torch.float64)])


def fingerprint(tensors: Sequence[Tensor]) -> str:
    """The same on every device and in however many threads: whole numbers, the bits in float16 as files have them, are
    summed on the CPU."""
    sums: list[Tensor] = []
    for value in tensors:
        wide = value.dtype == torch.float64
        bits = value.cpu().view(torch.int64) if wide else value.cpu().half().view(torch.int16).long()
        sums += [bits.sum(), bits.square().sum()]
    return hashlib.sha256(torch.stack(sums).numpy().tobytes()).hexdigest()[:16]
