"""Small Stable Diffusions of the published families with random weights, ControlNets for them, and a step by hand."""

from __future__ import annotations

import importlib
import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tests.support.tensors import randn

from .conftest import NAME
from .wiring import TILE, sampled, wrapped

CPU = torch.device("cpu")
#: Of the small UNets: what the middle shrinks a latent by, and the width of their tokens.
FACTOR, WIDTH = 2, 16
#: Two tiles in two windows.
SHAPE = (6, 4, 24, 16)


def fill(module: torch.nn.Module, seed: int = 0) -> None:
    """Weights under which every layer matters: the host leaves them empty, and its last convolution zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.named_parameters():
        if value.ndim > 1:
            value.data.copy_(torch.randn(value.shape, generator=generator) / math.sqrt(value[0].numel()))
        else:
            value.data.fill_(float(name.endswith("weight")))


def unet_config(**more: Any) -> dict[str, Any]:
    return {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "channel_mult": [1, 2],
        "num_res_blocks": [1, 1],
        "transformer_depth": [1, 1],
        "transformer_depth_output": [1, 1, 1, 1],
        "transformer_depth_middle": 1,
        "context_dim": WIDTH,
        "adm_in_channels": None,
        "use_spatial_transformer": True,
        "use_temporal_attention": False,
        "legacy": False,
        **more,
    }


def build(kind: str) -> Any:
    """A small MODEL of a published family, with random weights."""
    models, bases = (importlib.import_module(f"comfy.{name}") for name in ("supported_models", "model_base"))
    if kind == "SD 1.5":
        config = models.SD15(unet_config(use_linear_in_transformer=False))
        predicts = bases.ModelType.EPS
    elif kind == "SD 2.1":
        config = models.SD20(unet_config(use_linear_in_transformer=True))
        config.unet_config["num_head_channels"] = 16
        predicts = bases.ModelType.V_PREDICTION
    else:
        more = {"num_classes": "sequential", "adm_in_channels": 2816, "use_linear_in_transformer": True}
        config = models.SDXL(
            unet_config(**{**more, "transformer_depth": [0, 2], "transformer_depth_output": [0, 0, 2, 2]})
        )
        config.unet_config["num_head_channels"] = 16
        predicts = bases.ModelType.EPS
    config.set_inference_dtype(torch.float32, None)
    family = bases.SDXL if kind == "SDXL" else bases.BaseModel
    base = family(config, model_type=predicts, device=CPU)
    fill(base.diffusion_model)
    patcher = importlib.import_module("comfy.model_patcher").ModelPatcher
    return patcher(base, load_device=CPU, offload_device=CPU)


def wire(shape: tuple[int, ...] = SHAPE, **extra: Any) -> tuple[Any, Any, Any]:
    """Positive, negative and LATENT; `extra` goes into both conditionings."""
    positive, negative = (
        [[randn(1, 7, WIDTH, seed=seed), {"pooled_output": randn(1, 1280, seed=seed), **extra}]] for seed in (2, 3)
    )
    return positive, negative, {"samples": randn(*shape, seed=1)}


ALONE = (TILE[2], 4, *TILE[:2])


def plan_of(shape: tuple[int, ...]) -> Any:
    tiling = importlib.import_module(f"{NAME}.vsr_ops.sampling.tiling")
    return tiling.plan_tiles(shape[0], *shape[2:], tiling.TileSize(*TILE), 0.5, factor=FACTOR)


Features = dict[str, list[Tensor]]


def cut_by_hand(control: Features, frames: slice, rows: slice, cols: slice) -> Features:
    def cut(value: Tensor) -> Tensor:
        k = SHAPE[2] // value.shape[2]
        own = value if value.shape[0] == 1 else value[frames]
        return own[:, :, rows.start // k : rows.stop // k, cols.start // k : cols.stop // k]

    return {stage: [cut(value) for value in values] for stage, values in control.items()}


def by_hand(model: Any, x: Tensor, sigma: Tensor, context: Tensor, control: Features | None = None) -> Tensor:
    """The blended answers to every tile of `x`, each asked for on its own."""
    tiling = importlib.import_module(f"{NAME}.vsr_ops.sampling.tiling")
    plan, base = plan_of(tuple(x.shape)), model.model
    merger = tiling.Merger(plan)
    for n, window in enumerate(plan.windows):
        for m, (row, col) in enumerate(plan.spatial):
            frames, count = window.span.slice, window.span.length
            own = None if control is None else cut_by_hand(control, frames, row.slice, col.slice)
            part = x[frames, :, row.slice, col.slice]
            ctx = context.repeat(count, 1, 1)
            merger.add(n, m, base.apply_model(part, sigma[:count], None, ctx, own, {}))
    return merger.result()


def one_step(host: ModuleType, model: Any, wired: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What the first step asks at cfg 1, its sigma, and the denoised estimate of it."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def note(executor: Any, x: Tensor, sigma: Tensor, *rest: Any, **more: Any) -> Tensor:
        out = executor(x, sigma, *rest, **more)
        seen.append((x.clone(), sigma.clone(), out.clone()))
        return out

    sampled(host, wrapped(model, "predict_noise", note), wired, 1.0, 1)
    return seen[0]


def real_control(model: Any, zero: bool) -> Any:
    """The host's own ControlNet around a copy of the UNet's encoder."""
    cldm, controlnet = (importlib.import_module(f"comfy.{name}") for name in ("cldm.cldm", "controlnet"))
    config = {key: value for key, value in model.model.model_config.unet_config.items() if key != "out_channels"}
    config.pop("transformer_depth_output")
    operations = importlib.import_module("comfy.ops").disable_weight_init
    made = cldm.ControlNet(**config, hint_channels=3, operations=operations, device=CPU)
    fill(made, 5)
    if zero:
        for name, value in made.named_parameters():
            if name.startswith(("zero_convs.", "middle_block_out.")):
                value.data.zero_()
    return controlnet.ControlNet(made, load_device=CPU)


def video(shape: tuple[int, ...] = SHAPE) -> Tensor:
    """A picture for every frame of a LATENT."""
    return randn(shape[0], shape[2] * 8, shape[3] * 8, 3, seed=6).sigmoid()


def apply_control(control: Any, wired: Any, strength: float = 1.0, vae: Any = None) -> Any:
    """The host's Apply ControlNet."""
    positive, negative, latent = wired
    image = video(tuple(latent["samples"].shape))
    node = importlib.import_module("nodes").ControlNetApplyAdvanced()
    return (*node.apply_controlnet(positive, negative, control, image, strength, 0.0, 1.0, vae), latent)


CONTROL_CONFIG: dict[str, Any] = {
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D"] * 2,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": [2, 4],
    "use_linear_projection": True,
}


def own_control(control: Any) -> Any:
    patcher = importlib.import_module("comfy.model_patcher").ModelPatcher
    module = importlib.import_module(f"{NAME}.nodes.host.control")
    return module.HostControl(patcher(control, load_device=CPU, offload_device=CPU))
