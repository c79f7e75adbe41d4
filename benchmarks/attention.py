"""DSSAG's attention against plain attention: time and peak memory.

One self-attention layer as it runs in the UNet (query, key and value projections, attention, output projection, through
`PatchedAttention`) at the shape of the UNet's first and last layers; and the attention alone, from ready Q, K and V.

    python -m benchmarks.attention --size full
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from types import SimpleNamespace
from typing import Any, cast

import torch
from diffusers.models.attention_processor import Attention
from einops import rearrange
from torch import Tensor

from benchmarks.common import MIB, Options, heading, interleaved, parser, peak_bytes, randomize, ratio, read, table
from training.tasks.svd import UNET_LITE
from vsr_ops.backbones.attention import PatchedAttention
from vsr_ops.backbones.svd import SVD
from vsr_ops.sampling.attention import SelfAttention, Tempered, plain
from vsr_ops.sampling.calls import Call
from vsr_ops.sampling.guidance import Branch
from vsr_ops.sampling.layers import Layer
from vsr_ops.sampling.propagation import Propagation, TileRun
from vsr_ops.sampling.schedule import Step
from vsr_ops.sampling.tiling import plan_tiles
from vsr_ops.system.allocator import keep_freed

#: Width and heads of the layers at the UNet's own resolution.
SHAPES = {"full": (320, 5), "lite": (UNET_LITE["block_out_channels"][0], UNET_LITE["num_attention_heads"][0])}
VARIANTS: dict[str, SelfAttention] = {
    "plain": plain,
    "DSSAG, gamma 1": Tempered(1.0),
    "DSSAG, gamma 0.5": Tempered(0.5),
}
TIME_TARGET, MEMORY_TARGET = 1.05, 1.02


def layer_work(options: Options, hidden: Tensor) -> dict[str, Callable[[], object]]:
    """The whole layer, by variant."""
    width, heads = SHAPES[options.size]
    attention = Attention(query_dim=width, heads=heads, dim_head=width // heads)
    randomize(attention)
    attention = attention.to(options.device, options.dtype).eval().requires_grad_(False)
    model = SimpleNamespace(active=None)  # all that the processor asks of a model
    attention.set_processor(cast(Any, PatchedAttention(cast(SVD, model), Layer("first", frozenset({"ends"})))))
    tile = options.tile
    plan = plan_tiles(tile.frames, tile.height, tile.width, tile, factor=1)
    run = TileRun(plan, Propagation(kinds=()))

    def work(variant: SelfAttention) -> object:
        branch = Branch("one", attention=None if variant is plain else variant)
        model.active = (run, Call(Step(0), branch, 0, (0,), tile.frames, tile.height, tile.width))
        return attention(hidden)

    return {name: lambda v=variant: work(v) for name, variant in VARIANTS.items()}


def bare_work(options: Options, ready: list[Tensor]) -> dict[str, Callable[[], object]]:
    """Attention alone. Q is what `ready` holds, as `Tempered` spends it."""
    frames = options.tile.frames
    return {name: lambda v=variant: v(ready[0], ready[1], ready[2], None, frames) for name, variant in VARIANTS.items()}


def report(title: str, options: Options, work: dict[str, Callable[[], object]], refresh: Callable[[], None]) -> None:
    times = interleaved(work, options, lambda name: refresh())
    peaks: dict[str, int] = {}
    for name, run in work.items():
        refresh()
        peaks[name] = peak_bytes(run, options.device)
    rows = [
        [
            name,
            f"{median(times[name]) * 1e3:.1f}",
            f"{ratio(times, name, 'plain'):.3f}",
            f"{peaks[name] / MIB:.1f}",
            f"{peaks[name] / peaks['plain']:.3f}",
        ]
        for name in work
    ]
    rows.append(["target", "", f"<= {TIME_TARGET}", "", f"<= {MEMORY_TARGET}"])
    table([title, "ms", "ratio", "peak MiB", "ratio"], rows)


def main() -> None:
    options = read(parser(__doc__, repeats=9).parse_args())
    width, heads = SHAPES[options.size]
    tile = options.tile
    tokens = tile.height * tile.width
    heading("Self-attention", options)
    print(f"{tile.frames} frames x {heads} heads x {tokens} tokens x {width // heads}\n")
    torch.manual_seed(0)
    shape = (tile.frames, tokens, width)
    hidden = torch.randn(shape, device=options.device, dtype=options.dtype)
    with torch.no_grad():
        report("layer with projections", options, layer_work(options, hidden), lambda: None)
        # As projections leave them: heads interleaved in memory.
        q, k, v = (rearrange(torch.randn_like(hidden), "b n (h d) -> b h n d", h=heads) for _ in range(3))
        ready = [q.clone(), k, v]
        report("attention alone", options, bare_work(options, ready), lambda: cast(None, ready[0].copy_(q)))


if __name__ == "__main__":
    keep_freed()
    main()
