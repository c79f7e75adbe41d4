"""DC-VSR's sampling over tiles, with any guidance and propagation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..backbones.svd import SIGMA_MAX, SIGMA_MIN, Backbone, sigmas
from ..errors import SettingError
from ..flow.field import Flow, check_fits
from ..image.color import COLOR
from ..sampling.align import ROUNDS, SCALES, align, check_strength
from ..sampling.calls import Call, calls
from ..sampling.guidance import COND, GuidanceScale, gamma_at, guide, resolve_scale
from ..sampling.interval import EVERY_STEP, Act, GuidanceInterval, IntervalGuidance, check_guided
from ..sampling.layouts import TileLayout, check_layout, laid_out, lay_out
from ..sampling.noise import frame_noise
from ..sampling.propagation import Propagation
from ..sampling.samplers import SAMPLERS, check_sampler
from ..sampling.schedule import Step, schedule_ends, step_at, steps_before
from ..sampling.tiling import TilePlan, TileSize
from ..system.memory import home_of
from .branches import Branches
from .defaults import DEFAULTS, RHO, SAMPLER

if TYPE_CHECKING:
    # What is upscaled comes from a video: libraries of codecs, which sampling does not need.
    from .job import Job

#: Latent videos that live together while one is sampled: LR, its zeros, noise, x, two estimates, the blend under way
#: with its weights, the update's temporaries, the estimate and the guidance of a step before.
VIDEO_COPIES = 11


@dataclass(frozen=True)
class SamplingSettings:
    """What `sample` does. None takes the strategy's own value.

    `steps` 0 decodes the LR latent as it is, to see what the diffusion adds. `denoise` below 1 starts from the LR
    latent at partial noise, keeping `steps`: at the last `steps` levels of a longer schedule; `start_sigma` does so at
    that very noise level. `batch` is how many spatial tiles go through the UNet together where they need not all;
    `together` puts all branches of a step that see the same x into one call. `align` is lambda of SDATC's alignment
    along the flow, 0 is off. `sampler` is one of SAMPLERS. Raises SettingError.
    """

    steps: int = DEFAULTS["dc_vsr"].steps
    guidance: str = DEFAULTS["dc_vsr"].guidance
    cfg: float | None = None
    guidance_scale: float | None = None
    rho: float = RHO
    interval: GuidanceInterval = EVERY_STEP
    propagation: Propagation = field(default_factory=Propagation)
    seed: int = 0
    denoise: float = 1.0
    start_sigma: float | None = None
    batch: int = 1
    together: bool = False
    align: float = 0.0
    align_mode: str = "gradient"
    align_scale: str = "bounded"
    sampler: str = SAMPLER

    def __post_init__(self) -> None:
        if not 0 <= self.steps <= 1000:
            raise SettingError(f"steps is {self.steps}: expected a whole number from 1 to 1000, or 0 for no diffusion")
        if not 0.01 <= self.denoise <= 1:
            raise SettingError(f"denoise is {self.denoise}: expected a share from 0.01 to 1")
        if self.start_sigma is not None and self.denoise != 1:
            raise SettingError(
                f"start sigma is {self.start_sigma} and denoise {self.denoise}: expected one of them, as both say"
                " where to start; leave one out"
            )
        if not 0 < self.rho <= 100:
            raise SettingError(f"rho is {self.rho}: expected a number above 0, at most 100 (0.5 is the paper's)")
        if self.batch < 1:
            raise SettingError(f"batch is {self.batch}: expected a whole number from 1")
        resolve_scale(self.guidance, self.cfg, self.guidance_scale)
        check_guided(self.guidance, self.interval)
        check_strength(self.align, self.align_mode, self.align_scale)
        check_sampler(self.sampler)


@dataclass(frozen=True)
class Settings(SamplingSettings):
    """What `upscale` does: sampling, in tiles of `tile` (None: the model's own), and colours after it."""

    tile: TileSize | None = None
    overlap: float = 0.5
    layout: str = DEFAULTS["dc_vsr"].layout
    color: str = DEFAULTS["dc_vsr"].color

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layout(self.layout)
        if self.color not in COLOR:
            raise SettingError(f"color is {self.color!r}: expected one of {', '.join(COLOR)}")


def make_layout(
    job: Job, settings: Settings, tile: TileSize, factor: int, noise: NoiseRange, cuts: Sequence[int] = ()
) -> TileLayout:
    """The tiles of a job at each of its steps; `tile` and `noise` are the model's, the first used where the settings
    name none."""
    size = settings.tile or tile
    layout = lay_out(settings.layout, job.frames, *job.latent_size(factor), size, settings.overlap, cuts, factor)
    return layout.over(total_steps(settings, noise))


@dataclass(frozen=True)
class NoiseRange:
    """A model's noise levels: `sigmas` of a number of steps from a level (None: the most), falling, with a final 0;
    `most` and `least` it knows."""

    sigmas: Callable[[int, float | None], list[float]]
    most: float
    least: float

    @classmethod
    def of(cls, model: Backbone) -> NoiseRange:
        """Of a loaded model."""
        return cls(model.sigmas, model.sigma_max, model.sigma_min)


SVD_NOISE = NoiseRange(sigmas, SIGMA_MAX, SIGMA_MIN)


def noise_schedule(settings: SamplingSettings, noise: NoiseRange = SVD_NOISE) -> list[float]:
    """Falling sigmas with a final 0: from the most noise, from the start sigma, or at partial denoise the last `steps`
    of a longer schedule. Raises SettingError for a start that the model does not know."""
    if settings.steps == 0:
        return [0.0]
    if (start := settings.start_sigma) is not None:
        if not noise.least < start <= noise.most:
            raise SettingError(
                f"start sigma is {start}: expected a noise level of the model, above {noise.least:.4g} and at most"
                f" {noise.most:.4g}"
            )
        return noise.sigmas(settings.steps, start)
    total = max(settings.steps, int(settings.steps / settings.denoise))
    return noise.sigmas(total, None)[-(settings.steps + 1) :]


def run_steps(settings: SamplingSettings, noise: NoiseRange = SVD_NOISE) -> list[Step]:
    """The steps of a run: what each propagates, counted from the beginning of the model's whole schedule."""
    before = steps_before(noise_schedule(settings, noise), noise.most)
    return [step_at(before + index, settings.propagation.kinds) for index in range(settings.steps)]


def total_steps(settings: SamplingSettings, noise: NoiseRange) -> int:
    """How many steps of the model's whole schedule are done when the run ends, those before it among them."""
    return steps_before(noise_schedule(settings, noise), noise.most) + settings.steps


def unet_calls(layout: TilePlan | TileLayout, settings: SamplingSettings, noise: NoiseRange = SVD_NOISE) -> int:
    """How many UNet calls `sample` makes: branches of each step's guidance, those together as one, times the batches of
    its tiles."""
    chosen = guide(settings.guidance)
    total, lagged = 0, settings.propagation.sap_lagged
    for step, power in zip(run_steps(settings, noise), strengths(settings, noise), strict=True):
        plan = laid_out(layout).at(step.index)
        batches = sum(1 for _ in calls(plan, step, COND, settings.batch, synchronous=not lagged))
        joined = len(chosen.branches(power)) - 1 if settings.together else 0
        total += (chosen.passes(power) - joined) * batches
    return total


def tile_passes(layout: TilePlan | TileLayout, settings: SamplingSettings, noise: NoiseRange = SVD_NOISE) -> int:
    """How many tiles go through the UNet in `sample`, in however many calls."""
    passes = [guide(settings.guidance).passes(power) for power in strengths(settings, noise)]
    plans = [laid_out(layout).at(step.index) for step in run_steps(settings, noise)]
    return sum(count * plan.tiles for count, plan in zip(passes, plans, strict=True))


def strengths(settings: SamplingSettings, noise: NoiseRange = SVD_NOISE) -> list[GuidanceScale]:
    """The guidance's strengths at each step, gamma included; off where its passes are not spent."""
    found = zip(_strengths(settings, noise), guidance_acts(settings, noise), strict=True)
    return [power if act == "new" else replace(power, cfg=1.0, scale=0.0) for power, act in found]


def _strengths(settings: SamplingSettings, noise: NoiseRange) -> list[GuidanceScale]:
    """As if every step were guided."""
    power = resolve_scale(settings.guidance, settings.cfg, settings.guidance_scale)
    schedule = noise_schedule(settings, noise)
    if settings.steps == 0:
        return []
    ends = schedule_ends(schedule, noise.most, noise.least)
    return [replace(power, gamma=gamma_at(sigma, *ends, settings.rho)) for sigma in schedule[:-1]]


def guidance_acts(settings: SamplingSettings, noise: NoiseRange = SVD_NOISE) -> list[Act]:
    """What guidance does at each step. Raises SettingError for an interval in which no step lies."""
    schedule, chosen = noise_schedule(settings, noise), guide(settings.guidance)
    acts = settings.interval.acts(schedule[:-1], steps_before(schedule, noise.most))
    if acts and "new" not in acts:
        raise SettingError(
            f"the guidance interval is {settings.interval.sigma_min:g} to {settings.interval.sigma_max:g}, and none of"
            f" the run's noise levels lies in it ({schedule[0]:.4g} to {schedule[-2]:.4g}): expected some; widen it, or"
            " choose guidance none"
        )
    # DSSAG at gamma 0 adds nothing, so nothing that was kept either.
    return [
        "off" if chosen.passes(power) == 1 else act
        for act, power in zip(acts, _strengths(settings, noise), strict=True)
    ]


@torch.no_grad()
def sample(
    model: Backbone,
    lr: Tensor,
    tiles: TilePlan | TileLayout,
    settings: SamplingSettings,
    context: Tensor | None = None,
    noise: Tensor | None = None,
    tick: Callable[[Call], None] = lambda call: None,
    flow: Flow | None = None,
    first_frame: int = 0,
) -> Tensor:
    """Scaled latents `(frames, 4, h, w)` of the result, from unscaled LR latents of the same shape (DC-VSR, section 3).

    Steps of `settings.sampler` on tiles, with SAP and TAP in turn. Guidance, and the alignment along `flow` (of the
    latents' size), act on the whole video, tiles merged: on the model's device where there is room, else in host
    memory, from where one batch of tiles, or scene to align, at a time goes to the device. `context` is one for all
    scenes `(1, tokens, dim)`, or one for each. `noise` has deviation 1; when None it is drawn by frame, as a DDPM
    step's always is: from the seed and the frames' numbers in their source, where the video begins at `first_frame`.
    `tick` is called for each branch before each UNet call. Branches whose contexts differ in length are evaluated one
    by one. Raises SamplingError for a value that is not finite, SettingError for contexts that are not one or one a
    scene, and for alignment without a flow that fits.
    """
    if settings.steps == 0:
        return lr * model.scaling_factor
    flow = _fitting(flow, lr, settings)
    given, lr = lr.device, lr.to(home_of(model.device, VIDEO_COPIES * lr.nbytes))
    # Older MPS cannot repeat a border in `grid_sample`.
    where = model.device if model.device.type == "cuda" else lr.device
    levels = NoiseRange.of(model)
    schedule, powers = noise_schedule(settings, levels), strengths(settings, levels)
    chosen = guide(settings.guidance)
    guidance = IntervalGuidance(chosen.predict, guidance_acts(settings, levels))
    shown = model.context(None) if context is None else context
    contexts = {True: _by_scene(laid_out(tiles).settled, shown), False: model.negative_context()}
    lr_by_branch = {True: lr, False: lr if model.always_sees_lr else torch.zeros_like(lr)}

    def draw(stream: int) -> Tensor:
        numbers = range(first_frame, first_frame + len(lr))
        return frame_noise(numbers, lr.shape[1:], settings.seed, stream).to(lr.device)

    noise = draw(0) if noise is None else noise.to(lr.device)
    first, pure = schedule[0], settings.denoise == 1 and settings.start_sigma is None
    x = noise * (first**2 + 1) ** 0.5 if pure else lr * model.scaling_factor + noise * first
    layout = laid_out(tiles).over(total_steps(settings, levels))
    branches = Branches(model, layout, settings.propagation, settings.batch, lr_by_branch, contexts, tick)
    joined = settings.together and branches.may_join
    steps, next_x = run_steps(settings, levels), SAMPLERS[settings.sampler]()
    for i, ((sigma, following), step, power) in enumerate(zip(pairwise(schedule), steps, powers, strict=True)):
        denoise = branches.denoise(step, sigma, chosen.branches(power) if joined else ())
        x0 = guidance.predict(i, denoise, x, power)
        if flow is not None:
            v = SCALES[settings.align_scale](sigma, following)
            x0 = align(x0, flow, settings.align, v, settings.align_mode, ROUNDS, where)
        x = next_x(x, x0, sigma, following, partial(draw, i + 1))
    return x.to(given)


def _by_scene(plan: TilePlan, context: Tensor) -> Tensor:
    scenes = plan.windows[-1].scene + 1
    if len(context) not in (1, scenes):
        raise SettingError(f"there are {len(context)} contexts: expected one, or one for each of {scenes} scene(s)")
    return context


def _fitting(flow: Flow | None, lr: Tensor, settings: SamplingSettings) -> Flow | None:
    """The flow to align along; None where nothing is aligned."""
    if settings.align == 0 or lr.shape[0] < 2:
        return None
    if flow is None:
        raise SettingError(
            f"align is {settings.align} without a flow: expected that of the latents; give one, or set align to 0"
        )
    check_fits(flow, lr.shape[0], lr.shape[-2], lr.shape[-1], 1)
    return flow
