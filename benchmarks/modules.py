"""What SDATC's modules add: CAPM to a UNet step; CFW, STAM and CAPM to decoding; the DCM's share of a whole lite run.

A step is one tile through the UNet; decoding is one chunk in one tile, through the streaming decoder in every row. The
whole run is `upscale` on the bundled clip with the bundled weights as the command line runs it; it needs `--size lite`.

    python -m benchmarks.modules --size lite
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import cast

import torch
from torch import nn

from benchmarks.common import Options, build, describe, heading, interleaved, parser, randomize, ratio, read, table
from vsr_ops.backbones.svd import SVD
from vsr_ops.cli.demo_clip import degraded, write_video
from vsr_ops.modules.capm import CAPM, SVD_UNET, SVD_VAE, CAPMShape, attached, decoder_widths
from vsr_ops.modules.cfw import CFW, CFWShape
from vsr_ops.modules.dcm import load_dcm
from vsr_ops.modules.enlarging import Enlarging
from vsr_ops.modules.refiner import load_refiner
from vsr_ops.modules.stam import STAM, STAMShape
from vsr_ops.pipeline.job import Job, UpscaledFrames
from vsr_ops.pipeline.parts import PipelineModules
from vsr_ops.pipeline.sampler import Settings
from vsr_ops.pipeline.upscale import upscale
from vsr_ops.system.allocator import keep_freed
from vsr_ops.vae.decoder_modules import DecoderModules
from vsr_ops.vae.layout import level_widths, residual_widths
from vsr_ops.vae.stream import Streaming, stream_decode
from vsr_ops.video import probe

PLAIN = "none"
TARGET_STEP, TARGET_SHARE = 1.10, 0.10


def on(module: nn.Module, options: Options) -> nn.Module:
    """With weights that do something, on the device; in float32, as the pack runs them."""
    randomize(module)
    return module.to(options.device).eval().requires_grad_(False)


def unet_rows(model: SVD, options: Options) -> list[list[str]]:
    tile = options.tile
    capm = on(CAPM(CAPMShape(SVD_UNET, decoder_widths(model.unet.config["block_out_channels"]))), options)
    capm = cast(CAPM, capm.to(options.dtype))
    x, concat = (torch.randn(tile.frames, 4, tile.height, tile.width) for _ in range(2))
    context, hint = model.context(None), torch.full((tile.frames,), 0.5)

    def step() -> object:
        return model.denoise(x, 1.0, concat, context, tile.frames)

    def prompted(told: torch.Tensor | None) -> object:
        with attached(capm, model.unet, told):
            return step()

    work: dict[str, Callable[[], object]] = {
        PLAIN: step,
        "CAPM, told the level": lambda: prompted(hint),
        "CAPM, reading it": lambda: prompted(None),
    }
    times = interleaved(work, options)
    return [row(name, times, f"<= {TARGET_STEP:.2f}") for name in work]


def decode_rows(model: SVD, options: Options) -> list[list[str]]:
    tile, vae = options.tile, model.vae
    latents = torch.randn(tile.frames, 4, tile.height, tile.width)
    reference = torch.rand(tile.frames, 3, 8 * tile.height, 8 * tile.width)
    levels, blocks = level_widths(vae), residual_widths(vae)
    cfw = CFW(CFWShape((1, 2), (levels[1], levels[2]), 0 if options.size == "lite" else 2, backbone="svd"))
    stam = STAM(STAMShape(tuple(blocks.items()), 32, backbone="svd"))
    capm = CAPM(CAPMShape(SVD_VAE, decoder_widths(vae.config["block_out_channels"])))
    for module in (cfw, stam, capm):
        on(module, options)
    named = {
        PLAIN: DecoderModules(),
        "CFW": DecoderModules(cfw=cfw),
        "STAM": DecoderModules(stam=stam),
        "CAPM": DecoderModules(capm=capm),
    }

    compressed = torch.full((tile.frames,), 0.5)
    how = Streaming(chunk=tile.frames, tile=max(tile.height, tile.width))

    def decode(modules: DecoderModules) -> object:
        return list(stream_decode(vae, latents, (), modules, reference, compressed, how))

    work: dict[str, Callable[[], object]] = {name: lambda m=modules: decode(m) for name, modules in named.items()}
    times = interleaved(work, options)
    return [row(name, times, "") for name in work]


def whole_rows(model: SVD, options: Options) -> list[list[str]]:
    upscale_fn, refiner = load_dcm("lite", options.device), load_refiner("lite", options.device)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_video(folder / "in.mp4", degraded())
        info = probe(folder / "in.mp4")
        job = Job(info, 0, info.frames, 4)
        settings = Settings(steps=4, guidance="none", color="none")

        def run() -> None:
            parts = PipelineModules(upscale_fn, refiner)
            upscale(model, job, folder / "out.mp4", settings, overwrite=True, parts=parts)

        def dcm() -> None:
            upscaled = UpscaledFrames(job, Enlarging(upscale_fn), folder)
            for _ in upscaled():
                pass
            upscaled.close()

        times = interleaved({"whole run": run, "DCM": dcm}, options)
    frames = info.frames
    whole, part = (median(times[name]) for name in ("whole run", "DCM"))
    return [
        ["whole run", f"{whole / frames:.3f}", "1.000", ""],
        ["DCM", f"{part / frames:.3f}", f"{ratio(times, 'DCM', 'whole run'):.3f}", f"<= {TARGET_SHARE:.2f}"],
    ]


def row(name: str, times: dict[str, list[float]], target: str) -> list[str]:
    return [name, f"{median(times[name]):.3f}", f"{ratio(times, name, PLAIN):.3f}", "" if name == PLAIN else target]


def main() -> None:
    options = read(parser(__doc__, repeats=5).parse_args())
    model = build(options, with_vae=True)
    heading("SDATC's modules", options)
    print(f"{describe(model, options)}\n", flush=True)
    torch.manual_seed(0)
    table(["UNet, one tile", "s", "step / none", "target"], unet_rows(model, options))
    print(flush=True)
    table(["decoder, one chunk", "s", "decode / none", ""], decode_rows(model, options))
    if options.size == "lite":
        print(flush=True)
        table(["upscale, the bundled clip", "s a frame", "share", "target"], whole_rows(model, options))


if __name__ == "__main__":
    keep_freed()
    main()
