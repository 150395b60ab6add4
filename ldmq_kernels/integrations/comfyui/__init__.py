"""Checkpoints for ComfyUI: of its own int8 layers, or of this package's for the nodes in comfyui/."""

from ldmq_kernels.integrations.comfyui.export import Exported, check_known, export
from ldmq_kernels.integrations.comfyui.names import ldm_names

__all__ = ["Exported", "check_known", "export", "ldm_names"]
