"""Branches of a UNet that add nothing are not computed, and what it says is what all of it would."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel

from tests.support.svd_files import UNET_CONFIG, VAE_CONFIG, make
from training.tasks.thin_unet import silenced_unet
from vsr_ops.backbones.svd import build_svd, spatial_self_attention
from vsr_ops.checkpoints.svd import LITE, SVDWeights, match_host_epsilon, read_svd
from vsr_ops.modules.idle import Idle, Nothing
from vsr_ops.pipeline.operations import Operations
from vsr_ops.sampling.tiling import TileSize

OVER_TIME = (
    "*.temporal_transformer_blocks.0.ff_in.net.2",
    "*.temporal_transformer_blocks.0.ff.net.2",
    "up_blocks.3.attentions.0.temporal_transformer_blocks.0.attn1.to_out.0",
    "up_blocks.[23].resnets.*.temporal_res_block.conv2",
)
WITHIN_FRAMES = ("up_blocks.3.attentions.0.transformer_blocks.0.attn1.to_out.0",)


def thin(*patterns: str) -> SVDWeights:
    return silenced_unet(replace(make(UNET_CONFIG, VAE_CONFIG), image_encoder=None), patterns)


@torch.no_grad()
@pytest.mark.parametrize("patterns", [OVER_TIME, OVER_TIME[:1], OVER_TIME[3:], WITHIN_FRAMES])
def test_what_is_left_out_changes_nothing(patterns: tuple[str, ...]) -> None:
    weights = thin(*patterns)
    whole = UNetSpatioTemporalConditionModel(**weights.unet_config)
    whole.load_state_dict(weights.unet)
    match_host_epsilon(whole)
    less = build_svd(weights, torch.device("cpu"), torch.float32).unet
    rng = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 3, 8, 16, 24, generator=rng), torch.randn(2, 1, 16, generator=rng)
    given = x, torch.tensor(0.3), context, torch.tensor([[8.0, 127.0, 0.0]]).expand(2, -1)
    torch.testing.assert_close(less(*given).sample, whole.eval()(*given).sample, atol=2e-5, rtol=1e-5)


def test_attention_within_a_frame_stays_for_methods_act_in_it() -> None:
    unet = build_svd(thin(*OVER_TIME, *WITHIN_FRAMES), torch.device("cpu"), torch.float32).unet
    nothing = {name for name, part in unet.named_modules() if isinstance(part, Nothing)}
    blocks = sum(name.endswith("temporal_transformer_blocks.0") for name, _ in unet.named_modules())
    assert nothing and all("temporal" in name for name in nothing) and len(nothing) == 2 * blocks + 1
    assert sum(isinstance(part, Idle) for part in unet.modules()) == 4
    assert not any(isinstance(part, Nothing) for _, part in spatial_self_attention(unet))


@torch.no_grad()
def test_the_bundled_model_is_thin_and_its_work_is_counted_so() -> None:
    weights, tile = read_svd(LITE), TileSize(24, 24, 8)
    counts: list[float] = []
    for state in (weights.unet, {name: value + 1e-9 for name, value in weights.unet.items()}):
        model = build_svd(replace(weights, unet=dict(state)), torch.device("cpu"), torch.float32)
        counted = Operations(model.unet)
        with counted.counted(tile):
            model.denoise(torch.zeros(8, 4, 24, 24), 3.0, torch.zeros(8, 4, 24, 24), model.context(None), 8)
        counts.append(counted.of(tile))
    assert counts[0] < 0.8 * counts[1]
