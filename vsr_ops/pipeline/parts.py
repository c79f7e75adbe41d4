"""The modules of the main job beside the backbone, and how each is run: upscaler, CAPM, decoder modules, refiner."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from ..backbones.sd import SD
from ..backbones.svd import Backbone
from ..errors import SettingError
from ..flow.raft import Estimator
from ..flow.warp import dis_flow
from ..modules.capm import SD_UNET, SVD_UNET, attached, decoder_widths
from ..modules.capm_file import CAPMs
from ..modules.capm_hints import check_strength
from ..modules.cfw import CFW, check_w
from ..modules.compression import CompressionHead, estimate_levels, level_of
from ..modules.dcm import UpscaleFn
from ..modules.enlarging import Enlarging
from ..modules.refiner import Refiner, mix_of, refine_frames
from ..modules.sateco import FULL, Strengths
from ..modules.sateco import attached as attached_sateco
from ..modules.sateco_file import SATeCos
from ..modules.stam import STAM
from ..modules.video_upscaler import VideoUpscaler
from ..modules.video_upscaler import check_strength as check_video_strength
from ..sampling.calls import gather_tiles
from ..system.memory import free_bytes, to_device
from ..system.precision import dtype_of
from ..vae.budget import decoder_bytes, fitting_tile, modules_bytes, tile_side
from ..vae.decoder_modules import DecoderModules
from ..vae.latents import VAE_TILE
from ..vae.layout import is_temporal
from ..vae.stream import Streaming, stream_decode
from ..video import Frame
from .job import Job


@dataclass(frozen=True)
class CAPMSettings:
    """CAPM with its `strength`. The compression level of every frame is that of `crf`; without one (below 0) `head`
    estimates it, and without a head CAPM reads it from its own features."""

    capms: CAPMs
    strength: float = 1.0
    head: CompressionHead | None = None
    crf: float = -1.0

    def __post_init__(self) -> None:
        check_strength(self.strength)
        if self.crf >= 0:
            level_of(self.crf)

    def levels(self, job: Job) -> Tensor | None:
        """Levels `(frames,)` of a job's frames, where they are known before."""
        if self.crf >= 0:
            return torch.full((job.frames,), level_of(self.crf))
        if self.head is None:
            return None
        return torch.tensor(list(estimate_levels(self.head, (frame.image for frame in job.read()))))


@dataclass(frozen=True)
class SATeCoSettings:
    """SATeCo's halves, and how far they go."""

    halves: SATeCos
    strengths: Strengths = FULL


@dataclass(frozen=True)
class PipelineModules:
    """What stands around the diffusion: before it `upscale_fn` (a DCM; None is bicubic) and, on top of it, `video` with
    its `video_strength`; in UNet and decoder `prompts` and `sateco`; in the decoder `cfw` with its `decode_w`, and
    `stam`; after it a `refiner` with its `refiner_w`, or SATeCo's own `sateco_w` from 0 on. `flow` is what the
    alignment estimates motion by."""

    upscale_fn: UpscaleFn | None = None
    refiner: Refiner | None = None
    refiner_w: float = 0.0
    sateco_w: float = -1.0
    cfw: CFW | None = None
    decode_w: float = 0.75
    stam: STAM | None = None
    prompts: CAPMSettings | None = None
    flow: Estimator = dis_flow
    video: VideoUpscaler | None = None
    video_strength: float = 1.0
    sateco: SATeCoSettings | None = None

    def __post_init__(self) -> None:
        check_w(self.decode_w)
        check_video_strength(self.video_strength)
        if self.refiner is not None:
            mix_of(self.refiner.shape, self.refiner_w, self.sateco_w)
        elif self.sateco_w >= 0:
            raise SettingError(
                f"SATeCo's w is {self.sateco_w} without a refiner: expected one of the form 'paper'; give it, or leave"
                " the w at -1"
            )

    @property
    def enlarging(self) -> Enlarging:
        """What makes the input as large as the result."""
        return Enlarging(self.upscale_fn, self.video, self.video_strength)

    @property
    def of_decoder(self) -> DecoderModules:
        """Those that stand beside the VAE's decoder."""
        found = DecoderModules(self.cfw, self.decode_w, self.stam)
        if self.prompts is not None:
            found = replace(found, capm=self.prompts.capms.vae, strength=self.prompts.strength)
        if self.sateco is not None:
            found = replace(found, sateco=self.sateco.halves.vae, strengths=self.sateco.strengths)
        return found

    def check_fits(self, model: Backbone) -> None:
        """Raises SettingError for a module that was made for another UNet or VAE, before any work."""
        capm = None if self.prompts is None else self.prompts.capms.unet
        sateco = None if self.sateco is None else self.sateco.halves.unet
        for half in (capm, sateco):
            if half is not None:
                backbone = SD_UNET if isinstance(model, SD) else SVD_UNET
                half.check_fits(backbone, decoder_widths(model.unet.config["block_out_channels"]))
        self.of_decoder.check_fits(model.vae)


@contextmanager
def apply_capm(model: Backbone, prompts: CAPMSettings | None, levels: Tensor | None) -> Generator[None, None, None]:
    """Within, the levels of `model`'s UNet decoder go through CAPM, which fits it."""
    capm = None if prompts is None else prompts.capms.unet
    if prompts is None or capm is None:
        yield
        return

    def hint() -> Tensor | None:
        """Of the frames of the call that is being evaluated."""
        if levels is None:
            return None
        assert model.active is not None, "the UNet is called inside `serving`"
        run, call = model.active
        return levels[run.plan.windows[call.window].span.slice]

    with attached(capm, model.unet, hint, prompts.strength):
        yield


@contextmanager
def apply_sateco(model: Backbone, sateco: SATeCoSettings | None, lr: Tensor) -> Generator[None, None, None]:
    """Within, the levels of `model`'s UNet decoder go through SATeCo, which fits it, guided by the unscaled LR latents
    `(frames, 4, h, w)`, in the tiles of each call."""
    half = None if sateco is None else sateco.halves.unet
    if sateco is None or half is None or sateco.strengths.off:
        yield
        return

    def told() -> tuple[Tensor, int]:
        assert model.active is not None, "the UNet is called inside `serving`"
        run, call = model.active
        return to_device(gather_tiles(run.plan, call, lr) * model.scaling_factor, model.device), call.frames

    with attached_sateco(half, model.unet, told, sateco.strengths):
        yield


class Rolling:
    """A video `(frames, 3, h, w)` that is read once: slices of frames that only ever move forward."""

    def __init__(self, frames: Iterable[Tensor], count: int, size: tuple[int, int]) -> None:
        self._frames, self._held, self._first = iter(frames), deque[Tensor](), 0
        self.shape = torch.Size((count, 3, *size))

    def __getitem__(self, frames: slice) -> Tensor:
        start, stop = frames.start, frames.stop
        if start < self._first:
            raise SettingError(f"frame {start} was read already and given back: ask for frames in their order")
        while self._first < start:
            if self._held:
                self._held.popleft()
            else:
                next(self._frames)
            self._first += 1
        self._held.extend(islice(self._frames, stop - self._first - len(self._held)))
        return torch.stack(list(islice(self._held, stop - start)))


def decoded(
    model: Backbone,
    latents: Tensor,
    parts: PipelineModules,
    levels: Tensor | None,
    references: Callable[[], Iterator[Frame]],
    size: tuple[int, int],
    cuts: Sequence[int],
) -> Iterator[Tensor]:
    """Frames `(3, 8h, 8w)` of unscaled latents, not clamped, through the modules that there are."""
    modules = parts.of_decoder.acting
    reference: Rolling | None = None
    if modules.sees_reference:
        reference = Rolling((frame.image for frame in references()), latents.shape[0], size)
    how = Streaming(chunk=model.tile.frames, tile=decode_tile(model, latents, modules))
    return stream_decode(model.vae, latents, cuts, modules, reference, levels, how)


def decode_tile(model: Backbone, latents: Tensor, modules: DecoderModules) -> int:
    """The side in latents of the tiles that are decoded: VAE_TILE, or less where the device has no room for that."""
    size, together = dtype_of(model.vae.decoder).itemsize, modules.joins_frames or is_temporal(model.vae.decoder)
    frames = min(latents.shape[0], model.tile.frames) if together else 1

    def needed(tile: int) -> float:
        sides = [min(side, tile_side(tile, modules)) for side in latents.shape[-2:]]
        beside = modules_bytes(model.vae, modules, frames, sides, size)
        return decoder_bytes(model.vae, frames, sides, size) + beside

    return fitting_tile(VAE_TILE, needed, free_bytes(model.device))


def refined(
    parts: PipelineModules, pairs: Iterator[tuple[Tensor, Frame]], cuts: Sequence[int]
) -> Iterator[tuple[Tensor, Frame]]:
    """Decoded frames refined, each with its reference; as they are without a refiner."""
    if parts.refiner is None:
        return pairs
    waiting: deque[Frame] = deque()

    def noted() -> Iterator[tuple[Tensor, Tensor]]:
        for frame, reference in pairs:
            waiting.append(reference)
            yield frame, reference.image

    frames = refine_frames(parts.refiner, noted(), parts.refiner_w, cuts, parts.sateco_w)
    return ((frame, waiting.popleft()) for frame in frames)
