"""Control: a trainable copy of a Stable Diffusion UNet's encoder and middle block that sees the low-resolution video.

Its input is `[z_t ; E(DCM(lq))]`, its outputs go through 1x1 convolutions that start at zero into the skips of the
UNet's decoder (SDATC, equation 5; DiffBIR's construction, whose published files load). A fresh one changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..checkpoints import control_keymap
from ..checkpoints.module_file import fill, read_module, write_module
from ..checkpoints.safefile import PICKLE_SUFFIXES, open_safely, read_pickle, refuse_differences
from ..errors import CheckpointError, SettingError
from ..system.no_data import without_data
from ..weights import bundled

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

KIND = "control"
#: The weights that come with the pack, made for its lite Stable Diffusion.
LITE_CONTROL = bundled("control_lite")
#: The host's own bound.
STRONGEST = 10.0

#: The arguments of diffusers' UNet2DConditionModel that shape its encoder, with its own defaults; beside the block
#: types, lists may be one number for all levels.
DEFAULTS: dict[str, Any] = {
    "in_channels": 4,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
    "cross_attention_dim": 1280,
    "use_linear_projection": False,
    "upcast_attention": False,
    "only_cross_attention": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
}
#: What would make a UNet take more than a noisy latent, a noise level and tokens.
_MORE_INPUTS = (
    *("class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim", "encoder_hid_dim_type"),
    *("time_cond_proj_dim", "num_attention_heads"),
)


class Control(nn.Module):
    """The encoder and middle block of diffusers' UNet2DConditionModel on twice its input channels, and the zero
    convolutions: one for each skip, one for the middle.

    `config` holds keyword arguments of that class, as the UNet itself has them (`in_channels` the UNet's own, 4);
    those of its decoder are passed over. Raises SettingError for a UNet that cannot have a control.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = shaping(config)
        unet = _empty_unet(self.config)
        self.channels: int = self.config["in_channels"]
        self.conv_in = nn.Conv2d(2 * self.channels, self.config["block_out_channels"][0], 3, padding=1, device="meta")
        self.time_proj: nn.Module = unet.time_proj
        self.time_embedding: nn.Module = unet.time_embedding
        self.down_blocks = cast("nn.ModuleList", unet.down_blocks)
        self.mid_block = cast("nn.Module", unet.mid_block)
        widths = _skip_widths(self.down_blocks, self.config["block_out_channels"][0])
        self.controlnet_down_blocks = nn.ModuleList(nn.Conv2d(width, width, 1, device="meta") for width in widths)
        self.controlnet_mid_block = nn.Conv2d(widths[-1], widths[-1], 1, device="meta")
        self._materialise()

    @classmethod
    def of(cls, unet: UNet2DConditionModel) -> Control:
        """A copy of a UNet's encoder, on its device and dtype: the hint's channels and the zero convolutions zero."""
        made = cls(cast("Mapping[str, Any]", unet.config))
        ours = made.state_dict()
        copied = {key: value.detach() for key, value in unet.state_dict().items() if key in ours}
        first = copied["conv_in.weight"]
        copied["conv_in.weight"] = torch.cat([first, torch.zeros_like(first)], 1)
        made.load_state_dict(ours | copied)
        return made.to(first.device, first.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The precision of its weights."""
        return self.conv_in.weight.dtype

    @property
    def widths(self) -> list[int]:
        """Channels of the UNet's levels."""
        return list(self.config["block_out_channels"])

    @property
    def context_width(self) -> int:
        """Width of the tokens that its cross-attention takes."""
        return int(self.config["cross_attention_dim"])

    def forward(
        self, z: Tensor, timestep: Tensor | float, context: Tensor, hint: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """What is added to the decoder's skips, in diffusers' order (down_block_additional_residuals), and to the
        middle, in the dtype of `z`.

        `z` `(frames, 4, h, w)` is scaled as the UNet takes it, `timestep` a number or one per frame, `context`
        `(frames or 1, tokens, width)`, `hint` `(frames, 4, h, w)` latents of the upscaled video times the VAE's
        scaling factor.
        """
        given, dtype = z.dtype, self.dtype
        times = torch.as_tensor(timestep, device=z.device).reshape(-1).expand(z.shape[0])
        embedding = self.time_embedding(self.time_proj(times).to(dtype))
        tokens = context.to(z.device, dtype).expand(z.shape[0], -1, -1)
        x = self.conv_in(torch.cat([z.to(dtype), hint.to(z.device, dtype)], 1))
        skips = [x]
        for block in self.down_blocks:
            more = {"encoder_hidden_states": tokens} if getattr(block, "has_cross_attention", False) else {}
            x, made = block(hidden_states=x, temb=embedding, **more)
            skips += made
        x = self.mid_block(x, embedding, encoder_hidden_states=tokens)
        added = [conv(skip).to(given) for conv, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        return added, self.controlnet_mid_block(x).to(given)

    @property
    def blocks(self) -> list[int]:
        """Residual blocks in each of the UNet's levels."""
        layers = self.config["layers_per_block"]
        return [layers] * len(self.widths) if isinstance(layers, int) else list(layers)

    def check_fits(self, widths: list[int], context: int, blocks: list[int] | None = None) -> None:
        """Raises SettingError unless these levels' widths (and residual blocks), and tokens of this width, are those
        of its own UNet."""
        blocks = self.blocks if blocks is None else blocks
        if (widths, blocks, context) != (self.widths, self.blocks, self.context_width):
            raise SettingError(
                f"the control is made for a UNet of widths {self.widths}, blocks {self.blocks} and context"
                f" {self.context_width}, the MODEL has widths {widths}, blocks {blocks} and context {context}: give the"
                " one it was trained on"
            )

    def _materialise(self) -> None:
        """Real memory and a fresh initialisation, unless the caller builds on `meta` himself."""
        device = torch.get_default_device()
        self.to_empty(device=device)
        if device.type != "meta":
            for module in self.modules():
                if callable(reset := getattr(module, "reset_parameters", None)):
                    reset()
        for conv in (*self.controlnet_down_blocks, self.controlnet_mid_block):
            for parameter in conv.parameters():
                nn.init.zeros_(parameter)


def check_strength(strength: float) -> None:
    """Raises SettingError for a strength outside [0, 10]."""
    if not 0 <= strength <= STRONGEST:
        raise SettingError(
            f"control strength is {strength}: expected 0 (off) to {STRONGEST:g}; 1 is what it was trained at"
        )


def shaping(config: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a UNet's keyword arguments that shape its encoder, complete and ready for JSON.

    Raises SettingError for a UNet that takes more than a latent, a noise level and tokens (SDXL, inpainting, SVD).
    """
    more = [name for name in _MORE_INPUTS if config.get(name) is not None]
    if more:
        raise SettingError(
            f"a UNet with {', '.join(more)} takes more inputs than a control has: expected Stable Diffusion 1.5 or 2.1"
        )
    kept: dict[str, Any] = {}
    for name, default in DEFAULTS.items():
        value: Any = config.get(name, default)
        kept[name] = list(cast("tuple[Any, ...]", value)) if isinstance(value, tuple) else value
    out = config.get("out_channels", kept["in_channels"])
    if kept["in_channels"] != out:
        raise SettingError(
            f"a UNet of {kept['in_channels']} input and {out} output channels takes more than a latent: expected Stable"
            " Diffusion 1.5 or 2.1, not its inpainting or video kin"
        )
    if config.get("mid_block_type", "UNetMidBlock2DCrossAttn") != "UNetMidBlock2DCrossAttn":
        raise SettingError(f"mid_block_type {config['mid_block_type']!r}: expected UNetMidBlock2DCrossAttn")
    return kept


def _empty_unet(config: Mapping[str, Any]) -> Any:
    """The whole UNet without memory, of which the encoder is kept."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    kwargs = {key: tuple(cast("list[Any]", v)) if isinstance(v, list) else v for key, v in config.items()}
    up = tuple(str(name).replace("Down", "Up") for name in reversed(config["down_block_types"]))
    with without_data():
        return cast("Any", UNet2DConditionModel)(**kwargs, up_block_types=up)


def _skip_widths(blocks: nn.ModuleList, first: int) -> list[int]:
    widths = [first]
    for block in blocks:
        parts = cast("Any", block)
        widths += [resnet.out_channels for resnet in parts.resnets]
        widths += [down.out_channels for down in parts.downsamplers or ()]
    return widths


# --- Files ------------------------------------------------------------------------------------------------------------


def load_control(path: Path | str, device: torch.device | str = "cpu") -> Control:
    """The control at `path` ("lite": the bundled one), float32: a file of this pack, or DiffBIR's.

    DiffBIR's may be a pickle, of which tensors alone are read, and a whole training checkpoint. Raises CheckpointError
    for a file that is missing, damaged, of another kind, or has no or no whole control.
    """
    file = LITE_CONTROL if str(path) == "lite" else Path(path)
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; give a control's .safetensors, or DiffBIR's v2.pth")
    if file.suffix.lower() in PICKLE_SUFFIXES:
        model = from_diffbir(file, read_pickle(file, control_keymap.WANTED))
    else:
        with open_safely(file) as source:
            if "vsr.kind" in source.metadata:
                model = _own(file)
            else:
                wanted = [key for key in source.shapes if control_keymap.OWN.match(key)]
                found = {key: source.tensor(key, torch.float32) for key in wanted}
                model = from_diffbir(file, found, [*source.shapes])
    return model.to(device).eval().requires_grad_(False)


def write_control(path: Path, control: Control, trained_on: str, notes: Mapping[str, str] | None = None) -> None:
    """Writes a control as a file that `load_control` reads, float16; `notes` join its metadata. Raises
    CheckpointError."""
    write_module(path, KIND, control.config, control.state_dict(), trained_on, notes=notes)


def _own(path: Path) -> Control:
    stored = read_module(path, KIND)
    try:
        model = _on_meta(stored.config)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: its configuration {stored.config} is no control's; get it again") from error
    fill(path, model, KIND, stored.tensors)
    return model


def from_diffbir(path: Path, tensors: Mapping[str, Tensor], names: list[str] | None = None) -> Control:
    """The control in DiffBIR's tensors. `path` and `names`, all of the file's (else those given), are for messages.

    Raises CheckpointError where there is none, or one of another construction.
    """
    found = {m[1]: value for key, value in tensors.items() if (m := control_keymap.OWN.match(key))}
    names = [*tensors] if names is None else names
    advice = "expected DiffBIR's ControlNet (v2.pth, v1_general.pth ...) or a control of this pack"
    # A ControlNet of pictures has zero convolutions too.
    pictures = any("input_hint_block." in name for name in names)
    if pictures or not any(key.startswith("zero_convs.") for key in found):
        raise CheckpointError(f"{path}: looks like {control_keymap.looks_like(names)}; {advice}")
    shapes = {key: tuple(value.shape) for key, value in found.items()}
    first = shapes.get("input_blocks.0.0.weight", ())
    if len(first) != 4 or first[1] != 8:
        has = f"{first[1]} channels" if len(first) == 4 else "no channels"
        raise CheckpointError(f"{path}: its first convolution takes {has}, expected 8 (latent and hint); {advice}")
    try:
        model = _on_meta(control_keymap.infer_config(shapes))
    except (KeyError, ValueError, IndexError) as error:
        what = f"lacks {error.args[0]}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{path}: {KIND} under original names: {what}; use an unmodified file") from error
    mapped = control_keymap.control_map(model.config)
    ours = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    refuse_differences(path, KIND, {old: ours[new] for old, new in mapped.items()}, shapes)
    fill(path, model, KIND, {new: found[old] for old, new in mapped.items()})
    return model


def _on_meta(config: Mapping[str, Any]) -> Control:
    """A control to be filled: no time goes into an initialisation."""
    with without_data():
        model = Control(config)
    return model.to_empty(device="cpu")
