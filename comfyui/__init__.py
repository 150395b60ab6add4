"""Nodes for ComfyUI that run a UNet on this package's own quantized layers; see README.md."""

from .nodes import LdmqExtension, LdmqLoader


async def comfy_entrypoint() -> LdmqExtension:
    """What ComfyUI calls when it starts."""
    return LdmqExtension()


__all__ = ["LdmqExtension", "LdmqLoader", "comfy_entrypoint"]
