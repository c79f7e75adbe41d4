"""The loader of SDATC's control: what the host's own Apply ControlNet takes."""

from __future__ import annotations

from comfy_api.latest import io

from ..vsr_ops.control import LITE_CONTROL
from ..vsr_ops.safefile import PICKLE_SUFFIXES
from . import host
from .common import CATEGORY

#: The host's folder for ControlNets, and the suffixes of controls: DiffBIR's were published as pickles, of which
#: tensors alone are read.
CONTROL_FOLDER = "controlnet"
CONTROL_FILES = (".safetensors", *sorted(PICKLE_SUFFIXES - {".bin", ".pkl"}))


def _bundled() -> tuple[str, ...]:
    return ("lite",) if LITE_CONTROL.is_file() else ()


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
                    options=host.weights_files(CONTROL_FOLDER, CONTROL_FILES, _bundled()),
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
            host.load_host_control(host.weights_file(CONTROL_FOLDER, which, CONTROL_FILES, _bundled()))
        )
