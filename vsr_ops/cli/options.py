"""The options of every command. What they offer is known by name alone, so that help is there at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from ..names import (
    ALIGN_MODES,
    ALIGN_SCALES,
    BRANCH_MODES,
    CODECS,
    COLOR,
    DTYPES,
    FLOWS,
    GUIDANCE,
    LAYOUTS,
    METRICS,
    PREDICTIONS,
    PROPAGATION,
    PUBLISHED,
    SAMPLERS,
    SAP_MODES,
)
from ..pipeline.defaults import AUTO, DDPM_STEPS, DEFAULTS, PAPER_GUIDANCE, RHO, SAMPLER

#: The command that makes what --text takes.
EMBED = "python -m vsr_ops embed"


def make_parser() -> argparse.ArgumentParser:
    """Every command, its name as `command`, and its options."""
    parser = argparse.ArgumentParser(prog="python -m vsr_ops", description="Diffusion video super-resolution (DC-VSR).")
    commands = parser.add_subparsers(required=True, dest="command", metavar="|".join(COMMANDS))
    for name, (text, add_options) in COMMANDS.items():
        add_options(commands.add_parser(name, help=text))
    return parser


def _add_upscale(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("input", type=Path, metavar="IN")
    add("output", type=Path, metavar="OUT")
    add("--overwrite", action="store_true", help="replace OUT, or in it pictures of the same names")
    add("--codec", default=None, help=", ".join(CODECS))
    add("--cuts", default="auto", help="auto, none, or first frames of new scenes such as 24,50")
    _add_frames(parser)
    add_sampling(parser)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", type=Path, metavar="IN")
    parser.add_argument(
        "--cuts",
        default="sampled",
        help="sampled: looked for in a few stretches of the clip; auto: in all of it, as upscale does; or as there",
    )
    _add_frames(parser)
    add_sampling(parser)


def _add_frames(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scale", type=float, default=4.0)
    parser.add_argument("--frames", metavar="A:B", help="only these frames, counted from 0, B not included")


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("demo_output"))
    parser.add_argument("--overwrite", action="store_true", help="replace the files of an earlier demo")
    add_sampling(parser)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    clips = "a folder of clips: videos, or folders of numbered pictures; or one of those"
    add("--truth", type=Path, required=True, metavar="DIR", help=clips)
    add(
        "--method",
        action="append",
        required=True,
        metavar="NAME=DIR",
        help="results of a method, matched to the truth by their names; again for each method",
    )
    add("--metrics", metavar="A,B,C", help=f"all that can be measured by default: {', '.join(METRICS)}")
    add("--out", type=Path, metavar="DIR", help="where table.txt, metrics.csv, frames.csv and metrics.png go")
    add("--overwrite", action="store_true", help="replace those four files")
    add("--border", type=int, default=0, metavar="N", help="pixels left out on each side")
    add("--tile", metavar="HxWxT", help="tiles of the results, in latents, for the metric seam")
    add("--overlap", type=float, default=0.5, help="share of a tile, with --tile")
    add("--published", default="dc-vsr", help=f"which papers' rows stand beside: {', '.join(PUBLISHED)}")
    add("--device", default="cpu", help="auto, cpu, cuda, cuda:0 ..., mps")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """The options of every command that samples."""
    add = parser.add_argument
    add(
        "--model",
        default="lite",
        metavar="lite|PATH",
        help="bundled weights, or an SVD .safetensors or diffusers folder; with --control a Stable Diffusion",
    )
    add(
        "--unet",
        default="none",
        metavar="none|PATH",
        help="in the place of the model's own: a UNet alone in diffusers' layout, DC-VSR's say",
    )
    each = ", ".join(f"{known.steps} with {name}" for name, known in DEFAULTS.items())
    add("--steps", type=int, help=f"{each}, {DDPM_STEPS} with the sampler ddpm; 0 is no diffusion")
    auto = f"auto ({PAPER_GUIDANCE} with a full SVD, or where a strength is given, else none)"
    add("--guidance", default=AUTO, help=", ".join([auto, *GUIDANCE]))
    add("--cfg", type=float, help="classifier-free guidance; 1 is off. With dssag it is DC-VSR equation 9's 1 + s")
    add("--guidance-scale", type=float, help="the s of dssag, pag and sag; 0 is off")
    add("--rho", type=float, default=RHO, help="how fast dssag's blur fades over the steps; larger is sooner")
    add("--guidance-interval", metavar="MIN:MAX", help="guided at noise levels (sigmas) in it alone; all by default")
    add("--guidance-every", type=int, default=1, metavar="N", help="keep what guidance adds for N - 1 steps out of N")
    add("--tile", metavar="HxWxT", help="in latents (8 pixels each) and frames; the model's own by default")
    add("--overlap", type=float, default=0.5, help="share of a tile, 0 to 0.75")
    add(
        "--layout",
        default=AUTO,
        help=f"how tiles lie: {', '.join(LAYOUTS)} (the fewest tiles), or auto, the model's own",
    )
    add("--propagation", default="sap+tap", help=", ".join(PROPAGATION))
    add("--sap-mode", default="auto", help=", ".join(SAP_MODES))
    add("--sap-rate", type=int, help="every s-th token in y and x; by default 4, more where tiles are many")
    add("--tap-frames", type=int, default=4)
    add("--tap-rate", type=int, default=1, help="1 is the paper's setting, 4 is cheaper")
    add(
        "--upscaler",
        default=AUTO,
        metavar="auto|video|dcm|bicubic|PATH",
        help="enlarges the input; auto: what the model was trained with; video: the DCM and on top of it what sees the"
        " frames around; PATH: a SwinIR, say, or a video upscaler",
    )
    add(
        "--upscaler-base",
        default=AUTO,
        metavar="auto|dcm|bicubic|PATH",
        help="what a video upscaler stands on; auto: what it was trained on",
    )
    add("--upscaler-strength", type=float, default=1.0, help="of a video upscaler, 0 to 2; 0 is its base alone")
    add("--refiner", default=AUTO, metavar="auto|none|PATH", help="auto: the bundled one with the bundled weights")
    add("--refiner-w", type=float, default=0.0, help="0: as refined, 1: the upscaled input as it is")
    add(
        "--sateco-w", type=float, default=-1.0, help="with a refiner of SATeCo's form: its own w, 0 to 1; below 0: none"
    )
    auto = "auto (none after a refiner and with a full SVD, adain with a full Stable Diffusion, else detail)"
    add("--color", default=AUTO, help=", ".join([auto, *COLOR]))
    add("--control", default="none", metavar="none|lite|PATH", help="a ControlNet on Stable Diffusion, in SVD's place")
    add("--control-strength", type=float, default=1.0)
    _add_texts(parser)
    add("--prediction", default="auto", help=", ".join(["with --control: auto (as the model says)", *PREDICTIONS]))
    add(
        "--zsnr",
        default="auto",
        help="with --control: auto, on, off; on for a model of zero terminal SNR, DiffBIR 2.1's",
    )
    add("--capm", default="none", metavar="none|lite|sd_lite|PATH", help="compression prompts in UNet and decoder")
    add("--capm-strength", type=float, default=1.0, help="0 is off, 1 what was trained")
    add("--sateco", default="none", metavar="none|PATH", help="SATeCo's adapters in UNet and decoder")
    add("--sateco-strength", type=float, default=1.0, help="of the spatial one; 0 is off, 1 what was trained")
    add("--sateco-temporal", type=float, default=1.0, help="of the temporal one, likewise")
    add("--crf", type=float, default=-1.0, help="what CAPM is told of the input, 0 to 51; below 0: it is estimated")
    add("--decode-w", type=float, default=0.0, metavar="W", help="CFW's weight in the decoder; 0 is off, try 0.75")
    add("--cfw", default="lite", metavar="lite|PATH", help="the CFW that --decode-w weighs: StableSR's, or this pack's")
    add("--stam", default="none", metavar="none|lite|PATH", help="attention over time in the decoder")
    add(
        "--align",
        type=float,
        default=0.0,
        metavar="LAMBDA",
        help="along the input's motion; 0 is off, try 0.5 (propagate: 0.1)",
    )
    add("--align-mode", default="gradient", help=", ".join(ALIGN_MODES))
    add("--align-scale", default="bounded", help=f"of gradient's step: {', '.join(ALIGN_SCALES)} (the paper's)")
    _add_flow(parser)
    add("--sampler", default=SAMPLER, help=f"{', '.join(SAMPLERS)}; SDATC takes ddpm")
    add("--seed", type=int, default=0)
    add("--denoise", type=float, default=1.0, help="below 1: start from the LR latent at partial noise")
    add("--start-sigma", type=float, metavar="SIGMA", help="start from the LR latent at this noise level, in all steps")
    add("--batch", type=int, default=1, help="spatial tiles through the UNet together")
    add("--branches", default="auto", help=f"guidance's branches in one UNet call: {', '.join(BRANCH_MODES)}")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:0 ..., mps")
    add("--dtype", default="auto", help=", ".join(["auto", *DTYPES]))


def _add_texts(parser: argparse.ArgumentParser) -> None:
    """The options of what a Stable Diffusion is told."""
    add = parser.add_argument
    add("--prompt", default="", metavar="TEXT", help="with --control: what the video shows; by default the empty text")
    add("--negative", default="", metavar="TEXT", help="what cfg guides away from; by default the empty text")
    add(
        "--text",
        default="none",
        metavar="none|FILE",
        help=f"in their place: what {EMBED} made, for a model without text encoder",
    )


def _add_embed(parser: argparse.ArgumentParser) -> None:
    """The options of the command `embed`."""
    add = parser.add_argument
    add("--model", required=True, metavar="PATH", help="a Stable Diffusion with its text encoder, or that alone")
    add("--out", required=True, type=Path, metavar="FILE", help="a .safetensors, for --text")
    add("--prompt", default="", metavar="TEXT", help="by default the empty text")
    add("--negative", default="", metavar="TEXT", help="by default the empty text")
    add("--overwrite", action="store_true", help="replace FILE")
    add("--device", default="cpu", help="auto, cpu, cuda, cuda:0 ..., mps")


def _add_flow(parser: argparse.ArgumentParser) -> None:
    """--flow and --flow-weights."""
    parser.add_argument("--flow", default="dis", help=f"of the alignment: {', '.join(FLOWS)}; raft is the paper's")
    parser.add_argument("--flow-weights", default="none", metavar="PATH", help="RAFT's: torchvision's large or small")


#: By name: what each command does in a line, and its options.
COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "upscale": ("upscale a video, a folder of pictures or a picture", _add_upscale),
    "plan": ("show tiles, UNet passes, memory and time before spending them", _add_plan),
    "demo": ("upscale a bundled clip and compare it with the truth", _add_demo),
    "evaluate": ("measure results against the truth: table, CSV and curves", _add_evaluate),
    "embed": ("keep what a text encoder makes of a text, for a model without one", _add_embed),
}
