"""Where a graph begins: weights, bundled or the artist's own, and a clip to try them on."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..vsr_ops.checkpoints.safefile import PICKLE_SUFFIXES
from ..vsr_ops.checkpoints.sd import LITE_SD
from ..vsr_ops.checkpoints.svd import LITE
from ..vsr_ops.cli import demo_clip
from ..vsr_ops.modules.cfw import load_cfw
from ..vsr_ops.modules.control import LITE_CONTROL
from ..vsr_ops.modules.dcm import read_dcm
from ..vsr_ops.modules.refiner import load_refiner
from ..vsr_ops.modules.stam import load_stam
from ..vsr_ops.modules.video_upscaler import check_base, load_video_upscaler
from . import host
from .common import CATEGORY, REFINER, VIDEO_UPSCALER, check_choice, choice, count, to_image

WHICH = {"svd_lite": LITE, "sd_lite": LITE_SD}
#: The host's folders, under its `models`, where files of these kinds are looked for.
DCM_FOLDER, REFINER_FOLDER = "upscale_models", "vsr_refiners"
CFW_FOLDER, STAM_FOLDER, VIDEO_UPSCALER_FOLDER = "vsr_cfw", "vsr_stam", "vsr_video_upscalers"
#: Suffixes of those files. SwinIR and StableSR's CFW were published as pickles, of which tensors alone are read.
FILES = (".safetensors", *sorted(PICKLE_SUFFIXES))
#: The host's folder for ControlNets, and the suffixes of controls: DiffBIR's were published as pickles, of which
#: tensors alone are read.
CONTROL_FOLDER = "controlnet"
CONTROL_FILES = (".safetensors", *sorted(PICKLE_SUFFIXES - {".bin", ".pkl"}))
#: What goes from their loaders to Decode Video.
CFW, STAM = io.Custom("VSR_CFW"), io.Custom("VSR_STAM")


def bundled_controls() -> tuple[str, ...]:
    """The controls that the pack itself has."""
    return ("lite",) if LITE_CONTROL.is_file() else ()


class LoadLite(io.ComfyNode):
    """The bundled weights as MODEL and VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VSRLoadLite",
            display_name="Load Lite SVD (VSR)",
            category=f"{CATEGORY}/loaders",
            description=(
                "The small Stable Video Diffusion, or Stable Diffusion, that comes with the pack: no download, runs on"
                " a CPU."
            ),
            inputs=[
                choice(
                    "which",
                    WHICH,
                    "svd_lite",
                    "svd_lite: the video model of DC-VSR's graphs; sd_lite: the picture model of SDATC's.",
                )
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The UNet, as any other MODEL: LoRA and patches apply."),
                io.Vae.Output(display_name="vae", tooltip="Its video VAE; decode with Decode Video (VSR)."),
            ],
        )

    @classmethod
    def execute(cls, which: str) -> io.NodeOutput:
        return io.NodeOutput(*host.load_lite(WHICH[check_choice("which", which, WHICH)], LITE))


class LoadDCM(io.ComfyNode):
    """An upscale model that cleans what it enlarges."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VSRLoadDCM",
            display_name="Load DCM (VSR)",
            category=f"{CATEGORY}/loaders",
            description=(
                "SDATC's distortion control module: makes a compressed video clean and four times larger,"
                " before the diffusion sees it. The pack's own small one, or any upscale model: SwinIR, say."
            ),
            inputs=[
                choice(
                    "which",
                    host.weights_files(DCM_FOLDER, FILES),
                    "lite",
                    "lite: the pack's own, x4; or a file from the host's models/upscale_models, .pth or .safetensors.",
                )
            ],
            outputs=[
                io.UpscaleModel.Output(
                    display_name="upscale_model",
                    tooltip="For Upscale LR Video (VSR), or the host's Upscale Image (using Model).",
                )
            ],
        )

    @classmethod
    def execute(cls, which: str) -> io.NodeOutput:
        return io.NodeOutput(host.managed(read_dcm(host.weights_file(DCM_FOLDER, which, FILES))))


class LoadVideoUpscaler(io.ComfyNode):
    """What enlarges a video by more than one frame of it shows."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VSRLoadVideoUpscaler",
            display_name="Load Video Upscaler (VSR)",
            category=f"{CATEGORY}/loaders",
            description=(
                "SATeCo's video upscaler: on top of a picture's upscale model, a small network that brings together"
                " what neighbouring frames show, along their motion."
            ),
            inputs=[
                choice(
                    "which",
                    host.weights_files(VIDEO_UPSCALER_FOLDER),
                    "lite",
                    "lite: the pack's own, trained on top of its DCM; or a file from models/vsr_video_upscalers.",
                ),
                io.UpscaleModel.Input(
                    "upscale_model",
                    optional=True,
                    tooltip="The model that it was trained on top of; without one, the pack's DCM, which lite wants.",
                ),
            ],
            outputs=[
                VIDEO_UPSCALER.Output(
                    display_name="video_upscaler", tooltip="For Upscale LR Video or Upscale Video with SVD (VSR)."
                )
            ],
        )

    @classmethod
    def execute(cls, which: str, upscale_model: Any = None) -> io.NodeOutput:
        file = host.weights_file(VIDEO_UPSCALER_FOLDER, which)
        if upscale_model is None:
            check_base(file)
            upscale_model = read_dcm("lite")
        return io.NodeOutput(host.HostVideoUpscaler(load_video_upscaler(file), host.managed(upscale_model)))


class LoadRefiner(io.ComfyNode):
    """The network of the Refine node."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VSRLoadRefiner",
            display_name="Load Refiner (VSR)",
            category=f"{CATEGORY}/loaders",
            description="SATeCo's refiner: a small network that decides per pixel how far to trust the diffusion.",
            inputs=[
                choice(
                    "which",
                    host.weights_files(REFINER_FOLDER),
                    "lite",
                    "lite: the pack's own, made for its lite SVD; or a refiner's file from models/vsr_refiners.",
                )
            ],
            outputs=[REFINER.Output(display_name="refiner", tooltip="For Refine (VSR).")],
        )

    @classmethod
    def execute(cls, which: str) -> io.NodeOutput:
        return io.NodeOutput(load_refiner(host.weights_file(REFINER_FOLDER, which)))


class LoadCFW(io.ComfyNode):
    """What lets Decode Video see the video it came from."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VSRLoadCFW",
            display_name="Load CFW (VSR)",
            category=f"{CATEGORY}/loaders",
            description=(
                "Controllable feature wrapping, StableSR's and SDATC's: layers beside a VAE's decoder that let it see"
                " the upscaled video. They belong to the VAE they were trained on."
            ),
            inputs=[
                choice(
                    "which",
                    host.weights_files(CFW_FOLDER, FILES),
                    "lite",
                    "lite: the pack's own, for the VAE of Load Lite SVD; or a file from models/vsr_cfw, .safetensors or"
                    " StableSR's .ckpt.",
                )
            ],
            outputs=[CFW.Output(display_name="cfw", tooltip="For Decode Video (VSR).")],
        )

    @classmethod
    def execute(cls, which: str) -> io.NodeOutput:
        return io.NodeOutput(load_cfw(host.weights_file(CFW_FOLDER, which, FILES)))


class LoadSTAM(io.ComfyNode):
    """What makes a picture VAE's decoder see time."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VSRLoadSTAM",
            display_name="Load STAM (VSR)",
            category=f"{CATEGORY}/loaders",
            description=(
                "SDATC's spatio-temporal attention: blocks in a VAE's decoder through which frames see each other,"
                " against flicker. They belong to the VAE they were trained on."
            ),
            inputs=[
                choice(
                    "which",
                    host.weights_files(STAM_FOLDER),
                    "lite",
                    "lite: the pack's own, for the VAE of Load Lite SVD; or a .safetensors file from models/vsr_stam.",
                )
            ],
            outputs=[STAM.Output(display_name="stam", tooltip="For Decode Video (VSR).")],
        )

    @classmethod
    def execute(cls, which: str) -> io.NodeOutput:
        return io.NodeOutput(load_stam(host.weights_file(STAM_FOLDER, which)))


class DemoClip(io.ComfyNode):
    """A compressed clip and the truth it came from."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VSRDemoClip",
            display_name="Demo Clip (VSR)",
            category=f"{CATEGORY}/loaders",
            description=(
                "Two photographs moved by a camera, made four times smaller and really H.264-compressed: something to"
                " upscale on a fresh installation, with the truth to compare with."
            ),
            inputs=[
                count(
                    "frames", 8, 1, demo_clip.FRAMES, "Frames to take from the start; a new scene begins at the 13th."
                ),
                count(
                    "crf",
                    16,
                    0,
                    51,
                    "How hard H.264 compresses it: 0 nothing is lost, 51 little is left.",
                    optional=True,
                ),
            ],
            outputs=[
                io.Image.Output(display_name="clip", tooltip="The small compressed clip, 96 x 64."),
                io.Image.Output(display_name="truth", tooltip="What it was before, 384 x 256."),
            ],
        )

    @classmethod
    def execute(cls, frames: int, crf: int = 16) -> io.NodeOutput:
        small, truth = demo_clip.degraded(crf), demo_clip.ground_truth()[0]
        return io.NodeOutput(to_image(small[:frames]), to_image(truth[:frames]))


class LoadControl(io.ComfyNode):
    """What lets Stable Diffusion see the low-resolution video."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VSRLoadControl",
            display_name="Load Control (VSR)",
            category=f"{CATEGORY}/loaders",
            description=(
                "SDATC's control: a copy of Stable Diffusion's encoder that sees the upscaled video's latents and"
                " steers the UNet by them. DiffBIR's files load too. Use it with Apply ControlNet and the VAE wired."
            ),
            inputs=[
                io.Combo.Input(
                    "which",
                    options=host.weights_files(CONTROL_FOLDER, CONTROL_FILES, bundled_controls()),
                    tooltip="lite: the pack's own, for its lite Stable Diffusion; or a file from models/controlnet: a"
                    " control of this pack, or DiffBIR's for Stable Diffusion 2.1.",
                )
            ],
            outputs=[
                io.ControlNet.Output(
                    display_name="control_net",
                    tooltip="For Apply ControlNet: image is the upscaled video, and vae must be wired.",
                )
            ],
        )

    @classmethod
    def execute(cls, which: str) -> io.NodeOutput:
        return io.NodeOutput(
            host.load_host_control(host.weights_file(CONTROL_FOLDER, which, CONTROL_FILES, bundled_controls()))
        )
