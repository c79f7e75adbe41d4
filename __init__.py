"""Coherent VSR: DC-VSR's diffusion video super-resolution as ComfyUI nodes."""

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
