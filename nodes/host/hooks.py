"""The hooks of a MODEL that the pack has patched, and the one run they share.

A MODEL patch is one settings object under `KEY` in the model's transformer options, and one set of hooks, the same for
every patch and installed once: wiring order cannot matter. What a run remembers is in `nodes/session/run.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...vsr_ops.errors import SettingError
from ...vsr_ops.sampling.calls import Call
from ...vsr_ops.sampling.guidance import COND, UNCOND, Branch, Evaluate, add_dssag, add_pag, add_sag, cfg_branches
from ...vsr_ops.sampling.interval import EVERY_STEP, GuidanceInterval, add_difference
from ...vsr_ops.sampling.layers import check_layers
from ...vsr_ops.sampling.layouts import TileLayout
from ...vsr_ops.sampling.passes import run_pass
from ...vsr_ops.sampling.propagation import Propagation, TileRun
from ...vsr_ops.sampling.schedule import step_index, steps_before
from ...vsr_ops.sampling.tiling import Merger, TileSize, plan_tiles
from ...vsr_ops.vae.latents import CELL
from ..session.attention import attention_override
from ..session.checks import check_run, run_cuts
from ..session.inputs import Inputs
from ..session.run import KEY, CFGPatch, GuidancePatch, Run, Tiles, UNetCall, changed, pack_settings, sap_lagged
from .control import CONTROLS, merged
from .device import MEMORY, is_compiled, is_torchs, uncompiled
from .live import Live, passes_of
from .model import context_width, factor, is_svd, layout_for, require_unet, spatial_layers, together

log = logging.getLogger(__name__)


def make_run(model: Any, settings: Mapping[str, Any], shape: Sequence[int], sigmas: Tensor, cuts: Sequence[int]) -> Run:
    """A run's memory, from the settings of its MODEL, the shape of its latent video and where its scenes change."""
    tiles: Tiles | None = settings.get("tiles")
    frames, _, height, width = shape
    schedule: list[float] = sigmas.tolist()
    before = steps_before(schedule, float(model.get_model_object("model_sampling").sigma_max))
    if tiles is None:
        whole = TileLayout.still(plan_tiles(frames, height, width, TileSize(height, width, frames), factor=1))
        return Run(model, schedule, spatial_layers(model), whole, None, Propagation(()), before=before)
    layout = layout_for(model, tiles, frames, height, width, cuts)
    at_once = together(model, tiles, layout.largest)
    propagation = replace(tiles.propagation, sap_lagged=sap_lagged(tiles, layout.largest, at_once))
    layout = layout.over(before + len(schedule) - 1 if schedule[-1] == 0 else None)
    layers = spatial_layers(model)
    return Run(model, schedule, layers, layout, tiles, propagation, tiles.batch, at_once, before)


def patch(model: Any, name: str, value: object) -> Any:
    """A clone of a MODEL with one of the pack's settings, and the hooks that read them."""
    m = model.clone()
    options = m.model_options["transformer_options"]
    options[KEY] = {**options.get(KEY, {}), name: value}
    hooks = {
        WrappersMP.OUTER_SAMPLE: outer_sample,
        WrappersMP.PREPARE_SAMPLING: prepare_sampling,
        WrappersMP.PREDICT_NOISE: predict_noise,
        WrappersMP.CALC_COND_BATCH: calc_cond_batch,
        WrappersMP.APPLY_MODEL: apply_model,
    }
    for kind, hook in hooks.items():
        m.remove_wrappers_with_key(kind, KEY)
        m.add_wrapper_with_key(kind, KEY, hook)
    if post_cfg not in m.model_options.get("sampler_post_cfg_function", []):
        m.set_model_sampler_post_cfg_function(post_cfg)
    return m


def patch_perturbed(
    model: Any, name: str, scale: float, layers: str, rho: float = 0.5, interval: GuidanceInterval = EVERY_STEP
) -> Any:
    """A MODEL with DSSAG, PAG or SAG on it, or at scale 0 without. Raises SettingError for one without layers."""
    check_layers(layers)
    if not any(layers in layer.places for layer in spatial_layers(model).values()):
        raise SettingError(
            f"{name.upper()} needs spatial self-attention in {layers!r} layers, and {type(model.model).__name__} has"
            " none there: expected a UNet model such as SVD or SD; choose other layers or another guidance"
        )
    if scale == 0:
        # Off is off even where an earlier node has turned it on.
        known = model.model_options["transformer_options"].get(KEY, {})
        return patch(model, name, None) if known.get(name) is not None else model
    return patch(model, name, GuidancePatch(scale, layers, rho, interval))


def patch_tiles(model: Any, tiles: Tiles) -> Any:
    """A MODEL that samples in tiles. Raises SettingError for a MODEL or tiles that cannot."""
    require_unet(model, "Tiled Diffusion (VSR)")
    check_layers(tiles.propagation.layers)
    layout_for(model, tiles, 1, 8, 8)
    return patch(model, "tiles", tiles)


def outer_sample(
    executor: Any,
    noise: Tensor,
    latent: Tensor,
    sampler: Any,
    sigmas: Tensor,
    denoise_mask: Tensor | None = None,
    callback: Any = None,
    *rest: Any,
    **more: Any,
) -> Any:
    """Makes the run's memory; it goes when the run's options go."""
    guider = executor.class_obj
    settings = pack_settings(guider.model_options)
    check_run(guider, noise.shape, latent, context_width(guider.model_patcher), is_svd(guider.model_patcher))
    tiles: Tiles | None = settings.get("tiles")
    cuts = run_cuts(guider.conds, noise.shape[0], tiles.scenes if tiles else None)
    run = make_run(guider.model_patcher, settings, noise.shape, sigmas, cuts or ())
    if cuts is None and len(run.plan.windows) > 1:
        log.warning(
            "No scene cuts are known of this video, and windows may cross one: wire Encode Video (VSR)'s latent into"
            " Tiled Diffusion (VSR) too"
        )
    if is_compiled(guider.model_patcher):
        log.warning("Torch Compile is without effect here: VSR's patches change from call to call; take it off")
    for name in GUIDED:
        patch: GuidancePatch | CFGPatch | None = settings.get(name)
        if patch is not None and "new" not in patch.interval.acts(run.sigmas[:-1]):
            log.warning(
                "%s acts at none of this run's noise levels, %.4g to %.4g: its interval is %g to %g",
                *(name.upper(), run.sigmas[0], run.sigmas[-2], patch.interval.sigma_min, patch.interval.sigma_max),
            )
    if callback is not None and run.tiles is not None:
        # Who asks for no news of steps wants none of tiles either.
        added = [name for name in GUIDANCES if settings.get(name)]
        run.live = Live(guider.model_patcher, len(run.sigmas) - 1, passes_of(guider, added))
    guider.model_options = changed(guider.model_options, run=run)
    return executor(noise, latent, sampler, sigmas, denoise_mask, callback, *rest, **more)


def prepare_sampling(executor: Any, model: Any, noise_shape: Sequence[int], conds: Any, **rest: Any) -> Any:
    """Tells the host how large the tiles are that go through the UNet, so that it does not offload for whole frames."""
    run: Run | None = pack_settings(rest["model_options"]).get("run") if rest.get("model_options") else None
    if run is not None and run.tiles is not None:
        size = max((run.plan.tile_size(n) for n in range(len(run.plan.windows))), key=lambda tile: tile.frames)
        noise_shape = [run.at_once * size.frames, noise_shape[1], size.height, size.width]
    return executor(model, noise_shape, conds, **rest)


def predict_noise(executor: Any, x: Tensor, timestep: Tensor, model_options: dict[str, Any], seed: Any = None) -> Any:
    """A new evaluation of the whole guidance: its parts are counted from 0 again."""
    pack_settings(model_options)["run"].order = 0
    return executor(x, timestep, model_options, seed)


def calc_cond_batch(
    executor: Any, model: Any, conds: list[Any], x: Tensor, timestep: Tensor, model_options: dict[str, Any]
) -> Any:
    """Names the branches of this evaluation, so that none shares a bank; perturbs (DC-VSR, equation 9) and observes
    where guidance asks. CFG's two branches go by the intervals of the guidances that there are."""
    settings = pack_settings(model_options)
    run: Run = settings["run"]
    if "branches" in settings:
        return executor(model, conds, x, timestep, model_options)
    first, run.order = run.order == 0, run.order + 1
    if first and len(conds) > 2 and (unable := [name for name in ("dssag", "sag") if settings.get(name)]):
        raise SettingError(
            f"{unable[0].upper()} met a guider with {len(conds)} conditionings: expected a positive and at most one"
            " negative; use the pack's guiders, CFGGuider or KSampler"
        )
    if first and len(conds) == 2:
        return _cfg(lambda conds, options: executor(model, conds, x, timestep, options), conds, timestep, model_options)
    branches = tuple(Branch(f"{run.order}.{i}") for i, _ in enumerate(conds))
    return executor(model, conds, x, timestep, changed(model_options, branches=branches))


def _cfg(
    evaluate: Callable[[list[Any], dict[str, Any]], list[Tensor]],
    conds: list[Any],
    timestep: Tensor,
    model_options: dict[str, Any],
) -> list[Tensor]:
    """The estimates of CFG's two branches. Where no guidance acts the second is the first, so that CFG adds nothing; at
    steps between, the first without the difference that was kept."""
    settings, sigma = pack_settings(model_options), float(timestep.max())
    run: Run = settings["run"]
    acts = {name: run.act(name, settings[name].interval, sigma) for name in GUIDED if settings.get(name)}
    spent = {run.act("cfg", settings[name].interval, sigma) for name in acts}
    cfg = conds[1] is not None
    if cfg and spent and "new" not in spent:
        (cond,) = evaluate(conds[:1], changed(model_options, branches=(COND,)))
        return [cond, cond if "kept" not in spent else add_difference(cond, -run.kept["cfg"])]
    dssag = settings.get("dssag") if cfg and acts.get("dssag", "off") != "off" else None
    gamma = None if dssag is None else run.gamma(sigma, dssag.rho)
    layers = "ends" if dssag is None else dssag.layers
    branches = cfg_branches(gamma, layers, observe=acts.get("sag") == "new")
    estimates = evaluate(conds, changed(model_options, branches=branches))
    if cfg and spent:
        run.keep("cfg", max((settings[name].interval for name in acts), key=lambda each: each.every), *estimates)
    return estimates


def post_cfg(args: dict[str, Any]) -> Tensor:
    """DSSAG without CFG (DC-VSR, equation 8), PAG and SAG: what each adds to the guided estimate."""
    settings = pack_settings(args["model_options"])
    run: Run = settings["run"]
    sigma, denoised = float(args["sigma"].max()), args["denoised"]
    cfg = args["uncond"] is not None and args["cond_scale"] != 1

    def evaluate(x: Tensor, branch: Branch) -> Tensor:
        options = changed(args["model_options"], branches=(branch,))
        cond = args["cond" if branch.conditional else "uncond"]
        return comfy.samplers.calc_cond_batch(args["model"], [cond], x, args["sigma"], options)[0]

    for name, add in ADDED.items():
        patch: GuidancePatch | None = settings.get(name)
        act = "off" if patch is None or (name == "dssag" and cfg) else run.act(name, patch.interval, sigma)
        if patch is None or act == "off":
            continue
        if act == "new":
            guided = add(evaluate, args, denoised, patch)
            run.keep(name, patch.interval, guided, denoised)
            denoised = guided
        elif name != "dssag" or run.gamma(sigma, patch.rho) > 0:
            denoised = add_difference(denoised, run.kept[name])
    return denoised


def _add_dssag(evaluate: Evaluate, args: dict[str, Any], denoised: Tensor, dssag: GuidancePatch) -> Tensor:
    gamma = pack_settings(args["model_options"])["run"].gamma(float(args["sigma"].max()), dssag.rho)
    return add_dssag(evaluate, args["input"], denoised, args["cond_denoised"], gamma, dssag.scale, dssag.layers)


def _add_pag(evaluate: Evaluate, args: dict[str, Any], denoised: Tensor, pag: GuidancePatch) -> Tensor:
    return add_pag(evaluate, args["input"], denoised, args["cond_denoised"], pag.scale, pag.layers)


def _add_sag(evaluate: Evaluate, args: dict[str, Any], denoised: Tensor, sag: GuidancePatch) -> Tensor:
    run: Run = pack_settings(args["model_options"])["run"]
    cfg = args["uncond"] is not None and args["cond_scale"] != 1
    weak, estimate = (UNCOND, args["uncond_denoised"]) if cfg else (COND, args["cond_denoised"])
    saliency = next((p.saliency for (seen, _), p in run.passes.items() if seen == weak.name and p.saliency), None)
    if saliency is None:
        raise SettingError(
            "SAG saw no attention at this step: expected conditioning that acts over the whole run; take its"
            " timestep range off"
        )
    return add_sag(evaluate, args["input"], denoised, weak, estimate, saliency.result(), sag.scale)


#: What each guidance adds to the estimate of CFG's branches: (evaluate, the host's arguments, estimate, its settings).
ADDED: dict[str, Callable[[Evaluate, dict[str, Any], Tensor, GuidancePatch], Tensor]] = {
    "dssag": _add_dssag,
    "pag": _add_pag,
    "sag": _add_sag,
}
#: The guidances whose settings a MODEL may have; with CFG alone, which has an interval and adds nothing else.
GUIDANCES, GUIDED = tuple(ADDED), (*ADDED, "cfg")


def apply_model(
    executor: Any,
    x: Tensor,
    t: Tensor,
    c_concat: Tensor | None = None,
    c_crossattn: Tensor | None = None,
    control: Any = None,
    transformer_options: dict[str, Any] | None = None,
    **rest: Any,
) -> Tensor:
    """Every branch of the host's batch, one by one, tile by tile."""
    options = transformer_options or {}
    settings = options.get(KEY, {})
    run: Run | None = settings.get("run")
    if run is None:
        raise SettingError(
            "this MODEL was called outside a sampling run: VSR's patches need the host's samplers (KSampler,"
            " SamplerCustomAdvanced); take the unpatched MODEL for other uses"
        )
    if control is not None:
        _warn_between(run)
    numbers, uuids = options["cond_or_uncond"], options["uuids"]
    everything = Inputs(x, t, c_concat, c_crossattn, rest, control)
    size = x.shape[0] // len(numbers)
    if (size, *x.shape[-2:]) != (run.plan.frames, run.plan.height, run.plan.width):
        raise SettingError(
            f"a conditioning covers {x.shape[-2]}x{x.shape[-1]} latents of {run.plan.height}x{run.plan.width}: expected"
            " whole frames; remove its area"
        )
    outputs: list[Tensor] = []
    for i, (number, uuid) in enumerate(zip(numbers, uuids, strict=True)):
        inputs = everything.map(lambda value, i=i: value[i * size : (i + 1) * size])
        own = {**options, "cond_or_uncond": [number], "uuids": [uuid]}
        outputs.append(_branch(executor, run, settings["branches"][number], inputs, own))
    return torch.cat(outputs)


def _warn_between(run: Run) -> None:
    """Tells once that a ControlNet's features must be interpolated, where that is so."""
    k = factor(run.model)
    spans = (span for plan in run.layout.plans for span in (*plan.rows, *plan.cols))
    if not run.warned and any(span.start % k for span in spans):
        log.warning(
            "Tiles of %dx%d latents do not all start at multiples of %d: a ControlNet's coarse features are"
            " interpolated between their cells; sizes in multiples of %d pixels and an overlap of 0.5 avoid it",
            *(run.plan.width, run.plan.height, k, k * CELL),
        )
        run.warned = True


def _branch(executor: Any, run: Run, branch: Branch, inputs: Inputs, options: dict[str, Any]) -> Tensor:
    """One branch of the whole video."""
    tile_run = run.passes.setdefault(
        (branch.name, options["uuids"][0]), TileRun(run.plan, run.propagation, memory=MEMORY, layout=run.layout)
    )
    inner = options.get("optimized_attention_override")

    def evaluate(call: Call) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        override = attention_override(tile_run, call, run.layers, inner, is_torchs)
        plan = tile_run.plan
        part = inputs.tiles(plan, call)
        frames = plan.windows[call.window].span.slice
        places = tuple((row.slice, col.slice) for row, col in (plan.spatial[m] for m in call.tiles))
        settings = {**options[KEY], "call": UNetCall(frames, len(call.tiles), len(plan.spatial), places)}
        own = {**options, KEY: settings, "optimized_attention_override": override}
        control = part.control
        if controls := options.get(CONTROLS):
            assert part.context is not None, "a control is of a UNet that takes one"
            control = merged(controls, control, part.x, part.t, part.context, places, frames)
        with uncompiled():
            return executor(part.x, part.t, part.concat, part.context, control, own, **part.rest)

    sigma, live = float(inputs.t.max()), run.live
    if live is None:
        return run_pass(tile_run, run.step(sigma), branch, evaluate, run.batch)
    live.begin(step_index(run.sigmas, sigma))

    def watch(call: Call, merger: Merger) -> None:
        live.tiles(tile_run.plan, call, merger)

    out = run_pass(tile_run, run.step(sigma), branch, evaluate, run.batch, watch)
    live.end(tile_run.plan, branch, out)
    return out
