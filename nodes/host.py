"""Everything of the pack that touches ComfyUI's internals (seen in 0.3.64 where nothing else is said).

A MODEL patch is one settings object under `KEY` in the model's transformer options, and one set of hooks, the same for
every patch and installed once: wiring order cannot matter. What a run remembers is in `run.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.supported_models
import comfy.utils
import folder_paths
import latent_preview
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL, AutoencodingEngine
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, Timestep, Upsample
from comfy.patcher_extension import WrappersMP
from einops import rearrange
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..vsr_ops.align import ROUNDS, SHARE, align, check_strength
from ..vsr_ops.attention import Tempered, identity
from ..vsr_ops.cfw import CFW, check_w
from ..vsr_ops.decode_layout import is_temporal
from ..vsr_ops.errors import SettingError
from ..vsr_ops.flow_field import Flow, check_fits, estimate_flow, latent_flow, raft_memory
from ..vsr_ops.guidance import COND, UNCOND, Branch, push, sag_degrade, sag_renoise
from ..vsr_ops.latents import CELL, VAE_TILE, decode_video
from ..vsr_ops.layers import Layer, check_layers, place_layers
from ..vsr_ops.plan_cost import Bank, describe_plan, lagged_bytes, matmul_speed, tap_bytes
from ..vsr_ops.propagation import Call, Propagation, TileRun, run_pass
from ..vsr_ops.refiner import Refiner, refine
from ..vsr_ops.stam import STAM
from ..vsr_ops.streaming_decode import stream_video
from ..vsr_ops.tiling import TilePlan, TileSize, plan_tiles
from .run import (
    KEY,
    Inputs,
    Perturbed,
    Run,
    Tiles,
    attention_override,
    changed,
    check_run,
    main_branches,
    pack_settings,
    resolve_tile,
    sap_lagged,
)

SAMPLERS, SCHEDULERS = list(comfy.samplers.SAMPLER_NAMES), list(comfy.samplers.SCHEDULER_NAMES)
#: What SVD was published with.
STOCK_TILE = TileSize(64, 64, 14)
#: Name of the alignment's hook, which works without the pack's others.
ALIGN_KEY = f"{KEY}_align"
#: What a loader's list shows while its folder is empty.
NO_FILE = "no file found"
#: How many latents around a streamed tile its convolutions reach, SD's and SVD's decoder.
STREAM_MARGIN = 8
#: Share of the device's memory beside the weights that a window's tiles may take together.
SYNCHRONOUS_SHARE = 0.7


# --- What is known of a MODEL ---------------------------------------------------------------------------------------


def is_svd(model: Any) -> bool:
    """Whether a MODEL is of SVD's family: per-frame batches and concat latents."""
    return isinstance(model.model, comfy.model_base.SVD_img2vid)


def require_svd(model: Any, node: str) -> None:
    """Raises SettingError for a MODEL that is not of SVD's family."""
    if not is_svd(model):
        raise SettingError(
            f"{node} got a {type(model.model).__name__} MODEL: expected Stable Video Diffusion; wire Load Lite SVD, or"
            " Image Only Checkpoint Loader with svd.safetensors or svd_xt.safetensors"
        )


def factor(model: Any) -> int:
    """By how much the UNet shrinks a latent."""
    return 2 ** (len(model.model.model_config.unet_config.get("channel_mult", (1, 2, 4, 4))) - 1)


def own_tile(model: Any) -> TileSize:
    """The tile a checkpoint was trained on: its metadata's, else SVD's."""
    return model.get_attachment("vsr_tile") or STOCK_TILE


def context_width(model: Any) -> int:
    """Width of the cross-attention tokens a MODEL takes."""
    return model.model.model_config.unet_config["context_dim"]


def spatial_layers(model: Any) -> dict[str, Layer]:
    """Every spatial self-attention layer of a UNet by `stage.block.index`; empty for other architectures."""
    unet = model.model.diffusion_model
    stages = [
        ("input", getattr(unet, "input_blocks", ())),
        ("middle", [unet.middle_block] if getattr(unet, "middle_block", None) is not None else ()),
        ("output", getattr(unet, "output_blocks", ())),
    ]
    names = [
        f"{stage}.{number}.{index}"
        for stage, blocks in stages
        for number, block in enumerate(blocks)
        for part in (block if isinstance(block, torch.nn.Sequential) else ())
        for index, layer in enumerate(getattr(part, "transformer_blocks", ()))
        if not getattr(layer, "disable_self_attn", False)
    ]
    return place_layers(names, [name for name in names if name.startswith("middle.")])


def tiles_of(model: Any) -> Tiles | None:
    """The tile settings that a MODEL was patched with."""
    return model.model_options["transformer_options"].get(KEY, {}).get("tiles")


def plan_for(model: Any, tiles: Tiles, frames: int, height: int, width: int, cuts: Sequence[int] = ()) -> TilePlan:
    """The plan that a run on a latent video of this size follows. Raises SettingError."""
    tile = resolve_tile(tiles.tile, own_tile(model))
    return plan_tiles(frames, height, width, tile, tiles.overlap, cuts, factor(model))


def together(model: Any, tiles: Tiles, plan: TilePlan) -> int:
    """How many spatial tiles go through the UNet at once at most; all of them for synchronous SAP where it fits."""
    count = len(plan.spatial)
    if "sap" not in tiles.propagation.kinds or tiles.sap_mode == "lagged":
        return min(tiles.batch, count)
    if tiles.sap_mode == "synchronous":
        return count
    size = plan.tile_size(0)
    needed = model.model.memory_required([count * size.frames, 4, size.height, size.width])
    memory = comfy.model_management.get_total_memory(model.load_device) - model.model_size()
    return count if needed < SYNCHRONOUS_SHARE * memory else min(tiles.batch, count)


# --- One run --------------------------------------------------------------------------------------------------------


def make_run(model: Any, settings: Mapping[str, Any], shape: Sequence[int], sigmas: Tensor, cuts: Sequence[int]) -> Run:
    """A run's memory, from the settings of its MODEL, the shape of its latent video and where its scenes change."""
    tiles: Tiles | None = settings.get("tiles")
    frames, _, height, width = shape
    if tiles is None:
        whole = plan_tiles(frames, height, width, TileSize(height, width, frames), factor=1)
        return Run(model, sigmas.tolist(), spatial_layers(model), whole, None, Propagation(()))
    plan = plan_for(model, tiles, frames, height, width, cuts)
    at_once = together(model, tiles, plan)
    propagation = replace(tiles.propagation, sap_lagged=sap_lagged(tiles, plan, at_once))
    return Run(model, sigmas.tolist(), spatial_layers(model), plan, tiles, propagation, tiles.batch, at_once)


# --- The hooks ------------------------------------------------------------------------------------------------------


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


def patch_perturbed(model: Any, name: str, scale: float, layers: str, rho: float = 0.5) -> Any:
    """A MODEL with DSSAG, PAG or SAG on it; scale 0 is the MODEL itself. Raises SettingError for one without layers."""
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
    return patch(model, name, Perturbed(scale, layers, rho))


def patch_tiles(model: Any, tiles: Tiles) -> Any:
    """A MODEL that samples in tiles. Raises SettingError for a MODEL or tiles that cannot."""
    require_svd(model, "Tiled Diffusion (VSR)")
    check_layers(tiles.propagation.layers)
    plan_for(model, tiles, 1, 8, 8)
    return patch(model, "tiles", tiles)


def outer_sample(
    executor: Any, noise: Tensor, latent: Tensor, sampler: Any, sigmas: Tensor, *rest: Any, **more: Any
) -> Any:
    """Makes the run's memory; it goes when the run's options go."""
    guider = executor.class_obj
    settings = pack_settings(guider.model_options)
    check_run(guider, noise.shape, latent, is_svd(guider.model_patcher))
    cuts = next((cond["vsr_cuts"] for conds in guider.conds.values() for cond in conds if "vsr_cuts" in cond), ())
    run = make_run(guider.model_patcher, settings, noise.shape, sigmas, cuts)
    guider.model_options = changed(guider.model_options, run=run)
    return executor(noise, latent, sampler, sigmas, *rest, **more)


def prepare_sampling(executor: Any, model: Any, noise_shape: Sequence[int], conds: Any, **rest: Any) -> Any:
    """Tells the host how large the tiles are that go through the UNet, so that it does not offload for whole frames."""
    run: Run | None = pack_settings(rest["model_options"]).get("run") if rest.get("model_options") else None
    if run is not None and run.tiles is not None:
        size = max((run.plan.tile_size(n) for n in range(len(run.plan.windows))), key=lambda tile: tile.frames)
        noise_shape = [run.at_once * size.frames, noise_shape[1], size.height, size.width]
    return executor(model, noise_shape, conds, **rest)


def predict_noise(executor: Any, x: Tensor, timestep: Tensor, model_options: dict[str, Any], seed: Any = None) -> Any:
    """A new evaluation of the whole guidance: what is counted in it starts again."""
    pack_settings(model_options)["run"].order = 0
    return executor(x, timestep, model_options, seed)


def calc_cond_batch(
    executor: Any, model: Any, conds: list[Any], x: Tensor, timestep: Tensor, model_options: dict[str, Any]
) -> Any:
    """Names the branches of this evaluation, so that none shares a bank; perturbs and observes where guidance asks."""
    settings = pack_settings(model_options)
    run: Run = settings["run"]
    if "branches" not in settings:
        first, run.order = run.order == 0, run.order + 1
        branches = [Branch(f"{run.order}.{i}") for i, _ in enumerate(conds)]
        if first and len(conds) > 2 and (unable := [name for name in ("dssag", "sag") if settings.get(name)]):
            raise SettingError(
                f"{unable[0].upper()} met a guider with {len(conds)} conditionings: expected a positive and at most one"
                " negative; use the pack's guiders, CFGGuider or KSampler"
            )
        if first and len(conds) == 2:
            branches = main_branches(settings, run.gamma, float(timestep.max()), conds[1] is not None)
        model_options = changed(model_options, branches=tuple(branches))
    return executor(model, conds, x, timestep, model_options)


def post_cfg(args: dict[str, Any]) -> Tensor:
    """DSSAG without CFG (equation 8), PAG and SAG: what each adds to the guided estimate."""
    settings = pack_settings(args["model_options"])
    run: Run = settings["run"]
    x, sigma, denoised = args["input"], float(args["sigma"].max()), args["denoised"]
    cfg = args["uncond"] is not None and args["cond_scale"] != 1

    def evaluate(cond: Any, x: Tensor, branch: Branch) -> Tensor:
        options = changed(args["model_options"], branches=(branch,))
        return comfy.samplers.calc_cond_batch(args["model"], [cond], x, args["sigma"], options)[0]

    if (dssag := settings.get("dssag")) is not None and not cfg and (gamma := run.gamma(sigma, dssag.rho)) > 0:
        weak = evaluate(args["cond"], x, Branch("dssag", attention=Tempered(gamma), layers=dssag.layers))
        denoised = push(denoised, args["cond_denoised"], weak, dssag.scale)
    if (pag := settings.get("pag")) is not None:
        weak = evaluate(args["cond"], x, Branch("pag", attention=identity, layers=pag.layers))
        denoised = push(denoised, args["cond_denoised"], weak, pag.scale)
    if (sag := settings.get("sag")) is not None:
        cond, estimate = (args["uncond"], args["uncond_denoised"]) if cfg else (args["cond"], args["cond_denoised"])
        name = (UNCOND if cfg else COND).name
        saliency = next((p.saliency for (seen, _), p in run.passes.items() if seen == name and p.saliency), None)
        if saliency is None:
            raise SettingError(
                "SAG saw no attention at this step: expected conditioning that acts over the whole run; take its"
                " timestep range off"
            )
        degraded = sag_degrade(estimate, saliency.result())
        answer = evaluate(cond, sag_renoise(x, estimate, degraded), Branch("sag"))
        denoised = push(denoised, degraded, answer, sag.scale)
    return denoised


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
        raise SettingError("a ControlNet is wired into the conditioning: VSR's patches cannot cut it; remove it")
    numbers, uuids = options["cond_or_uncond"], options["uuids"]
    everything = Inputs(x, t, c_concat, c_crossattn, rest)
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


def _branch(executor: Any, run: Run, branch: Branch, inputs: Inputs, options: dict[str, Any]) -> Tensor:
    """One branch of the whole video."""
    tile_run = run.passes.setdefault((branch.name, options["uuids"][0]), TileRun(run.plan, run.propagation))
    inner = options.get("optimized_attention_override")

    def evaluate(call: Call) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        override = attention_override(tile_run, call, run.layers, inner)
        part = inputs.tiles(run.plan, call)
        own = {**options, "optimized_attention_override": override}
        return executor(part.x, part.t, part.concat, part.context, None, own, **part.rest)

    return run_pass(tile_run, run.step(float(inputs.t.max())), branch, evaluate, run.batch)


# --- Models and pictures --------------------------------------------------------------------------------------------


def load_lite(path: Path) -> tuple[Any, Any]:
    """The bundled SVD as the host's own MODEL and VAE: its memory management, precision and LoRA apply."""
    weights, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    config = json.loads(metadata["vsr.config"])
    tile = TileSize(*config["tile"])
    return _build_model(weights, config["unet"], tile), _build_vae(weights, config["vae"], tile)


def _build_model(weights: Mapping[str, Tensor], config: Mapping[str, Any], tile: TileSize) -> Any:
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    depths = [int("CrossAttn" in name) for name in config["down_block_types"]]
    svd = comfy.supported_models.SVD_img2vid(
        {
            "image_size": 32,
            "in_channels": config["in_channels"],
            "out_channels": config["out_channels"],
            "model_channels": widths[0],
            "channel_mult": [width // widths[0] for width in widths],
            "num_res_blocks": [layers] * len(widths),
            "transformer_depth": [depth for depth in depths for _ in range(layers)],
            "transformer_depth_output": [depth for depth in depths for _ in range(layers + 1)],
            "transformer_depth_middle": 1,
            "context_dim": config["cross_attention_dim"],
            "num_classes": "sequential",
            "adm_in_channels": config["projection_class_embeddings_input_dim"],
            "legacy": False,
            "use_spatial_transformer": True,
            "use_linear_in_transformer": True,
            "use_temporal_attention": True,
            "use_temporal_resblock": True,
            "use_spatial_context": True,
            "extra_ff_mix_layer": True,
            "merge_strategy": "learned_with_images",
            "merge_factor": 0.0,
            "video_kernel_size": [3, 1, 1],
        }
    )
    svd.unet_config["num_head_channels"] = widths[0] // config["num_attention_heads"][0]
    manage = comfy.model_management
    device = manage.get_torch_device()
    dtype = manage.unet_dtype(supported_dtypes=svd.supported_inference_dtypes)
    svd.set_inference_dtype(dtype, manage.unet_manual_cast(dtype, device, svd.supported_inference_dtypes))
    offload = manage.unet_offload_device()
    base = svd.get_model({}, device=offload)
    base.embedder = Timestep(config["addition_time_embed_dim"])
    prefix = "model.diffusion_model."
    base.diffusion_model.load_state_dict(
        {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    )
    patcher = comfy.model_patcher.ModelPatcher(base, load_device=device, offload_device=offload)
    patcher.set_attachments("vsr_tile", tile)
    return patcher


def _build_vae(weights: Mapping[str, Tensor], config: Mapping[str, Any], tile: TileSize) -> Any:
    widths = config["block_out_channels"]
    encoder: dict[str, Any] = {
        "double_z": True,
        "z_channels": config["latent_channels"],
        "resolution": 256,
        "in_channels": config["in_channels"],
        "out_ch": config["out_channels"],
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    decoder = {**encoder, "video_kernel_size": [3, 1, 1], "alpha": 0.0}
    ldm = "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"
    engine = AutoencodingEngine(
        regularizer_config={"target": ldm},
        encoder_config={"target": "comfy.ldm.modules.diffusionmodules.model.Encoder", "params": encoder},
        decoder_config={"target": "comfy.ldm.modules.temporal_ae.VideoDecoder", "params": decoder},
    )
    prefix = "first_stage_model."
    engine.load_state_dict(
        {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    )
    # The host's VAE knows the published widths alone: it is made with a picture VAE of these, which then makes way.
    stand_in = {"ddconfig": {**encoder, "ch": 32, "ch_mult": [1]}, "embed_dim": config["latent_channels"]}
    vae = comfy.sd.VAE(sd=AutoencoderKL(**stand_in).state_dict(), config={"params": stand_in})
    vae.first_stage_model = engine.eval().to(vae.vae_dtype)
    vae.patcher = comfy.model_patcher.ModelPatcher(
        engine, load_device=vae.device, offload_device=comfy.model_management.vae_offload_device()
    )
    vae.patcher.set_attachments("vsr_tile", tile)
    return vae


@dataclass(frozen=True)
class HostVAE:
    """The host's VAE as `vsr_ops.latents` wants one. Chunks are decoded whole, however much memory is free."""

    vae: Any

    @property
    def chunk(self) -> int:
        """Frames a temporal decoder was trained on."""
        return (self.vae.patcher.get_attachment("vsr_tile") or STOCK_TILE).frames

    def encode(self, frames: Tensor) -> Tensor:
        return self.vae.encode(rearrange(frames, "t c h w -> t h w c")).float()

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.vae
        needed = latents.shape[0] * vae.memory_used_decode((1, *latents.shape[1:]), vae.vae_dtype)
        comfy.model_management.load_models_gpu([vae.patcher], memory_required=needed)
        comfy.model_management.throw_exception_if_processing_interrupted()
        out = vae.first_stage_model.decode(latents.to(vae.vae_dtype).to(vae.device))
        return vae.process_output(out.to(vae.output_device).float())


def progress(total: int) -> Callable[[int], None]:
    """The node's progress bar: tell it of units of work done; raises when the artist has interrupted."""
    bar = comfy.utils.ProgressBar(total)

    def tick(done: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update(done)

    return tick


def upscaler(upscale_model: Any) -> Callable[[Tensor], Tensor]:
    """A host upscale model on `(n, 3, h, w)`, by the host's own node: its tiles, memory and precision."""
    from comfy_extras.nodes_upscale_model import ImageUpscaleWithModel

    def enlarge(frames: Tensor) -> Tensor:
        image = ImageUpscaleWithModel.execute(upscale_model, rearrange(frames, "t c h w -> t h w c")).args[0]
        return rearrange(image, "t h w c -> t c h w")

    return enlarge


def refined(refiner: Refiner, decoded: Tensor, upscaled: Tensor, w: float, cuts: Sequence[int] = ()) -> Tensor:
    """`refine` on the host's device, with the node's progress bar; the refiner goes back afterwards."""
    manage = comfy.model_management
    try:
        refiner.to(manage.get_torch_device())
        return refine(refiner, decoded, upscaled, w, cuts, progress(len(decoded)))
    finally:
        refiner.to(manage.unet_offload_device())


def weights_files(
    folder: str, suffixes: tuple[str, ...] = (".safetensors",), bundled: tuple[str, ...] = ("lite",)
) -> list[str]:
    """What a loader offers: what is bundled, and the files of these kinds in a folder of the host's models. Where there
    is nothing, `NO_FILE` alone, since the host cannot say what an empty list lacks."""
    # The pack's own folders are new to the host; saying it again changes nothing, and artists may have named others.
    folder_paths.add_model_folder_path(folder, str(Path(folder_paths.models_dir) / folder))
    found = [*bundled, *(name for name in folder_paths.get_filename_list(folder) if name.endswith(suffixes))]
    return found or [NO_FILE]


def weights_file(
    folder: str, which: str, suffixes: tuple[str, ...] = (".safetensors",), bundled: tuple[str, ...] = ("lite",)
) -> str:
    """The path of a file that `weights_files` offers; what is bundled itself. Raises SettingError for any other."""
    known = weights_files(folder, suffixes, bundled)
    if known == [NO_FILE]:
        raise SettingError(
            f"which is {which!r}, and models/{folder} holds no file of this kind: expected one ending in"
            f" {', '.join(suffixes)}; put it there and refresh"
        )
    if which not in known:
        raise SettingError(
            f"which is {which!r}: expected one of {', '.join(known)}; choose one from the list, or put the file into"
            f" models/{folder} and refresh"
        )
    return which if which in bundled else folder_paths.get_full_path_or_raise(folder, which)


def context_tokens(model: Any, clip_vision_output: Any) -> Tensor:
    """Cross-attention tokens `(1, 1, width)`: CLIP's embedding of a picture, or zeros. Raises SettingError for another
    width than the MODEL's."""
    width = context_width(model)
    if clip_vision_output is None:
        return torch.zeros(1, 1, width)
    embeds = clip_vision_output.image_embeds[:1].unsqueeze(1)
    if embeds.shape[-1] != width:
        raise SettingError(
            f"clip_vision_output is {embeds.shape[-1]} wide, this MODEL takes {width}: expected the CLIP vision of the"
            " MODEL's own checkpoint; for Load Lite SVD leave it unwired"
        )
    return embeds


def fps_key(fps: int) -> int:
    """What the host's conditioning must hold for the UNet to be told `fps`: the host takes 1 off."""
    return fps + 1


def guider(model: Any, positive: Any, negative: Any, cfg: float) -> Any:
    """The host's CFG guider. Raises SettingError for a cfg that has no negative."""
    if negative is None and cfg != 1:
        raise SettingError(f"cfg is {cfg} but no negative is wired: expected one; wire it, or set cfg to 1 (off)")
    made = comfy.samplers.CFGGuider(model)
    made.inner_set_conds({"positive": positive} if negative is None else {"positive": positive, "negative": negative})
    made.set_cfg(cfg)
    return made


def dssag_guider(model: Any, positive: Any, negative: Any, scale: float, rho: float, layers: str) -> Any:
    """Equation 8 without a negative; equation 9, where the host's cfg is 1 + s, with one."""
    patched = patch_perturbed(model, "dssag", scale, layers, rho)
    return guider(patched, positive, negative, 1.0 if negative is None else 1.0 + scale)


def sample(
    made: Any, latent: dict[str, Any], seed: int, steps: int, sampler: str, scheduler: str, denoise: float
) -> dict[str, Any]:
    """What KSampler does, with a guider: LATENT in, LATENT out."""
    model, samples = made.model_patcher, latent["samples"]
    total = steps if denoise >= 1 else int(steps / denoise)
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, total)[-(steps + 1) :]
    noise = comfy.sample.prepare_noise(samples, seed)
    callback = latent_preview.prepare_callback(model, steps)
    out = made.sample(
        noise,
        samples,
        comfy.samplers.sampler_object(sampler),
        sigmas,
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    return {**latent, "samples": out.to(comfy.model_management.intermediate_device())}


# --- What a run will take -------------------------------------------------------------------------------------------


def latent_picture(model: Any, samples: Tensor) -> Tensor:
    """`(n, 3, 8h, 8w)` in [0, 1]: the host's rough preview colours of a latent video."""
    factors = torch.tensor(model.model.latent_format.latent_rgb_factors)
    scaled = model.model.process_latent_in(samples.float().cpu())
    picture = torch.einsum("t c h w, c r -> t r h w", scaled, factors)
    return torch.nn.functional.interpolate((picture / 2 + 0.5).clamp(0, 1), scale_factor=8, mode="nearest")


def preview_plan(model: Any, frames: Tensor, cuts: Sequence[int]) -> TilePlan:
    """The plan of a tiled MODEL for a video `(n, 3, height, width)`. Raises SettingError for a MODEL without tiles."""
    tiles = tiles_of(model)
    if tiles is None:
        raise SettingError("this MODEL has no tiles: expected one from Tiled Diffusion (VSR); wire it in between")
    height, width = (-(-side // CELL) for side in frames.shape[-2:])
    return plan_for(model, tiles, frames.shape[0], height, width, cuts)


def banks(model: Any, layers: str, tile: TileSize) -> list[Bank]:
    """The layers propagation acts in, for tiles of one size."""
    unet, found, shrink = model.model.diffusion_model, list[Bank](), 1
    chosen = {name for name, layer in spatial_layers(model).items() if layers in layer.places}
    for stage, blocks in (
        ("input", unet.input_blocks),
        ("middle", [unet.middle_block]),
        ("output", unet.output_blocks),
    ):
        for number, block in enumerate(blocks):
            shrink *= 2 if any(isinstance(part, Downsample) for part in block) else 1
            for part in block:
                for index, layer in enumerate(getattr(part, "transformer_blocks", ())):
                    if f"{stage}.{number}.{index}" in chosen:
                        width = layer.attn1.to_k.weight.shape[0] + layer.attn1.to_v.weight.shape[0]
                        found.append(Bank(-(-tile.height // shrink), -(-tile.width // shrink), width))
            shrink //= 2 if any(isinstance(part, Upsample) for part in block) else 1
    return found


def tile_flops(model: Any, tile: TileSize) -> float:
    """Operations of one tile's UNet call, counted on a copy without data."""
    config = {**model.model.model_config.unet_config, "device": "meta", "dtype": torch.float32}
    with torch.device("meta"):
        unet = type(model.model.diffusion_model)(**config, operations=comfy.ops.disable_weight_init)
        x = torch.empty(tile.frames, 8, tile.height, tile.width)
        context, y = (
            torch.empty(tile.frames, 1, config["context_dim"]),
            torch.empty(tile.frames, config["adm_in_channels"]),
        )

    def attention(_: object, q: Tensor, k: Tensor, v: Tensor, heads: int, *rest: object, **more: object) -> Tensor:
        q, k, v = (rearrange(z, "b n (h d) -> b h n d", h=heads) for z in (q, k, v))
        return rearrange(torch.nn.functional.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")

    options = {"optimized_attention_override": attention}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(x, x[:, 0, 0, 0], context, y, transformer_options=options, num_video_frames=tile.frames)
    return float(counter.get_total_flops())


def describe(model: Any, plan: TilePlan, steps: int, passes: int) -> str:
    """The plan as text: tiles, UNet calls, memory, and an estimate of time good to a factor of about 2."""
    tiles = tiles_of(model)
    assert tiles is not None
    at_once = together(model, tiles, plan)
    carried = replace(tiles.propagation, sap_lagged=sap_lagged(tiles, plan, at_once))
    tile = max((plan.tile_size(n) for n in range(len(plan.windows))), key=lambda size: size.frames)
    layers, dtype = banks(model, carried.layers, tile), model.model_dtype()
    flops = tile_flops(model, tile)
    needed = model.model.memory_required([at_once * tile.frames, 4, tile.height, tile.width])
    return describe_plan(
        plan,
        carried,
        steps,
        passes,
        lagged=lagged_bytes(plan, carried, passes, layers, dtype.itemsize),
        tap=tap_bytes(plan, carried, at_once, layers, dtype.itemsize),
        weights=model.model_size(),
        activations=needed,
        flops=flops,
        speed=matmul_speed(model.load_device, dtype),
    )


# --- Motion ---------------------------------------------------------------------------------------------------------


def estimated_flow(frames: Tensor, estimator: str, cuts: Sequence[int]) -> Flow:
    """`estimate_flow` on the host's device, with the node's progress bar; RAFT's weights may lie in models/vsr_flow."""
    device, (height, width) = comfy.model_management.get_torch_device(), frames.shape[-2:]
    if estimator != "dis":
        comfy.model_management.free_memory(raft_memory(height, width), device)
    folder = Path(folder_paths.models_dir) / "vsr_flow"
    return estimate_flow(frames, estimator, cuts, progress(max(1, len(frames) - 1)), folder, device)


def patch_alignment(model: Any, flow: Flow, strength: float, start: float, end: float, mode: str) -> Any:
    """A MODEL whose denoised estimate is aligned along `flow`, at the steps from `start` to `end` of the schedule.

    It acts on what the whole guidance answers for the whole video: tiles are merged by then, and every other patch has
    had its say, so that the order of wiring cannot matter. Strength 0 and a flow of under two frames take an earlier
    alignment off and add none. Raises SettingError for a mode or strength that cannot work, and in the run for a LATENT
    that the flow does not fit.
    """
    check_strength(strength, mode)
    m = model.clone()
    m.remove_wrappers_with_key(WrappersMP.PREDICT_NOISE, ALIGN_KEY)
    if strength == 0 or flow.frames < 2:
        return m
    height, width = (-(-side // CELL) for side in flow.size)
    small = latent_flow(flow, height, width, CELL, SHARE)
    sampling = m.get_model_object("model_sampling")
    first, last = (sampling.percent_to_sigma(share) for share in (start, end))

    def aligned(executor: Any, x: Tensor, timestep: Tensor, model_options: dict[str, Any], seed: Any = None) -> Tensor:
        if x.ndim != 4:
            raise SettingError(
                f"flow-guided latents met a LATENT of shape {tuple(x.shape)}: expected the video's frames as a batch"
                " (frames, channels, height, width), as SVD's and SD's are; take this node off for other models"
            )
        check_fits(flow, x.shape[0], x.shape[-2], x.shape[-1], CELL)
        denoised, sigma = executor(x, timestep, model_options, seed), float(timestep.max())
        inside = last <= sigma <= first
        return align(denoised, small, strength, sigma, mode, ROUNDS) if inside else denoised

    m.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, ALIGN_KEY, aligned)
    return m


# --- Decoding with modules ------------------------------------------------------------------------------------------


def decoded(
    vae: Any,
    latents: Tensor,
    chunk: int,
    cuts: Sequence[int],
    size: tuple[int, int] | None,
    reference: Tensor | None,
    cfw: CFW | None,
    stam: STAM | None,
    w: float,
    tile: int,
) -> Tensor:
    """Frames `(n, 3, height, width)`: `decode_video` where no tile is asked for and no module acts, else `stream_video`
    on the host's device, with the node's progress bar; modules go back afterwards. `chunk` 0 is the VAE's own."""
    check_w(w)
    adapter, manage = HostVAE(vae), comfy.model_management
    tick = progress(len(latents))
    cfw = None if w == 0 else cfw
    if tile == 0 and cfw is None and stam is None:
        return decode_video(adapter, latents, chunk or adapter.chunk, cuts, size, tick)
    modules = [module for module in (cfw, stam) if module is not None]
    together = chunk or adapter.chunk
    sides = [min(side, (tile or VAE_TILE) + 2 * STREAM_MARGIN) for side in latents.shape[-2:]]
    at_once = min(len(latents), together) if stam is not None or is_temporal(vae.first_stage_model.decoder) else 1
    needed = at_once * vae.memory_used_decode((1, 4, *sides), vae.vae_dtype)
    if cfw is not None:
        needed += at_once * vae.memory_used_encode((1, 3, *(side * CELL for side in sides)), vae.vae_dtype)
    needed += sum(manage.module_size(module) for module in modules)
    # Whole: the streaming decoder goes by where the weights lie, and a part of them would stay behind.
    manage.load_models_gpu([vae.patcher], memory_required=needed, force_full_load=True)
    try:
        for module in modules:
            module.to(vae.device)
        return stream_video(
            vae.first_stage_model,
            latents.to(vae.output_device),
            cuts,
            size,
            tick,
            reference=reference,
            cfw=cfw,
            w=w,
            stam=stam,
            chunk=together,
            tile=tile or VAE_TILE,
            alive=manage.throw_exception_if_processing_interrupted,
        )
    finally:
        for module in modules:
            module.to(manage.vae_offload_device())
