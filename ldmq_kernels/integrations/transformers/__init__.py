"""Loading and saving quantized text and image encoders with transformers' own `from_pretrained` and `save_pretrained`.

Nothing is imported until a quantized encoder is loaded: transformers' tables get stand-ins.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import nn

from ldmq_kernels.conversion.convert import on_conversion

if TYPE_CHECKING:
    from ldmq_kernels.plans.plan import Plan

METHOD = "ldmq"


class ConfigStandIn:
    """What transformers finds under this package's name, and calls: it gives an `LdmqConfig`, with its arguments."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """An `LdmqConfig`."""
        from ldmq_kernels.integrations.diffusers.config import LdmqConfig

        return LdmqConfig(*args, **kwargs)

    def __init__(
        self,
        scheme: str | None = None,
        plan: Plan | str | Path | Mapping[str, Any] | None = None,
        checksums: Mapping[str, Any] | None = None,
        quant_method: str = METHOD,
        modules_to_not_convert: Sequence[str] | None = None,
    ) -> None:
        """Never called: whoever compares signatures finds that of `LdmqConfig`."""

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The `LdmqConfig` that a config.json says."""
        from ldmq_kernels.integrations.diffusers.config import LdmqConfig

        return LdmqConfig.from_dict(config_dict, *args, **kwargs)


def _quantizer(config: Any, **kwargs: Any) -> Any:
    from ldmq_kernels.integrations.transformers.quantizer import LdmqEncoderQuantizer

    return LdmqEncoderQuantizer(config, **kwargs)


def register(auto: ModuleType) -> None:
    """Enter the stand-ins in transformers' tables; again is the same as once.

    Args:
        auto: `transformers.quantizers.auto`, which is complete.
    """
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = ConfigStandIn
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = _quantizer
    on_conversion(record)


def record(model: nn.Module, plan: Plan) -> None:
    """Make the `save_pretrained` of an encoder of transformers that was just converted write the plan."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is not None and isinstance(model, modeling.PreTrainedModel):
        from ldmq_kernels.integrations.diffusers.config import LdmqConfig
        from ldmq_kernels.integrations.transformers.quantizer import attach

        attach(model, LdmqConfig(plan=plan))
