"""The main job without a host: a video in, DC-VSR's sampling over tiles, a larger video out.

The input is read twice (to encode it, and as the colour reference), so that only its latents are ever held whole.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, pairwise
from pathlib import Path

import torch
from torch import Tensor

from .align import ROUNDS, SHARE, align, check_strength
from .color import COLOR, correct
from .dcm import Enlarge
from .errors import SettingError
from .flow_field import Flow, check_fits, streamed_flow
from .guidance import COND, Branch, Strength, gamma_at, guide, strength
from .latents import CELL, decode_frames, encode_frames
from .propagation import Call, Propagation, Step, TileRun, calls, gather_tiles, run_pass, step_at
from .refiner import Refiner, refine_frames
from .resize import resize_bicubic
from .scenes import find_cuts
from .svd import SIGMA_MAX, SIGMA_MIN, SVD, sigmas
from .tiling import TilePlan, TileSize, plan_tiles
from .upscale import upscale_frames
from .video import Frame, VideoInfo, check_output, open_writer, read_frames

#: (stage, done, total): called after every unit of work; raising stops the run.
Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """Reports nothing."""


@dataclass(frozen=True)
class Settings:
    """What `upscale` does. None takes the model's or the strategy's own value.

    `steps` 0 decodes the LR latent as it is, to see what the diffusion adds. `denoise` below 1 starts from the LR
    latent at partial noise, keeping `steps`. `batch` is how many spatial tiles go
    through the UNet together where they need not all. `align` is lambda of SDATC's alignment along the flow, 0 is off.
    """

    scale: float = 4.0
    steps: int = 10
    guidance: str = "dssag"
    cfg: float | None = None
    guidance_scale: float | None = None
    rho: float = 0.5
    tile: TileSize | None = None
    overlap: float = 0.5
    propagation: Propagation = field(default_factory=Propagation)
    color: str = "detail"
    seed: int = 0
    denoise: float = 1.0
    batch: int = 1
    align: float = 0.0
    align_mode: str = "gradient"

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 16:
            raise SettingError(f"scale is {self.scale}: expected a number above 0, at most 16")
        if not 0 <= self.steps <= 1000:
            raise SettingError(f"steps is {self.steps}: expected a whole number from 1 to 1000, or 0 for no diffusion")
        if not 0.01 <= self.denoise <= 1:
            raise SettingError(f"denoise is {self.denoise}: expected a share from 0.01 to 1")
        if not 0 < self.rho <= 100:
            raise SettingError(f"rho is {self.rho}: expected a number above 0, at most 100 (0.5 is the paper's)")
        if self.batch < 1:
            raise SettingError(f"batch is {self.batch}: expected a whole number from 1")
        if self.color not in COLOR:
            raise SettingError(f"color is {self.color!r}: expected one of {', '.join(COLOR)}")
        strength(self.guidance, self.cfg, self.guidance_scale)
        check_strength(self.align, self.align_mode)


@dataclass(frozen=True)
class Parts:
    """What stands around the diffusion: `enlarge` (a DCM; None is bicubic) before it, a refiner with its `w` after."""

    enlarge: Enlarge | None = None
    refiner: Refiner | None = None
    w: float = 0.0


@dataclass(frozen=True)
class Job:
    """An input, the frames [start, stop) of it, and the sizes that follow."""

    info: VideoInfo
    start: int
    stop: int
    scale: float

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= self.info.frames:
            raise SettingError(
                f"frames {self.start}:{self.stop} of '{self.info.path}': it has {self.info.frames} frames;"
                " expected A < B within them"
            )

    @property
    def frames(self) -> int:
        return self.stop - self.start

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the result, in pixels."""
        return max(1, round(self.info.height * self.scale)), max(1, round(self.info.width * self.scale))

    def latent_size(self, factor: int) -> tuple[int, int]:
        """Height and width of the padded latent, multiples of the UNet's factor."""
        cell = CELL * factor
        return (-(-self.size[0] // cell) * factor, -(-self.size[1] // cell) * factor)

    def upscaled(self, enlarge: Enlarge | None = None) -> Iterator[Frame]:
        """The LR frames at the result's size: by `enlarge`, if there is one, then bicubic; clamped, unpadded."""
        for frame in read_frames(self.info, self.start, self.stop):
            image = upscale_frames(frame.image[None], self.size, enlarge=enlarge)[0]
            alpha = frame.alpha
            if alpha is not None:
                alpha = resize_bicubic(alpha[None], self.size)[0].clamp(0, 1)
            yield Frame(image, alpha, frame.pts)


def make_plan(job: Job, settings: Settings, tile: TileSize, factor: int, cuts: Sequence[int] = ()) -> TilePlan:
    """The tiles of a job; `tile` is the model's, used where the settings name none."""
    return plan_tiles(job.frames, *job.latent_size(factor), settings.tile or tile, settings.overlap, cuts, factor)


def scene_cuts(job: Job) -> tuple[int, ...]:
    """First frames of new scenes, counted from the job's first frame."""
    return find_cuts(frame.image for frame in read_frames(job.info, job.start, job.stop))


def noise_schedule(settings: Settings) -> list[float]:
    """Falling sigmas with a final 0: all of them, or the last `steps` of a longer schedule at partial denoise."""
    if settings.steps == 0:
        return [0.0]
    total = max(settings.steps, int(settings.steps / settings.denoise))
    return sigmas(total)[-(settings.steps + 1) :]


def unet_calls(plan: TilePlan, settings: Settings) -> int:
    """How many UNet calls `sample` makes: branches of each step's guidance times the batches of its tiles."""
    chosen = guide(settings.guidance)
    lagged, kinds = settings.propagation.sap_lagged, settings.propagation.kinds
    total = 0
    for index, power in enumerate(strengths(settings)):
        batches = sum(1 for _ in calls(plan, step_at(index, kinds), COND, settings.batch, synchronous=not lagged))
        total += chosen.passes(power) * batches
    return total


def strengths(settings: Settings) -> list[Strength]:
    """The guidance's strengths at each step, gamma included."""
    power = strength(settings.guidance, settings.cfg, settings.guidance_scale)
    schedule = noise_schedule(settings)
    if settings.steps == 0:
        return []
    # A partial schedule is a part of the model's own, so gamma starts lower there.
    ends = (schedule[0], schedule[-2]) if settings.denoise == 1 else (SIGMA_MAX, SIGMA_MIN)
    return [replace(power, gamma=gamma_at(sigma, *ends, settings.rho)) for sigma in schedule[:-1]]


@torch.no_grad()
def sample(
    model: SVD,
    lr: Tensor,
    plan: TilePlan,
    settings: Settings,
    context: Tensor | None = None,
    noise: Tensor | None = None,
    tick: Callable[[Call], None] = lambda call: None,
    flow: Flow | None = None,
) -> Tensor:
    """Scaled latents `(frames, 4, h, w)` of the result, from unscaled LR latents of the same shape (DC-VSR, section 3).

    Euler steps on tiles, with SAP and TAP in turn and guidance outside the tiles, and so is the alignment along `flow`,
    which is of the latents' size. Latents stay where `lr` is; one batch of tiles, or scene to align, at a time goes to
    the model's device. `noise` has deviation 1 (drawn from the seed when None), `tick` is called before each UNet call.
    Raises SamplingError for a value that is not finite, SettingError for alignment without a flow that fits.
    """
    if settings.steps == 0:
        return lr * model.scaling_factor
    flow = _fitting(flow, lr, settings)
    # Older MPS cannot repeat a border in `grid_sample`.
    where = model.device if model.device.type == "cuda" else lr.device
    chosen, schedule = guide(settings.guidance), noise_schedule(settings)
    contexts = {True: model.context(None) if context is None else context, False: model.context(None)}
    concats = {True: lr, False: torch.zeros_like(lr)}
    if noise is None:
        noise = torch.randn(lr.shape, generator=torch.Generator().manual_seed(settings.seed)).to(lr.device)
    first = schedule[0]
    x = noise * (first**2 + 1) ** 0.5 if settings.denoise == 1 else lr * model.scaling_factor + noise * first
    run = TileRun(plan, settings.propagation)
    for index, ((sigma, following), power) in enumerate(zip(pairwise(schedule), strengths(settings), strict=True)):
        step = step_at(index, settings.propagation.kinds)

        def evaluate(x: Tensor, branch: Branch, call: Call, sigma: float = sigma) -> Tensor:
            tick(call)
            tiles, concat = (gather_tiles(plan, call, z) for z in (x, concats[branch.conditional]))
            with model.serving(run, call):
                return model.denoise(tiles, sigma, concat, contexts[branch.conditional], call.frames)

        def denoise(x: Tensor, branch: Branch, step: Step = step) -> tuple[Tensor, Tensor | None]:
            value = run_pass(run, step, branch, lambda call: evaluate(x, branch, call), settings.batch)
            return value, None if run.saliency is None else run.saliency.result()

        x0 = chosen.predict(denoise, x, power)
        if flow is not None:
            x0 = align(x0, flow, settings.align, sigma, settings.align_mode, ROUNDS, where)
        x = x0 + (x - x0) * (following / sigma)
    return x


def upscale(
    model: SVD,
    job: Job,
    output: Path,
    settings: Settings,
    codec: str = "h264",
    overwrite: bool = False,
    cuts: Sequence[int] | None = None,
    progress: Progress = silent,
    parts: Parts | None = None,
) -> None:
    """Upscales a job into `output`, keeping frame count, timing and sound. `cuts` None looks for scene cuts.

    Nothing stands under the final name unless the whole run succeeds. Raises VSRError.
    """
    check_output(output, overwrite, codec, job.info, job.frames)
    parts = parts or Parts()
    cuts = scene_cuts(job) if cuts is None else cuts
    plan = make_plan(job, settings, model.tile, model.factor, cuts)
    flow = _latent_flow(job, settings, plan, parts, cuts, progress)
    lr = torch.empty(job.frames, 4, plan.height, plan.width)
    pictures = (frame.image for frame in job.upscaled(parts.enlarge))
    progress("encode", 0, job.frames)
    for i, z in enumerate(encode_frames(model, pictures, plan.height, plan.width)):
        lr[i] = z
        progress("encode", i + 1, job.frames)
    calls_done = count(1)
    total = unet_calls(plan, settings)
    context = model.context(next(job.upscaled(parts.enlarge)).image[None]) if model.image_encoder is not None else None
    result = sample(
        model, lr, plan, settings, context, tick=lambda _: progress("sample", next(calls_done), total), flow=flow
    )
    height, width = job.size
    progress("decode", 0, job.frames)
    decoded = decode_frames(model, result / model.scaling_factor, model.tile.frames, cuts)
    pairs = (
        (frame[:, :height, :width].clamp(0, 1), reference)
        for frame, reference in zip(decoded, job.upscaled(parts.enlarge), strict=True)
    )
    with open_writer(output, job.info, size=job.size, codec=codec, overwrite=overwrite) as writer:
        for i, (frame, reference) in enumerate(_refined(parts, pairs, cuts)):
            image = correct(settings.color, frame[None], reference.image[None])[0].clamp(0, 1)
            writer.write(Frame(image, reference.alpha, reference.pts))
            progress("decode", i + 1, job.frames)


def _fitting(flow: Flow | None, lr: Tensor, settings: Settings) -> Flow | None:
    """The flow to align along; None where nothing is aligned."""
    if settings.align == 0 or lr.shape[0] < 2:
        return None
    if flow is None:
        raise SettingError(
            f"align is {settings.align} without a flow: expected that of the latents; give one, or set align to 0"
        )
    check_fits(flow, lr.shape[0], lr.shape[-2], lr.shape[-1], 1)
    return flow


def _latent_flow(
    job: Job, settings: Settings, plan: TilePlan, parts: Parts, cuts: Sequence[int], progress: Progress
) -> Flow | None:
    """The flow of the upscaled input at the latents' size, where alignment asks for it."""
    if settings.align == 0 or settings.steps == 0:
        return None
    if job.frames == 1:
        warnings.warn("align: a single frame has no motion to follow, so nothing is aligned", stacklevel=3)
        return None
    pairs, done = job.frames - 1, count(1)
    progress("flow", 0, pairs)
    pictures = (frame.image for frame in job.upscaled(parts.enlarge))
    return streamed_flow(
        pictures,
        job.frames,
        (plan.height, plan.width),
        CELL,
        cuts,
        SHARE,
        lambda _: progress("flow", next(done), pairs),
    )


def _refined(
    parts: Parts, pairs: Iterator[tuple[Tensor, Frame]], cuts: Sequence[int]
) -> Iterator[tuple[Tensor, Frame]]:
    """Decoded frames refined, each with its reference; as they are without a refiner."""
    if parts.refiner is None:
        return pairs
    waiting: deque[Frame] = deque()

    def noted() -> Iterator[tuple[Tensor, Tensor]]:
        for frame, reference in pairs:
            waiting.append(reference)
            yield frame, reference.image

    frames = refine_frames(parts.refiner, noted(), parts.w, cuts)
    return ((frame, waiting.popleft()) for frame in frames)
