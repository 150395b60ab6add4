"""The model's own floating weights and activations, counted as 16 bit: what is not quantized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ldmq_kernels.numerics.formats.base import FLOAT_ACTIVATIONS, Buffer, Format, WeightFormat
from ldmq_kernels.numerics.gptq import Hessian


class FloatWeight(WeightFormat):
    """The floating weight as it is."""

    is_quantized = False
    is_precise = True

    def buffers(self, shape: Sequence[int]) -> dict[str, Buffer]:
        """The weight, counted as 16 bit."""
        return {"weight": Buffer(tuple(shape), torch.float16)}

    def quantize(self, weight: Tensor, hessian: Hessian | None = None) -> dict[str, Tensor]:
        """The weight itself."""
        return {"weight": weight}

    def dequantize(self, stored: Mapping[str, Tensor], channels: int) -> Tensor:
        """The weight itself, in float32."""
        return stored["weight"].float()

    def wrong_values(self, name: str, stored: Tensor) -> tuple[Tensor, str]:
        """Any value is accepted."""
        return torch.zeros_like(stored, dtype=torch.bool), "floating"


FP16 = Format(
    "fp16",
    FloatWeight(),
    (FLOAT_ACTIVATIONS,),
    {},
    (),
    operation_cost=2.0,  # half the rate of int8 on tensor cores and on AMX
    colours={"float": ("#8b949a", "#a9b2b8")},
)
