"""What the pack leans on in ComfyUI, in one table: every symbol, how it is called, and the test that holds it.

ComfyUI's modules promise nothing to packs. `broken` asks a host in a second, without running a model; each line names
one thing that is gone, or is called or does otherwise now, and the test in tests/host/inside where that would show.
Four kinds of lines, told apart by how they are written:

- `comfy.sample.prepare_noise(latent, seed)`: there, and can be called so; the names are for the reader, their number
  and keywords count. Without brackets: there.
- `comfy.samplers.CFGGuider.predict_noise <- x, timestep, model_options, seed`: a hook of ours stands in its place, and
  takes these parameters, in this order.
- `comfy.sd.VAE: device, vae_dtype`: attributes that its objects have.
- `comfy.ldm.modules.attention ~ activations_shape`: its source says so: what it puts into a call's options.

A line that begins with `?` came later: a host without it is served too, as before it.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

_UNET, _PATCHER = "comfy.ldm.modules.diffusionmodules.openaimodel", "comfy.model_patcher.ModelPatcher"
_MEMORY, _GUIDER = "comfy.model_management", "comfy.samplers.CFGGuider"

#: Lines by the test that holds them: its file in tests/host/inside, and its name.
CONTRACT: dict[str, tuple[str, ...]] = {
    "test_parity.py::test_the_host_and_the_headless_pipeline_agree": (
        f"{_GUIDER}(model)",
        f"{_GUIDER}.inner_set_conds(self, conds)",
        f"{_GUIDER}.set_cfg(self, cfg)",
        f"{_GUIDER}.sample(self, noise, latent, sampler, sigmas, callback=c, disable_pbar=d, seed=s)",
        f"{_GUIDER}: model_patcher, model_options, conds",
        "comfy.samplers.calculate_sigmas(sampling, scheduler, steps)",
        "comfy.samplers.sampler_object(name)",
        "comfy.samplers.SAMPLER_NAMES",
        "comfy.samplers.SCHEDULER_NAMES",
        "comfy.sample.prepare_noise(latent, seed)",
        "comfy.utils.PROGRESS_BAR_ENABLED",
        "latent_preview.prepare_callback(model, steps)",
        "comfy.supported_models.SVD_img2vid(unet_config)",
        "comfy.supported_models.SVD_img2vid.set_inference_dtype(self, dtype, manual_cast_dtype)",
        "comfy.supported_models.SVD_img2vid.get_model(self, state_dict, device=d)",
        "comfy.supported_models.SVD_img2vid: supported_inference_dtypes, unet_config",
        "comfy.model_base.SVD_img2vid",
        f"{_UNET}.Timestep(dim)",
        f"{_MEMORY}.get_torch_device()",
        f"{_MEMORY}.unet_offload_device()",
        f"{_MEMORY}.intermediate_device()",
        f"{_MEMORY}.unet_dtype(model_params=p, supported_dtypes=s)",
        f"{_MEMORY}.unet_manual_cast(dtype, device, supported)",
        f"{_PATCHER}(module, load_device=l, offload_device=o)",
        f"{_PATCHER}: model, load_device, offload_device, model_options",
        f"{_PATCHER}.set_attachments(self, key, value)",
        f"{_PATCHER}.get_attachment(self, key)",
        f"{_PATCHER}.get_model_object(self, name)",
        "?comfy.model_patcher.CoreModelPatcher(module, load_device=l, offload_device=o)",
        "comfy.utils.load_torch_file(path, safe_load=s, return_metadata=r)",
        "folder_paths.models_dir",
    ),
    "test_hooks.py::test_wiring_order_does_not_matter": (
        f"{_PATCHER}.clone(self)",
        f"{_PATCHER}.add_wrapper_with_key(self, kind, key, wrapper)",
        f"{_PATCHER}.remove_wrappers_with_key(self, kind, key)",
        f"{_PATCHER}.set_model_sampler_post_cfg_function(self, function)",
        "comfy.samplers ~ sampler_post_cfg_function",
        "comfy.patcher_extension.WrapperExecutor: class_obj",
        "comfy.patcher_extension.WrappersMP.OUTER_SAMPLE",
        "comfy.patcher_extension.WrappersMP.PREPARE_SAMPLING",
        "comfy.patcher_extension.WrappersMP.PREDICT_NOISE",
        "comfy.patcher_extension.WrappersMP.CALC_COND_BATCH",
        "comfy.patcher_extension.WrappersMP.APPLY_MODEL",
        f"{_GUIDER}.outer_sample <- noise, latent_image, sampler, sigmas, denoise_mask, callback",
        "comfy.sampler_helpers._prepare_sampling <- model, noise_shape, conds",
        f"{_GUIDER}.predict_noise <- x, timestep, model_options, seed",
        "comfy.samplers._calc_cond_batch <- model, conds, x_in, timestep, model_options",
        "comfy.model_base.BaseModel._apply_model <- x, t, c_concat, c_crossattn, control, transformer_options",
        "comfy.samplers.calc_cond_batch(model, conds, x, sigma, model_options)",
    ),
    "test_live.py::test_tiles_are_shown_as_they_are_done": (
        f"{_GUIDER}: cfg",
        "latent_preview ~ decode_latent_to_preview_image",
        "latent_preview ~ update_absolute",
        "comfy.utils.set_progress_bar_global_hook(hook)",
    ),
    "test_hooks.py::test_branches_together_or_apart_are_one": (
        "comfy.samplers ~ cond_or_uncond",
        "comfy.samplers ~ uuids",
        "comfy.model_base ~ num_video_frames",
    ),
    "test_hooks.py::test_another_packs_attention_stays": (
        "comfy.ldm.modules.attention ~ optimized_attention_override",
        "comfy.ldm.modules.attention ~ activations_shape",
        "comfy.ldm.modules.attention.attention_pytorch(q, k, v, heads)",
        "comfy.ldm.modules.attention ~ block_index",
        f'{_UNET} ~ transformer_options["block',
        f"{_UNET}.UNetModel: input_blocks, middle_block, output_blocks, out",
        f"{_UNET}.UNetModel(image_size, in_channels, model_channels, out_channels, num_res_blocks, operations=o)",
    ),
    "test_other_nodes.py::test_hypertile_is_refused_where_it_acts": ("comfy.ldm.modules.attention ~ attn1_patch",),
    "test_other_nodes.py::test_torch_compile_changes_nothing_and_says_so": (
        f"{_PATCHER}.get_wrappers(self, kind, key)",
        "comfy_api.torch_helpers.torch_compile ~ torch.compile",
    ),
    "test_other_nodes.py::test_several_gpus_are_refused": (
        f"{_PATCHER}.get_additional_models_with_key(self, key)",
        "?comfy.multigpu ~ multigpu",
    ),
    "test_bad_input.py::test_context_windows": ("comfy.samplers ~ context_handler",),
    "test_hooks.py::test_the_host_is_told_the_tiles_size": ("comfy.model_base.BaseModel.memory_required(self, shape)",),
    "test_runs.py::test_runs_leave_nothing_behind": (f"{_MEMORY}.throw_exception_if_processing_interrupted()",),
    "test_runs.py::test_out_of_memory_halves_the_batch": (
        f"{_MEMORY}.OOM_EXCEPTION",
        f"?{_MEMORY}.is_oom(error)",
        f"{_MEMORY}.soft_empty_cache()",
    ),
    "test_sd_models.py::test_the_host_and_the_headless_path_agree": (
        "comfy.supported_models.SD20(unet_config)",
        "comfy.model_base.BaseModel(config, model_type=t, device=d)",
        "comfy.model_base.BaseModel: diffusion_model, latent_format, model_config, model_sampling",
        "comfy.model_base.ModelType.V_PREDICTION",
        "comfy.model_base.ModelType.EPS",
    ),
    "test_sd_models.py::test_the_plan_in_words": (
        "comfy.ops.disable_weight_init",
        "comfy.latent_formats.SD15: latent_rgb_factors, latent_channels, latent_dimensions",
        "comfy.model_base.BaseModel.process_latent_in(self, latent)",
        f"{_UNET}.Downsample",
        f"{_UNET}.Upsample",
        f"{_MEMORY}.get_total_memory(device)",
        "comfy.model_base.BaseModel.apply_model(self, x, t, concat, context, num_video_frames=n, y=y)",
        f"{_PATCHER}.model_size(self)",
        f"{_PATCHER}.model_dtype(self)",
    ),
    "test_latents.py::test_a_rebatched_latent_has_its_cut_found_again": (
        "comfy.latent_formats.SD15.process_in(self, latent)",
        "nodes.LatentFromBatch ~ batch_index",
        "nodes.RepeatLatentBatch ~ batch_index",
    ),
    "test_control.py::test_controls_add_up_in_a_chain": (
        "comfy.controlnet.ControlBase()",
        "comfy.controlnet.ControlBase.set_cond_hint(self, hint, strength, range, vae, extra)",
        "comfy.controlnet.ControlBase.copy_to(self, other)",
        "comfy.controlnet.ControlBase.get_models(self)",
        "comfy.controlnet.ControlBase.pre_run(self, model, percent_to_timestep)",
        "comfy.controlnet.ControlBase.cleanup(self)",
        "comfy.controlnet.ControlBase.control_merge(self, control, before, dtype)",
        "comfy.controlnet.ControlBase: previous_controlnet, strength, timestep_range, vae",
        "comfy.controlnet.ControlBase: cond_hint, cond_hint_original, latent_format",
        "comfy.controlnet.ControlNet.get_control <- x_noisy, t, cond, batched_number, transformer_options",
        "comfy.ops.disable_weight_init.Linear: comfy_cast_weights",
        "comfy.ops.disable_weight_init.Conv2d: comfy_cast_weights",
        "comfy.ops.disable_weight_init.GroupNorm: comfy_cast_weights",
        "comfy.ops.disable_weight_init.LayerNorm: comfy_cast_weights",
        f"{_MEMORY}.unet_dtype(model_params=m, supported_dtypes=s)",
        f"{_MEMORY}.cast_to_device(tensor, device, dtype)",
        f"{_MEMORY}.loaded_models(only_currently_used=o)",
    ),
    "test_capm.py::test_other_packs_patches_of_the_same_blocks_act_after_it": (
        "comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL",
        f"{_UNET}.UNetModel._forward <- x, timesteps, context, y, control, transformer_options",
        f"{_UNET} ~ output_block_patch",
        f"{_UNET}.UNetModel: model_channels, channel_mult, num_res_blocks",
        f"{_PATCHER}.set_additional_models(self, key, models)",
        f"{_PATCHER}.remove_additional_models(self, key)",
    ),
    "test_flow.py::test_alignment_acts_once_on_tiles_put_together_and_off_is_off": (
        f"{_MEMORY}.free_memory(needed, device)",
        "comfy.samplers ~ sample_sigmas",
        "comfy.model_sampling.EPS",
        "comfy.model_sampling.ModelSamplingDiscrete: sigma_min, sigma_max",
        "comfy.model_sampling.ModelSamplingDiscrete.percent_to_sigma(self, percent)",
        "comfy.model_sampling.ModelSamplingContinuousEDM.percent_to_sigma(self, percent)",
    ),
    "test_decode_host.py::test_tiles_are_the_picture_of_one_pass": (
        "comfy.sd.VAE(sd=s, config=c)",
        "comfy.sd.VAE: first_stage_model, patcher, device, vae_dtype, output_device, latent_channels, process_output",
        "comfy.sd.VAE: memory_used_decode, memory_used_encode",
        "comfy.sd.VAE.encode(self, pixels)",
        "comfy.ldm.models.autoencoder.AutoencoderKL(ddconfig=d, embed_dim=e)",
        "comfy.ldm.models.autoencoder.AutoencodingEngine(encoder_config=e, decoder_config=d, regularizer_config=r)",
        "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer(sample=s)",
        "comfy.ldm.modules.diffusionmodules.model.Encoder",
        "comfy.ldm.modules.temporal_ae.VideoDecoder",
        f"{_MEMORY}.load_models_gpu(models, memory_required=m)",
        f"{_MEMORY}.load_models_gpu(models, memory_required=m, force_full_load=f)",
        f"{_MEMORY}.module_size(module)",
        f"{_MEMORY}.vae_offload_device()",
    ),
    "test_modules.py::test_dcm_is_an_upscale_model_of_the_host": (
        "comfy_extras.nodes_upscale_model.ImageUpscaleWithModel.execute(upscale_model, image)",
        "comfy.utils.ProgressBar(total)",
        "comfy.utils.ProgressBar.update(self, done)",
    ),
    "test_modules.py::test_the_artists_own_files_are_found": (
        "folder_paths.add_model_folder_path(folder, path)",
        "folder_paths.get_filename_list(folder)",
        "folder_paths.get_full_path_or_raise(folder, name)",
    ),
    "test_dcvsr.py::test_beside_a_checkpoint_that_the_host_takes_for_svd": (
        "folder_paths.get_folder_paths(folder)",
        "comfy.sd.load_checkpoint_guess_config(p, output_vae=v, output_clip=c, output_clipvision=e, output_model=m)",
    ),
    "test_defaults.py::test_every_scene_is_seen_by_itself": (
        "comfy.clip_vision.ClipVisionModel.encode_image(self, image, crop=c)",
        "comfy.clip_vision ~ image_embeds",
    ),
    "test_images.py::test_images_leave_as_the_host_hands_them_on": (f"?{_MEMORY}.intermediate_dtype()",),
}


def broken() -> list[str]:
    """One line for each part of the contract that this host does not keep."""
    return [
        f"{line}: {fault} (would show in {test})"
        for test, lines in CONTRACT.items()
        for line in lines
        if (fault := _fault(line))
    ]


def reads(name: str, parameter: str) -> set[str]:
    """The attributes that a function of the host's reads off a parameter: what an object of ours must have."""
    tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(_found(name))))
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == parameter
    }


def _fault(line: str) -> str:
    """What is wrong with a line; nothing where it holds, or came later than this host."""
    optional, line = line.startswith("?"), line.removeprefix("?")
    mark = next((mark for mark in _KINDS if mark in line), None)
    name, _, rest = line.partition(mark) if mark else (line, "", "")
    try:
        found = _found(name)
    except LookupError as error:
        return "" if optional else str(error)
    return _KINDS[mark](found, rest) if mark else ""


def _called(found: Any, rest: str) -> str:
    """Whether it can be called with the arguments that `rest` has, up to the bracket."""
    call = ast.parse(f"f({rest}", mode="eval").body
    assert isinstance(call, ast.Call)
    signature = inspect.signature(found)
    try:
        signature.bind(*call.args, **{keyword.arg or "": keyword for keyword in call.keywords})
    except TypeError as error:
        return f"{error}; it takes {signature}"
    return ""


def _wrapped(found: Any, rest: str) -> str:
    """Whether its parameters begin with those that `rest` names."""
    there = [name for name in inspect.signature(found).parameters if name != "self"]
    wanted = rest.split(", ")
    return "" if there[: len(wanted)] == wanted else f"it takes {', '.join(there)} now"


def _has(found: Any, rest: str) -> str:
    """Whether a class or its objects have the attributes that `rest` names."""
    sources = [inspect.getsource(kind) for kind in found.__mro__ if kind.__module__ == found.__module__]
    missing = [
        name
        for name in rest.split(", ")
        if not hasattr(found, name) and not any(re.search(rf"\bself\.{name}\b.*=", source) for source in sources)
    ]
    return f"{', '.join(missing)} is gone" if missing else ""


def _says(found: Any, rest: str) -> str:
    """Whether its source has a word."""
    return "" if re.search(rf"\b{re.escape(rest)}\b", inspect.getsource(found)) else f"{rest} is gone"


#: What a line says, by the mark in it.
_KINDS: dict[str, Callable[[Any, str], str]] = {" <- ": _wrapped, " ~ ": _says, ": ": _has, "(": _called}


def _found(name: str) -> Any:
    """What stands under a dotted name. Raises LookupError where nothing does."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            if not hasattr(found, part):
                raise LookupError(f"{part} is gone")
            found = getattr(found, part)
        return found
    raise LookupError("the module is gone")
