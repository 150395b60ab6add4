"""Loading and saving quantized models with diffusers' own `from_pretrained` and `save_pretrained`."""

from ldmq_kernels.integrations.diffusers.config import LdmqConfig
from ldmq_kernels.integrations.diffusers.integrity import CheckpointError
from ldmq_kernels.integrations.diffusers.quantizer import LdmqQuantizer
from ldmq_kernels.integrations.diffusers.registration import register

__all__ = ["CheckpointError", "LdmqConfig", "LdmqQuantizer", "register"]

register()
