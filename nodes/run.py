"""What one sampling run remembers, and the attention it puts into the host's: ComfyUI's data, none of its modules.

A run's state lives in a `Run` that this run's own copy of the model options refers to, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..vsr_ops.attention import Tempered, identity
from ..vsr_ops.errors import SettingError
from ..vsr_ops.guidance import COND, UNCOND, Branch, gamma_at, schedule_ends
from ..vsr_ops.layers import Layer
from ..vsr_ops.propagation import Call, Propagation, Step, TileRun, gather_tiles, step_at, step_index
from ..vsr_ops.tiling import Span, TilePlan, TileSize

#: Where the pack keeps its settings in a MODEL's transformer options, and the name of its hooks.
KEY = "coherent_vsr"


@dataclass(frozen=True)
class Tiles:
    """What `VSRTiledDiffusion` asks for; `tile` axes of 0 take the checkpoint's own."""

    tile: TileSize
    overlap: float
    propagation: Propagation
    sap_mode: str
    start: float = 0.0
    end: float = 1.0
    batch: int = 1


@dataclass(frozen=True)
class Perturbed:
    """A perturbed-attention guidance: its strength, its layers, and rho where it has a gamma."""

    scale: float
    layers: str
    rho: float = 0.5


def pack_settings(model_options: Mapping[str, Any]) -> dict[str, Any]:
    """What the pack's nodes and hooks have put into model options."""
    return model_options["transformer_options"][KEY]


def changed(model_options: dict[str, Any], **values: object) -> dict[str, Any]:
    """Model options with some of the pack's settings changed; the given ones stay as they are."""
    options = model_options["transformer_options"]
    return {**model_options, "transformer_options": {**options, KEY: {**options[KEY], **values}}}


def resolve_tile(tile: TileSize, own: TileSize) -> TileSize:
    """`tile` with the zeros filled from the checkpoint's own."""
    return TileSize(tile.height or own.height, tile.width or own.width, tile.frames or own.frames)


def sap_lagged(tiles: Tiles, plan: TilePlan, at_once: int) -> bool:
    """Whether SAP reads the last step's bank."""
    return at_once < len(plan.spatial) or tiles.sap_mode == "lagged"


@dataclass
class Run:
    """What one sampling run remembers. `order` counts the evaluations of one step, to keep nested ones apart; `warned`
    is whether the artist has been told of features between cells."""

    model: Any
    sigmas: list[float]
    layers: dict[str, Layer]
    plan: TilePlan
    tiles: Tiles | None
    propagation: Propagation
    batch: int = 1
    at_once: int = 1
    order: int = 0
    warned: bool = False
    passes: dict[tuple[object, ...], TileRun] = field(default_factory=dict)

    def gamma(self, sigma: float, rho: float) -> float:
        sampling = self.model.get_model_object("model_sampling")
        ends = schedule_ends(self.sigmas, float(sampling.sigma_max), float(sampling.sigma_min))
        return gamma_at(sigma, *ends, rho)

    def step(self, sigma: float) -> Step:
        index = step_index(self.sigmas, sigma)
        if self.tiles is None:
            return Step(index)
        sampling = self.model.get_model_object("model_sampling")
        first, last = (sampling.percent_to_sigma(share) for share in (self.tiles.start, self.tiles.end))
        acts = last <= sigma <= first
        return step_at(index, self.propagation.kinds) if acts else Step(index)


def check_options(guider: Any) -> None:
    """Raises SettingError for what a MODEL was given that VSR's patches cannot work with."""
    if guider.model_options.get("context_handler") is not None:
        raise SettingError(
            "this MODEL has context windows (Context Windows nodes): expected none, for VSR's patches need whole"
            " videos, and Tiled Diffusion (VSR) covers long ones; remove the context windows"
        )
    clones = guider.model_patcher.get_additional_models_with_key("multigpu")
    if clones or guider.model_options.get("multigpu_clones"):
        raise SettingError(
            "this MODEL is spread over several GPUs (MultiGPU CFG Split): expected one, for the tiles of a run hand on"
            " to each other what they found; take that node off"
        )


def check_run(guider: Any, shape: Sequence[int], latent: Tensor, width: int | None, svd: bool) -> None:
    """Raises SettingError for what cannot be sampled: `width` is what the UNet's cross-attention takes, and for SVD the
    host would resize, repeat or crop a conditioning silently."""
    check_options(guider)
    if bool(torch.isnan(latent).any()):
        raise SettingError("the LATENT holds NaN: expected finite numbers; check the node that made it")
    if len(shape) != 4:
        raise SettingError(
            f"the LATENT has shape {tuple(shape)}: expected frames as a batch, (frames, channels, height, width);"
            " encode the video with this MODEL's own VAE"
        )
    for name, conds in guider.conds.items():
        for cond in conds:
            tokens = cond.get("cross_attn")
            if tokens is not None and width is not None and tokens.shape[-1] != width:
                raise SettingError(
                    f"the {name} conditioning is {tokens.shape[-1]} wide, this MODEL takes {width}: expected one made"
                    " for it; encode text with the MODEL's own CLIP, or wire Null Prompt (VSR)"
                )
    if not svd:
        return
    frames, _, height, width = shape
    for name, conds in guider.conds.items():
        for cond in conds:
            concat = cond.get("concat_latent_image")
            if concat is None and name == "positive":
                raise SettingError(
                    "the positive conditioning has no concat latents: expected the LR video's; wire SVD Video"
                    " Conditioning (VSR) or SVD_img2vid_Conditioning into it"
                )
            if concat is not None and concat.shape[0] not in (1, frames):
                raise SettingError(
                    f"the {name} conditioning has {concat.shape[0]} frames, the LATENT {frames}: expected equal counts;"
                    " take both from one SVD Video Conditioning (VSR)"
                )
            if concat is not None and tuple(concat.shape[-2:]) != (height, width):
                raise SettingError(
                    f"the {name} conditioning is {concat.shape[-2]}x{concat.shape[-1]} latents, the LATENT"
                    f" {height}x{width}: expected equal sizes; take both from one SVD Video Conditioning (VSR)"
                )


def run_cuts(conds: Mapping[str, Any], frames: int) -> tuple[int, ...]:
    """Where the video's scenes change, as its conditioning says. Raises SettingError for that of a longer or shorter
    video."""
    for name, parts in conds.items():
        for cond in parts:
            if "vsr_cuts" not in cond:
                continue
            if cond.get("vsr_frames", frames) != frames:
                raise SettingError(
                    f"the {name} conditioning knows the scene cuts of {cond['vsr_frames']} frames, the LATENT has"
                    f" {frames}: expected the same video; cut the pictures before SVD Video Conditioning (VSR), Null"
                    " Prompt (VSR) and Encode Video (VSR), not the LATENT after them"
                )
            return tuple(cond["vsr_cuts"])
    return ()


def main_branches(
    settings: Mapping[str, Any], gamma: Callable[[float, float], float], sigma: float, cfg: bool
) -> list[Branch]:
    """Conditional and unconditional branch as CFG evaluates them; with CFG, DSSAG blurs the second (equation 9)."""
    branches = [COND, UNCOND]
    if cfg and (dssag := settings.get("dssag")) is not None:
        branches[1] = replace(UNCOND, attention=Tempered(gamma(sigma, dssag.rho)), layers=dssag.layers)
    if settings.get("sag") is not None:
        branches = [replace(branch, observe=True) for branch in branches]
    return branches


#: What ControlNets add to a UNet: for each stage, values in the order of the host's blocks, or nothing for a block.
Control = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Inputs:
    """What the host's `BaseModel.apply_model` takes beside its options: of a batch of branches, a branch, or a call."""

    x: Tensor
    t: Tensor
    concat: Tensor | None
    context: Tensor | None
    rest: dict[str, Any]
    control: Control | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """Everything that is per frame changed alike."""

        def each(value: Any) -> Any:
            per_frame = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == self.x.shape[0]
            return change(value) if per_frame else value

        rest = {name: each(value) for name, value in self.rest.items()}
        control = None if self.control is None else _each_control(self.control, each)
        return Inputs(each(self.x), each(self.t), each(self.concat), each(self.context), rest, control)

    def tiles(self, plan: TilePlan, call: Call) -> Inputs:
        """The share of one call: its window's frames, and of a picture its tiles."""

        def cut(value: Tensor) -> Tensor:
            if value.ndim == 4 and value.shape[-2:] == self.x.shape[-2:]:
                return gather_tiles(plan, call, value)
            window = value[plan.windows[call.window].span.slice]
            return window.repeat(len(call.tiles), *(1,) * (value.ndim - 1))

        inputs = replace(self, control=None).map(cut)
        if self.control is not None:
            own = _each_control(self.control, lambda value: cut_features(plan, call, value))
            inputs = replace(inputs, control=own)
        if "num_video_frames" not in inputs.rest:
            return inputs
        return replace(inputs, rest={**inputs.rest, "num_video_frames": call.frames})


def _each_control(control: Control, change: Callable[[Any], Any]) -> dict[str, list[Any]]:
    """New lists of changed values: the host's UNet takes them off the lists that it is given."""
    return {stage: [value if value is None else change(value) for value in values] for stage, values in control.items()}


def cut_features(plan: TilePlan, call: Call, value: Tensor) -> Tensor:
    """A call's share `(tiles*frames, c, rows, cols)` of a ControlNet's features for one branch's whole frames,
    `(frames or 1, c, ceil(height/k), ceil(width/k))`, k a power of 2, or 1 x 1 where they have no place.

    Cell i of a level lies at latent i*k. Where a tile's start is no multiple of k, its cells are interpolated between
    the two on each side. Raises SettingError for features of another size.
    """
    if plan.tiles == 1:
        return value
    if value.shape[0] not in (1, plan.frames):
        raise SettingError(
            f"a ControlNet gave features of {value.shape[0]} frames for {plan.frames}: expected one for each; give"
            " Apply ControlNet the whole video"
        )
    window = value.expand(plan.frames, *value.shape[1:])[plan.windows[call.window].span.slice]
    if value.shape[-2:] == (1, 1):
        return window.repeat(len(call.tiles), 1, 1, 1)
    k = _shrink(plan, *value.shape[-2:])
    tiles = (plan.spatial[m] for m in call.tiles)
    return torch.cat([_cells(_cells(window, -2, row, k), -1, col, k) for row, col in tiles])


def _shrink(plan: TilePlan, rows: int, cols: int) -> int:
    for k in (1, 2, 4, 8, 16, 32):
        if (-(-plan.height // k), -(-plan.width // k)) == (rows, cols):
            return k
    raise SettingError(
        f"a ControlNet gave features of {rows}x{cols} for {plan.height}x{plan.width} latents: expected 1/1, 1/2,"
        " 1/4 ... of them, which tiles can be cut from; use one made for this MODEL, or sample without tiles"
    )


def _cells(value: Tensor, axis: int, span: Span, k: int) -> Tensor:
    """A span's cells along one axis of features k times smaller than the latents."""
    first, between = divmod(span.start, k)
    near = value.narrow(axis, first, -(-span.length // k))
    if between == 0:
        return near
    places = torch.arange(first + 1, first + 1 + near.shape[axis], device=value.device)
    following = value.index_select(axis, places.clamp(max=value.shape[axis] - 1))
    return torch.lerp(near, following, between / k)


def attention_override(
    run: TileRun, call: Call, layers: Mapping[str, Layer], inner: Callable[..., Tensor] | None
) -> Callable[..., Tensor]:
    """The host's attention with ours in the layers where it acts, around the override that was there before."""
    seen: set[str] = set()

    def override(func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        def proceed(*args: Any) -> Tensor:
            return func(*args, **kwargs) if inner is None else inner(func, *args, **kwargs)

        layer = _layer(layers, seen, kwargs.get("transformer_options") or {}, args)
        if layer is None or not run.acts(call, layer):
            return proceed(*args)
        q, k, v, heads, *rest = args
        own = call.branch.attention is identity and call.branch.layers in layer.places
        check_queries(q, k, kwargs["transformer_options"].get("patches", {}).get("attn1_patch", ()), own)
        split = "b n (h d) -> b h n d"

        def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (rearrange(z, "b h n d -> b n (h d)") for z in (q, k, v))
            return rearrange(proceed(q, k, v, heads, *rest), split, h=heads)

        out = run.attend(call, layer, *(rearrange(z, split, h=heads) for z in (q, k, v)), fused)
        return rearrange(out, "b h n d -> b n (h d)")

    return override


def _layer(
    layers: Mapping[str, Layer], seen: set[str], options: Mapping[str, Any], args: Sequence[Any]
) -> Layer | None:
    """The spatial self-attention layer that is asked for attention now, if it is one.

    A block's spatial layer and its temporal one go by one name and can have one shape; the spatial one comes first.
    """
    block, shape = options.get("block"), options.get("activations_shape")
    if block is None or shape is None or len(args) < 4:
        return None
    name = f"{block[0]}.{block[1]}.{options.get('block_index', 0)}"
    q, k = args[0], args[1]
    # By its keys: other packs' patches leave these, and give fewer queries (ToMe) or queries in windows (HyperTile).
    spatial = k.ndim == 3 and (k.shape[0], k.shape[1]) == (shape[0], shape[2] * shape[3]) and q.shape[2] == k.shape[2]
    if name in seen or not spatial:
        return None
    seen.add(name)
    return layers.get(name)


def check_queries(q: Tensor, k: Tensor, patches: Sequence[Any], each_its_own: bool) -> None:
    """Raises SettingError for queries `(b, n, c)` over keys `(b, m, c)` that another pack's `patches` have cut so that
    neither propagation nor guidance can act: those of another batch, and fewer where each token sees `each_its_own`, as
    under PAG. Else fewer are as good as all: what is appended, and a temperature, concern the keys."""
    if q.shape[0] == k.shape[0] and (q.shape[1] == k.shape[1] or not each_its_own):
        return
    names = ", ".join(sorted({str(getattr(patch, "__qualname__", patch)).split(".")[0] for patch in patches}))
    raise SettingError(
        f"a patch of this MODEL ({names or 'of its attention'}) asks with {q.shape[0]} x {q.shape[1]} queries over"
        f" {k.shape[0]} x {k.shape[1]} keys: expected equal ones, or VSR's SAP, TAP and guidance could not act; take"
        " that node off (HyperTile saves nothing in tiles; ToMe goes with all but PAG)"
    )
