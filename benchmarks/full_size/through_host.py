"""One method's step through a real ComfyUI in this process: its own SVD at full size, patched by the pack's nodes."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel
from torch import Tensor

from benchmarks.common import randomize
from benchmarks.full_size import report
from benchmarks.full_size.measure import Limits
from benchmarks.full_size.report import Line
from benchmarks.full_size.rows import PLAIN, ROWS, Row, Taken, Traffic, forget_peak, now, peak
from vsr_ops.sampling.calls import calls
from vsr_ops.sampling.guidance import COND
from vsr_ops.sampling.tiling import TilePlan, TileSize

ROOT = Path(__file__).resolve().parents[2]
#: What the host makes of a folder's name when it imports the pack: no identifier.
NAME = "custom_nodes/coherent_vsr"
#: diffusers' defaults, which are stock SVD's, in the words of a file of the pack.
STOCK_UNET: dict[str, Any] = {
    "in_channels": 8,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal",) * 3 + ("DownBlockSpatioTemporal",),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "num_attention_heads": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 768,
}


@dataclass(frozen=True)
class Pack:
    """The pack inside a host: its package of host code, its nodes by id, and the host's version."""

    host: ModuleType
    nodes: dict[str, Any]
    version: str


def start_host(folder: Path, device: torch.device) -> Pack:
    """Loads the host in `folder` into this process, and the pack as the host loads it. Once a process."""
    sys.path.insert(0, str(folder))
    flags = ["--cpu"] if device.type == "cpu" else []
    arguments, base = sys.argv, tempfile.mkdtemp()
    sys.argv = ["main.py", *flags, "--use-pytorch-cross-attention", "--base-directory", base]
    try:
        importlib.import_module("comfy.options").enable_args_parsing()
        importlib.import_module("comfy.sd")
        importlib.import_module("nodes")
    finally:
        sys.argv = arguments
    spec = importlib.util.spec_from_file_location(NAME, ROOT / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    return loaded(module, importlib.import_module("comfyui_version").__version__)


def loaded(module: ModuleType, version: str) -> Pack:
    """The pack of its root module."""
    classes = asyncio.run(asyncio.run(module.comfy_entrypoint()).get_node_list())
    return Pack(
        sys.modules[f"{module.__name__}.nodes.host"], {each.define_schema().node_id: each for each in classes}, version
    )


def random_svd(pack: Pack, unet: dict[str, Any]) -> Any:
    """The host's own SVD as a MODEL, in the precision that the host chooses for one of its size; `unet` is what is not
    as stock SVD's."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in UNetSpatioTemporalConditionModel(**unet).parameters())
    load = sys.modules[f"{pack.host.__name__}.load"]
    architecture = load.svd({"unet": {**STOCK_UNET, **unet}})
    return load.placed(*architecture, lambda module, dtype: randomize(module), False, parameters)


def patched(pack: Pack, model: Any, row: Row, tile: TileSize) -> Any:
    """The MODEL from the pack's node for tiles, with a row's propagation."""
    propagation = "+".join(row.kinds) or "none"
    mode = "lagged" if row.lagged else "synchronous"
    node = pack.nodes["VSRTiledDiffusion"]
    size = (tile.height, tile.width, tile.frames)
    return node.execute(model, *size, 0.5, propagation, mode, 0, 4, 1, "ends", 0.0, 1.0, 1).args[0]


def guided(pack: Pack, model: Any, row: Row, lr: Tensor, width: int) -> Any:
    """The guider of a row, from the pack's nodes, or the host's own CFG; `lr` is what the video is conditioned on."""
    tokens = torch.zeros(1, 1, width)
    micro: dict[str, Any] = {"motion_bucket_id": 127, "fps": pack.host.fps_key(8), "augmentation_level": 0.0}
    scenes = {"vsr_cuts": (), "vsr_frames": lr.shape[0]}
    positive = [[tokens, {**micro, "concat_latent_image": lr, **scenes}]]
    negative = [[tokens, {**micro, "concat_latent_image": torch.zeros_like(lr)}]]
    if row.guidance == "dssag":
        second = None if row.cfg == 1 else negative
        return pack.nodes["VSRDSSAGGuider"].execute(model, positive, row.scale or 1.0, 0.5, "ends", second).args[0]
    if row.guidance == "pag":
        return pack.nodes["VSRPAGGuider"].execute(model, positive, 1.0, row.scale, "middle").args[0]
    if row.guidance == "sag":
        return pack.nodes["VSRSAGGuider"].execute(model, positive, 1.0, row.scale).args[0]
    return pack.host.guider(model, positive, negative, row.cfg or 1.0)


@dataclass
class Watch:
    """Wrappers inside the pack's own: the time of a step's guidance, and of the UNet calls in it that are evaluated."""

    plan: TilePlan
    row: Row
    limits: Limits
    device: torch.device
    traffic: Traffic | None = None
    step: int = -1
    seconds: float = 0.0
    evaluated: float = 0.0
    tiles: int = 0
    called: int = 0

    def predict_noise(self, executor: Any, x: Tensor, sigma: Tensor, *rest: Any, **more: Any) -> Any:
        """One step: the last one counts."""
        self.step, self.evaluated, self.tiles, self.called = self.step + 1, 0.0, 0, 0
        begun = now(self.device)
        out = executor(x, sigma, *rest, **more)
        self.seconds = now(self.device) - begun
        return out

    def apply_model(self, executor: Any, x: Tensor, *rest: Any, **more: Any) -> Any:
        """One call of the UNet. Of a pass only the last ones are evaluated where there is a limit."""
        count = len(list(calls(self.plan, self.row.timed, COND, 1, synchronous=self.row.synchronous)))
        place = self.called % count
        self.called += 1
        limit = self.limits.calls
        if limit is not None and (place < count - limit or self.step < self.row.steps - 1):
            return torch.zeros_like(x)
        begun = now(self.device)
        with self.traffic if self.traffic is not None and self.step == self.row.steps - 1 else nullcontext():
            out = executor(x, *rest, **more)
        self.evaluated += now(self.device) - begun
        self.tiles += x.shape[0] // self.plan.windows[0].span.length
        return out

    def taken(self) -> Taken:
        """What the step took."""
        times = self.row.passes * self.plan.tiles / self.tiles
        traffic, seconds = self.traffic, self.seconds + self.evaluated * (times - 1)
        moved = None if traffic is None else (round(traffic.sent * times), round(traffic.received * times))
        return Taken(seconds, peak(self.device), moved, self.row.passes, False)


@torch.no_grad()
def host_step(pack: Pack, model: Any, plan: TilePlan, row: Row, limits: Limits, traffic: Traffic | None) -> Taken:
    """The last step of a row through the host's own sampling, from noise."""
    kinds = importlib.import_module("comfy.patcher_extension").WrappersMP
    size = plan.tile_size(0)
    lr = torch.randn(plan.frames, 4, plan.height, plan.width, generator=torch.Generator().manual_seed(1))
    width = model.model.model_config.unet_config["context_dim"]
    guider = guided(pack, patched(pack, model, row, size), row, lr, width)
    watch = Watch(plan, row, limits, model.load_device, traffic)
    # Last of all, so that they are inside the pack's.
    guider.model_patcher.add_wrapper_with_key(kinds.PREDICT_NOISE, "benchmark", watch.predict_noise)
    guider.model_patcher.add_wrapper_with_key(kinds.APPLY_MODEL, "benchmark", watch.apply_model)
    forget_peak(model.load_device)
    out = pack.host.sample(guider, {"samples": torch.zeros_like(lr)}, 0, row.steps, "euler", "karras", 1.0)["samples"]
    if not bool(torch.isfinite(out).all()):
        raise ValueError("the host's latent holds NaN or infinity")
    return watch.taken()


def host_lines(
    pack: Pack, model: Any, plan: TilePlan, names: tuple[str, ...], limits: Limits, label: str, headless: list[Line]
) -> list[Line]:
    """The rows through the host; their ratios are to the headless row of the same name, in `headless`."""
    precision = str(model.model.get_dtype()).removeprefix("torch.")
    label = f"{label}, {precision}, ComfyUI {pack.version}"
    lines: list[Line] = []
    # Loads the model.
    host_step(pack, model, plan, ROWS[PLAIN], replace(limits, calls=1), None)
    for name in names:
        row = ROWS[name]
        try:
            traffic = Traffic() if model.load_device.type != "cpu" else None
            first = host_step(pack, model, plan, row, limits, traffic)
            times = [] if traffic is None else [host_step(pack, model, plan, row, limits, None) for _ in range(2)]
        except Exception as error:
            lines.append(report.failure(f"{label}: {row.title}", error))
            continue
        seconds = [each.seconds for each in times] or [first.seconds]
        alone = next((line for line in headless if line.what.endswith(f": {row.title}") and line.seconds), None)
        against = "" if alone is None else f"{median(seconds) / float(alone.seconds):.3f} of headless"
        counted = replace(first, seconds=median(seconds))
        lines.append(report.row_line(label, row, [counted], against, plan.frames, None))
    return lines
