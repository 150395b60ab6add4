"""Makes diffusers know this package's quantizer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import wrapt
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
    _wrap_saving()


@functools.cache
def _wrap_saving() -> None:
    """Have every save of a quantized model make its checksums: diffusers asks a quantizer only after config.json."""
    wrapt.wrap_function_wrapper("diffusers.configuration_utils", "ConfigMixin.save_config", _save_config)


def _save_config(save: Callable[..., Any], model: Any, args: Any, kwargs: Any) -> Any:
    quantizer = vars(model).get("hf_quantizer")
    if not isinstance(quantizer, LdmqQuantizer):
        return save(*args, **kwargs)
    with quantizer.announcing(model):
        return save(*args, **kwargs)


def record(model: nn.Module, plan: Plan) -> None:
    """Make a model that was just converted call the fused ops, and `save_pretrained` write the plan."""
    from diffusers import ModelMixin  # when this module is imported, diffusers may still be loading it

    if isinstance(model, ModelMixin):
        from ldmq_kernels.integrations.diffusers.fused import fuse

        LdmqQuantizer(LdmqConfig(plan=plan)).attach(model)
        fuse(model)
