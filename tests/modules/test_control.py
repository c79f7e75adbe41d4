"""The control: nothing at its start, its UNet's own features inside, its files and DiffBIR's."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.support.tensors import randn
from vsr_ops.checkpoints.control_keymap import control_map, infer_config
from vsr_ops.errors import CheckpointError, SettingError
from vsr_ops.modules.control import Control, check_strength, load_control, write_control

LITE: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": (1, 2),
    "use_linear_projection": True,
}
#: Heads as Stable Diffusion 2 and 1.5 have them, for what can be told from tensors alone.
SD2 = LITE | {"block_out_channels": (64, 128), "attention_head_dim": (1, 2)}
SD1 = LITE | {"block_out_channels": (32, 64), "attention_head_dim": 8, "use_linear_projection": False}
FRAMES, SIDE = 3, 8


def inputs(height: int = SIDE, width: int = SIDE) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z, hint = randn(2, FRAMES, 4, height, width)
    return z, torch.tensor([1, 400, 999]), randn(FRAMES, 5, 24, seed=1), hint


def unet(config: dict[str, Any] = LITE) -> UNet2DConditionModel:
    torch.manual_seed(7)
    return UNet2DConditionModel(**config).eval().requires_grad_(False)


def acting(config: dict[str, Any] = LITE) -> Control:
    """A control whose every weight does something."""
    torch.manual_seed(8)
    made = Control(config).eval().requires_grad_(False)
    for parameter in made.parameters():
        if parameter.ndim == 1 or not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return made


def outputs(control: Control) -> list[Tensor]:
    skips, middle = control(*inputs())
    return [*skips, middle]


def original(control: Control, prefix: str = "") -> dict[str, Tensor]:
    """A control's tensors under the names that DiffBIR publishes."""
    state = control.state_dict()
    return {prefix + old: state[new] for old, new in control_map(control.config).items()}


# --- What it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
def test_a_fresh_one_changes_nothing(size: tuple[int, int]) -> None:
    model = unet()
    z, times, context, hint = inputs(*size)
    skips, middle = Control.of(model)(z, times, context, hint)
    with_it = model(
        z, times, context, down_block_additional_residuals=skips, mid_block_additional_residual=middle
    ).sample
    assert torch.equal(with_it, model(z, times, context).sample)


def test_inside_it_is_the_unets_own_encoder() -> None:
    """With identities for zero convolutions it gives what the UNet's own blocks make, to the last bit."""
    model = unet()
    control = Control.of(model)
    for conv in (*control.controlnet_down_blocks, control.controlnet_mid_block):
        nn.init.dirac_(conv.weight)
    seen: list[Tensor] = []
    hooks = [model.conv_in, *(block for block in model.down_blocks), model.mid_block]
    for module in hooks:
        module.register_forward_hook(lambda _, __, out: seen.extend(out[1] if isinstance(out, tuple) else [out]))
    z, times, context, hint = inputs()
    model(z, times, context)
    skips, middle = control(z, times, context, hint)
    assert len(seen) == len(skips) + 1
    for found, expected in zip([*skips, middle], seen, strict=True):
        assert torch.equal(found, expected)


def test_the_hint_times_and_tokens_are_seen() -> None:
    control = acting()
    z, times, context, hint = inputs()
    whole = control(z, times, context, hint)[1]
    assert not torch.allclose(control(z, times, context, hint.flip(0))[1], whole)
    assert not torch.allclose(control(z, times.flip(0), context, hint)[1], whole)
    assert not torch.allclose(control(z, times, context.flip(0), hint)[1], whole)
    # One number and one row of tokens stand for every frame's.
    one = control(z, 400, context[:1], hint)[1]
    assert torch.equal(one, control(z, torch.full((FRAMES,), 400), context[:1].expand(FRAMES, -1, -1), hint)[1])
    # A frame is alone in its batch.
    torch.testing.assert_close(control(z[1:2], times[1:2], context[1:2], hint[1:2])[1], whole[1:2], rtol=0, atol=1e-4)


def test_the_inputs_precision_comes_out() -> None:
    control = acting().to(torch.bfloat16)
    assert {out.dtype for out in outputs(control)} == {torch.float32}
    assert (
        max(float((a - b).abs().max() / b.std()) for a, b in zip(outputs(control), outputs(acting()), strict=True)) < 1
    )


def test_gradients_reach_every_weight() -> None:
    control = acting().requires_grad_(True)
    torch.stack([out.square().mean() for out in outputs(control)]).sum().backward()
    without = [
        name for name, parameter in control.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert without == []


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"addition_embed_type": "text_time"}, "addition_embed_type"),
        ({"in_channels": 9, "out_channels": 4}, "9 input and 4 output"),
        ({"mid_block_type": None}, "UNetMidBlock2DCrossAttn"),
    ],
)
def test_a_unet_of_another_kind_is_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        Control(LITE | config)


def test_settings_are_checked() -> None:
    control = acting()
    control.check_fits([32, 64], 24)
    control.check_fits([32, 64], 24, [1, 1])
    for other in (([32, 96], 24), ([32, 64], 24, [2, 2]), ([32, 64], 1024, [1, 1])):
        with pytest.raises(SettingError, match=r"widths \[32, 64\], blocks \[1, 1\] and context 24, the MODEL has"):
            control.check_fits(*other)
    for strength in (-0.1, 10.1, float("nan")):
        with pytest.raises(SettingError, match="control strength is"):
            check_strength(strength)
    check_strength(0.0)


# --- Files ------------------------------------------------------------------------------------------------------------


def test_its_own_file_holds_all_of_it(tmp_path: Path) -> None:
    control = acting().half().float()
    write_control(tmp_path / "c.safetensors", control, "nothing")
    loaded = load_control(tmp_path / "c.safetensors")
    assert loaded.config == control.config
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    for found, expected in zip(outputs(loaded), outputs(control), strict=True):
        assert torch.equal(found, expected)


def test_diffbirs_names_and_shapes_are_all_there() -> None:
    """Of its ControlNet at its published configuration: 324 tensors of 363 153 280 numbers, taken from its own code."""
    config = {
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "transformer_layers_per_block": 1,
        "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    }
    with torch.device("meta"):
        control = Control(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in original(control).items()}
    assert len(shapes) == len(control.state_dict()) == 324
    assert sum(parameter.numel() for parameter in control.parameters()) == 363_153_280
    text = "\n".join(f"{name} {shape}" for name, shape in sorted(shapes.items()))
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "24f1f187561c9cfa28daba8d3ba10558e46883aa997a053278dcbac9a87da0dc"
    )
    inferred = infer_config(shapes)
    assert inferred["attention_head_dim"] == [5, 10, 20, 20]
    assert inferred["block_out_channels"] == [320, 640, 1280, 1280] and inferred["cross_attention_dim"] == 1024


@pytest.mark.parametrize("name", ["v2.pth", "v1.ckpt", "v2.safetensors"])
@pytest.mark.parametrize("config", [SD2, SD1], ids=["linear", "convolutions"])
def test_diffbirs_files_load(tmp_path: Path, config: dict[str, Any], name: str) -> None:
    control, path = acting(config), tmp_path / name
    if name == "v1.ckpt":
        rest = {"model.diffusion_model.input_blocks.0.0.weight": randn(64, 4, 3, 3), "first_stage_model.x": randn(1)}
        torch.save({"state_dict": original(control, "control_model.") | rest, "global_step": 3}, path)
    elif path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in original(control).items()}, path)
    else:
        torch.save(original(control), path)
    for found, expected in zip(outputs(load_control(path)), outputs(control), strict=True):
        assert torch.equal(found, expected)


class _Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("it ran",))


def test_a_pickle_that_would_run_something_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": original(acting(SD2)), "more": _Runs()}, tmp_path / "v2.pth")
    with pytest.raises(CheckpointError, match="not a pickle of tensors alone"):
        load_control(tmp_path / "v2.pth")
    assert capsys.readouterr().out == ""


PICTURES = {
    "control_model.input_hint_block.0.weight": (16, 3, 3, 3),
    "control_model.zero_convs.0.0.weight": (8, 8, 1, 1),
}
FIRST, ZERO = {"input_blocks.0.0.weight": (8, 4, 3, 3)}, {"zero_convs.0.0.weight": (8, 8, 1, 1)}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (PICTURES, "looks like a ControlNet whose hint is a picture"),
        ({"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)}, "looks like a ControlNet whose hint is a pict"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3)}, "looks like a Stable Diffusion checkpoint"),
        ({"lora_unet_down.lora_up.weight": (8, 4)}, "looks like a LoRA"),
        ({**FIRST, "output_blocks.0.0.in_layers.0.weight": (8,)}, "looks like a UNet"),
        ({**FIRST, **ZERO}, "takes 4 channels, expected 8"),
        (ZERO, "takes no channels, expected 8"),
    ],
)
def test_another_kind_of_file_is_named(tmp_path: Path, tensors: dict[str, Any], words: str, suffix: str) -> None:
    path, stored = tmp_path / f"x.{suffix}", {key: torch.zeros(shape) for key, shape in tensors.items()}
    if suffix == "pth":
        torch.save(stored, path)
    else:
        save_file(stored, path)
    with pytest.raises(CheckpointError, match=words):
        load_control(path)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path, whole = tmp_path / "v2.safetensors", original(acting(SD2))
    for change, words in (
        ({"zero_convs.1.0.weight": None}, r"1 missing \(zero_convs.1.0.weight\)"),
        ({"zero_convs.9.0.weight": randn(1)}, r"1 unexpected \(zero_convs.9.0.weight\)"),
        ({"time_embed.0.bias": randn(3)}, r"of the wrong shape \(time_embed.0.bias"),
        ({"middle_block.1.proj_in.weight": None}, "lacks middle_block.1.proj_in.weight"),
        (
            {"input_blocks.1.0.out_layers.3.weight": randn(48, 64, 3, 3)},
            "attention is .* wide, expected multiples of 64",
        ),
    ):
        changed = {key: value.contiguous() for key, value in (whole | change).items() if value is not None}
        save_file(changed, path)
        with pytest.raises(CheckpointError, match=words):
            load_control(path)
    with pytest.raises(CheckpointError, match="no such file"):
        load_control(tmp_path / "none.pth")
    save_file({"x": randn(1)}, path, metadata={"vsr.kind": "refiner", "vsr.version": "1", "vsr.config": "{}"})
    with pytest.raises(CheckpointError, match="weights of kind 'refiner', expected kind 'control'"):
        load_control(path)
    for config in ('{"block_out_channels": 3}', '{"down_block_types": ["Nothing"]}'):
        save_file({"x": randn(1)}, path, metadata={"vsr.kind": "control", "vsr.version": "1", "vsr.config": config})
        with pytest.raises(CheckpointError, match="is no control's"):
            load_control(path)
