"""Recipes made tiny, shared by the trainer's tests."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from training.__main__ import main
from training.loop.recipe import BUNDLED

TINY_DCM = """
task = "dcm"
[model]
embed_dim = 8
depths = [2]
num_heads = [2]
upsampler = "pixelshuffledirect"
[data]
size = 64
frames = 2
patch = 8
crops = 2
clean_share = 1.0
[train]
steps = 24
[optimizer]
lr = 2e-3
floor = 0.1
[run]
save_every = 8
sample_every = 100
"""


BICUBIC = "data.upscaler=bicubic"


def settings_of(name: str, vaes: tuple[Path, Path]) -> list[str]:
    """What makes a bundled recipe tiny."""
    if name == "dcm":
        return ["model.num_feat=8", "model.num_conv=2", "data.size=64", "data.frames=2", "data.patch=8"]
    if name.startswith("vae"):
        tiny = ["model.block_out_channels=[32,32,32,32]", "data.size=32"]
        if name == "vae_refined":
            return [
                *tiny,
                f"model.picture={vaes[0]}",
                "model.width=8",
                "model.blocks=2",
                "data.frames=2",
                "data.patch=8",
            ]
        return tiny + ([f"model.picture={vaes[0]}", "data.frames=2"] if name == "vae_temporal" else [])
    if name == "video_upscaler":
        return ["model.width=8", "model.stages=2", "model.blocks=1", "data.size=64", "data.frames=3"]
    if name == "encoder":
        return [f"model.start={vaes[1].parent / 'svd.safetensors'}", "data.size=64"]
    if name == "thin_unet":
        svd = vaes[1].parent / "svd.safetensors"
        return [f"model.start={svd}", "data.size=64", "data.frames=2", "data.clips=2", "train.batch=1", BICUBIC]
    if name == "compression":
        return ["model.widths=[8]", "model.blocks=[1]", "data.size=32", "data.crop=16", "data.frames=2"]
    if name == "capm":
        svd = vaes[1].parent / "svd.safetensors"
        return [f"model.start={svd}", "data.size=64", "data.frames=2", "data.clips=2", BICUBIC]
    if name == "decoder":
        clips = ["data.size=64", "data.frames=3", "data.clips=2", "data.crop=32", "data.crop_frames=2"]
        return [f"model.start={vaes[1].parent / 'svd.safetensors'}", *clips, "data.steps=[1]", BICUBIC]
    if name in ("sd", "control"):
        clips = ["data.size=64", "data.frames=2", "data.clips=2", "data.crop=8", BICUBIC]
        own = ["model.block_out_channels=[32,32]", "model.layers_per_block=[1,1]", "model.attends=[0,1]"]
        start = [f"model.start={vaes[1].parent / 'sd.safetensors'}"]
        return [*(own if name == "sd" else start), f"model.vae={vaes[1].parent / 'svd.safetensors'}", *clips]
    if name == "sateco":
        own = ["model.inner=[8,8]", "model.guide=8", "model.head=8", "data.crop_frames=2"]
        return [*settings_of("control", vaes), *own]
    if name == "control_dcm":
        folder = vaes[1].parent
        return [f"model.start={folder / 'sd.safetensors'}", f"model.vae={folder / 'svd.safetensors'}", "data.size=64"]
    if name == "capm_sd":
        control = vaes[1].parent / "control.safetensors"
        return [*settings_of("control", vaes), f"model.control={control}", "model.capm=", "model.code=8"]
    if name == "capm_whole":
        return [*settings_of("whole", vaes), f"model.capm={vaes[1].parent / 'capm.safetensors'}"]
    if name in ("whole", "whole_dcm"):
        svd = vaes[1].parent / "svd.safetensors"
        return [f"model.start={svd}", "data.size=64", "data.frames=2", "data.steps=[2,3]"]
    if name == "refiner":
        clips = ["data.size=64", "data.frames=2", "data.clips=2", "data.crop=32", "data.crop_frames=2"]
        return [f"model.start={vaes[1].parent / 'svd.safetensors'}", *clips, BICUBIC, "data.steps=[1,2]"]
    unet = ["model.block_out_channels=[32,32,32,32]", "model.num_attention_heads=[1,1,1,1]"]
    return [*unet, f"model.vae={vaes[1]}", "data.size=64", "data.frames=2", "data.clips=2", BICUBIC]


def descended(
    loss_of: Callable[[], tuple[Tensor, dict[str, float]]], model: nn.Module, lr: float, steps: int
) -> dict[str, list[float]]:
    """The loss and its numbers at each of some steps of AdamW, from the first: all that may learn does."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=lr)
    found: dict[str, list[float]] = {}
    for _ in range(steps):
        loss, numbers = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for key, value in {"loss": float(loss.detach()), **numbers}.items():
            assert math.isfinite(value), key
            found.setdefault(key, []).append(value)
    return found


def train_tiny(recipe: str, sets: list[str], photos: Path, out: Path) -> Path:
    sets = [*sets, "train.steps=2", "train.precision=float32", "run.sample_every=2"]
    arguments = [str(BUNDLED / f"{recipe}.toml"), "--data", str(photos), "--out", str(out), "--cpu"]
    assert main([*arguments, *(word for text in sets for word in ("--set", text))]) == 0
    return out
