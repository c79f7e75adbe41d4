"""Nodes from pictures to pictures: upscaling, colour, comparison."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..vsr_ops.errors import SettingError
from ..vsr_ops.image.color import COLOR, correct_clamped
from ..vsr_ops.image.resize import RESIZE
from ..vsr_ops.image.upscale import target_size
from ..vsr_ops.video.scenes import find_cuts
from ..vsr_ops.views.compare import COMPARE, compare
from . import host
from .common import CATEGORY, REFINER, VIDEO_UPSCALER, check_choice, choice, count, number, to_frames, to_image


class UpscaleLR(io.ComfyNode):
    """The low-resolution video at the result's size."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VSRUpscaleLR",
            display_name="Upscale LR Video (VSR)",
            category=f"{CATEGORY}/picture",
            description=(
                "Brings the low-resolution video to the size of the result, exactly: what the diffusion is conditioned"
                " on, and what colours are matched to. With an upscale model (SwinIR and its kin) this is SDATC's DCM,"
                " with a video upscaler SATeCo's."
            ),
            inputs=[
                io.Image.Input("image", tooltip="The low-resolution video, as a batch of frames."),
                number("scale", 4.0, 0.01, 16.0, "How many times larger; not used where a width or height is given."),
                count("width", 0, 0, 16384, "Width of the result in pixels; 0: by scale, or by height in proportion."),
                count("height", 0, 0, 16384, "Height of the result in pixels; 0: by scale, or by width in proportion."),
                choice(
                    "method", RESIZE, "bicubic", "How pictures are resized, after the upscale model if there is one."
                ),
                io.UpscaleModel.Input(
                    "upscale_model",
                    optional=True,
                    tooltip="From Load DCM (VSR), or any of the host's Load Upscale Model.",
                ),
                VIDEO_UPSCALER.Input(
                    "video_upscaler",
                    optional=True,
                    tooltip="From Load Video Upscaler (VSR), in upscale_model's place: it brings that along.",
                ),
                number(
                    "video_strength",
                    1.0,
                    0.0,
                    2.0,
                    "Of a video upscaler: 0 is the model it stands on alone, exactly; 1 is what was trained.",
                    optional=True,
                ),
            ],
            outputs=[io.Image.Output(display_name="upscaled", tooltip="The video at the size of the result.")],
        )

    @classmethod
    def execute(
        cls,
        image: Tensor,
        scale: float,
        width: int,
        height: int,
        method: str,
        upscale_model: Any = None,
        video_upscaler: Any = None,
        video_strength: float = 1.0,
    ) -> io.NodeOutput:
        frames = to_frames(image)
        size = target_size((frames.shape[-2], frames.shape[-1]), scale, width, height)
        check_choice("method", method, RESIZE)
        check_one_upscaler(upscale_model, video_upscaler)
        if video_upscaler is None:
            return io.NodeOutput(to_image(host.enlarged(frames, size, method, upscale_model)))
        cuts = find_cuts(iter(frames))
        larger = host.enlarged_over_time(frames, size, method, video_upscaler, video_strength, cuts)
        return io.NodeOutput(to_image(larger))


def check_one_upscaler(upscale_model: Any, video_upscaler: Any) -> None:
    """Raises SettingError where both are wired."""
    if upscale_model is not None and video_upscaler is not None:
        raise SettingError(
            "upscale_model and video_upscaler are both wired: expected one of them; wire the upscale model into Load"
            " Video Upscaler (VSR), which stands on it"
        )


class Refine(io.ComfyNode):
    """The diffusion's detail where it can be trusted, the upscaled picture elsewhere."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VSRRefine",
            display_name="Refine (VSR)",
            category=f"{CATEGORY}/picture",
            description=(
                "Puts the decoded video and the upscaled one together with a small trained network (SATeCo's video"
                " refiner), which keeps the detail that fits and brings colours back."
            ),
            inputs=[
                io.Image.Input("decoded", tooltip="The diffusion's video, from Decode Video (VSR)."),
                io.Image.Input(
                    "upscaled", tooltip="The video it was conditioned on, from Upscale LR Video (VSR): of one size."
                ),
                REFINER.Input("refiner", tooltip="From Load Refiner (VSR)."),
                number("w", 0.0, 0.0, 1.0, "0: as the refiner has it; 1: the upscaled video exactly as it is."),
                number(
                    "sateco_w",
                    -1.0,
                    -1.0,
                    1.0,
                    "Of a refiner of SATeCo's form, in w's place: the paper's w, 0 the decoded video and what is added,"
                    " 1 the upscaled one. -1: off.",
                    optional=True,
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The refined video.")],
        )

    @classmethod
    def execute(
        cls, decoded: Tensor, upscaled: Tensor, refiner: Any, w: float, sateco_w: float = -1.0
    ) -> io.NodeOutput:
        frames, target = to_frames(decoded, "decoded"), to_frames(upscaled, "upscaled")
        cuts = find_cuts(iter(target))
        return io.NodeOutput(to_image(host.refined(refiner, frames, target, w, cuts, sateco_w)))


class ColorMatch(io.ComfyNode):
    """Colours of a reference on a result."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VSRColorMatch",
            display_name="Match Colour (VSR)",
            category=f"{CATEGORY}/picture",
            description="Gives a result the colours of the video it came from: diffusion drifts, this brings it back.",
            inputs=[
                io.Image.Input("image", tooltip="The result whose colours drifted."),
                io.Image.Input(
                    "reference", tooltip="The upscaled input: as many frames; for detail and wavelet of the same size."
                ),
                choice(
                    "method",
                    COLOR,
                    "detail",
                    "detail: only what is finer than about 8 pixels is the result's. wavelet: finer than about 32"
                    " pixels. adain: mean and contrast of each channel (SDATC's). none: nothing.",
                ),
                number("strength", 1.0, 0.0, 1.0, "0 leaves the image exactly as it is, 1 corrects fully."),
                number(
                    "smoothing",
                    0.0,
                    0.0,
                    30.0,
                    "Smooths the correction over time, in frames, never across a cut; 0 is off.",
                    step=0.1,
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The image with the reference's colours.")],
        )

    @classmethod
    def execute(cls, image: Tensor, reference: Tensor, method: str, strength: float, smoothing: float) -> io.NodeOutput:
        x, target = to_frames(image), to_frames(reference, "reference")
        check_choice("method", method, COLOR)
        cuts = find_cuts(iter(target)) if smoothing else ()
        return io.NodeOutput(to_image(correct_clamped(method, x, target, strength, smoothing, cuts)))


class Compare(io.ComfyNode):
    """Two or three videos in one picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VSRCompare",
            display_name="Compare Videos (VSR)",
            category=f"{CATEGORY}/picture",
            description="Two or three videos of one size in one labelled picture, to see what a setting does.",
            inputs=[
                io.Image.Input("a", tooltip="The first video; differences are measured against it."),
                io.Image.Input("b", tooltip="The second video."),
                choice(
                    "mode",
                    COMPARE,
                    "side by side",
                    "side by side; wipe: one picture, split; difference: heat map against a; temporal profile: one row"
                    " of every frame, stacked over time: straight columns are calm, frayed ones flicker.",
                ),
                io.String.Input("label_a", default="a", tooltip="Name shown on the first video."),
                io.String.Input("label_b", default="b", tooltip="Name shown on the second video."),
                io.String.Input("label_c", default="c", tooltip="Name shown on the third video."),
                number("position", 0.5, 0.0, 1.0, "Where the wipe splits, or which row the temporal profile takes."),
                number("gain", 8.0, 0.1, 100.0, "How much the difference map is amplified.", step=0.1),
                io.Image.Input("c", optional=True, tooltip="A third video, if there is one."),
            ],
            outputs=[io.Image.Output(display_name="comparison", tooltip="The labelled picture or video.")],
        )

    @classmethod
    def execute(
        cls,
        a: Tensor,
        b: Tensor,
        mode: str,
        label_a: str,
        label_b: str,
        label_c: str,
        position: float,
        gain: float,
        c: Tensor | None = None,
    ) -> io.NodeOutput:
        named = {"a": (a, label_a), "b": (b, label_b), "c": (c, label_c)}
        there = {name: (image, label) for name, (image, label) in named.items() if image is not None}
        videos = [to_frames(image, name) for name, (image, _) in there.items()]
        labels = [label for _, label in there.values()]
        check_choice("mode", mode, COMPARE)
        return io.NodeOutput(to_image(compare(mode, videos, labels, position=position, gain=gain, row=position)))
