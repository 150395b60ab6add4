"""Makes diffusers know this package's quantizer."""

from __future__ import annotations

from diffusers.quantizers import auto
from torch import nn

from ldmq_kernels.conversion.convert import on_conversion
from ldmq_kernels.integrations.diffusers.config import LdmqConfig, LdmqMethod
from ldmq_kernels.integrations.diffusers.quantizer import LdmqQuantizer
from ldmq_kernels.plans.plan import Plan


def register() -> None:
    """Enter the quantizer in diffusers' tables; again is the same as once."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[LdmqMethod.LDMQ.value] = LdmqConfig
    auto.AUTO_QUANTIZER_MAPPING[LdmqMethod.LDMQ.value] = LdmqQuantizer
    on_conversion(record)


def record(model: nn.Module, plan: Plan) -> None:
    """Make a model of diffusers that was just converted call the fused ops, and `save_pretrained` write the plan."""
    from diffusers import ModelMixin  # when this module is imported, diffusers may still be loading it

    if isinstance(model, ModelMixin):
        from ldmq_kernels.integrations.diffusers.fused import fuse

        LdmqQuantizer(LdmqConfig(plan=plan)).attach(model)
        fuse(model)
