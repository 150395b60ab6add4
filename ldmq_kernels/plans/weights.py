"""Which float weights a plan was made from, and whether those that it is applied to are the same.

A plan has a digest of the weights of all linears and convolutions, as the model held them while it was planned, and
one for each narrower dtype that they may be rounded to: a plan that was made in float32 knows its weights again in
float16 and in bfloat16, and a wider model is rounded to what the plan has. Only between float16 and bfloat16, and from
these to weights that were rounded from float32 in another way, can nothing be told.
"""

from __future__ import annotations

import logging
import warnings

import torch
from torch import Tensor, nn

from ldmq_kernels.numerics.checksum import checksum, combined
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.plans.plan import Plan

logger = logging.getLogger(__name__)

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


class OtherWeightsWarning(UserWarning):
    """A plan is applied to other weights than those that it was made from."""


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    return torch.promote_types(wide, narrow) == wide


def _held_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a model's weights; the narrowest where some are kept in a wider one."""
    dtypes = {layer.weight.dtype for layer in quantizable_layers(model).values()}
    return min(dtypes, key=lambda dtype: (dtype.itemsize, str(dtype)), default=torch.float32)


def weights_record(model: nn.Module) -> dict[str, str]:
    """A digest of a float model's weights for each dtype in which a plan knows them again."""
    held = _held_dtype(model)
    names = [name for name, dtype in DTYPES.items() if _holds(held, dtype)]
    checksums: dict[str, dict[str, int]] = {name: {} for name in names}
    for layer, module in quantizable_layers(model).items():
        for name in names:
            checksums[name][layer] = checksum(module.weight.detach().to(DTYPES[name]))
    return {name: combined(of_layers) for name, of_layers in checksums.items()}


class WeightsCheck:
    """Compares the weights that a plan is applied to with those that it was made from, layer by layer.

    Args:
        plan: one without a record of its weights is not compared with anything.
        model: the float model; its weights need not be there yet, but their dtype.
    """

    def __init__(self, plan: Plan, model: nn.Module) -> None:
        self._recorded = plan.model.get("weights", {})
        self._model = type(model).__name__
        self._checksums: dict[str, int] = {}
        self._compared = _compared_dtype(self._recorded, _held_dtype(model)) if self._recorded else None
        if self._recorded and self._compared is None:
            logger.info("the plan was made in another 16-bit dtype: whether from these weights cannot be told")

    def add(self, name: str, weight: Tensor) -> None:
        """Take the float weight of a layer; every layer's is needed."""
        if weight.is_meta:
            self._compared = None
        if self._compared is not None:
            self._checksums[name] = checksum(weight.detach().to(DTYPES[self._compared]))

    def finish(self) -> None:
        """Warn where the weights are others."""
        if self._compared is not None and combined(self._checksums) != self._recorded[self._compared]:
            warnings.warn(
                f"this plan was made from other weights than those of this {self._model}, which has the same layers: "
                "it is applied, but its scales and what it measured are of the other model; make a plan for this one "
                "with `ldmq plan` to know the noise",
                OtherWeightsWarning,
                stacklevel=4,  # who calls `ldmq.quantize`
            )


def _compared_dtype(recorded: dict[str, str], held: torch.dtype) -> str | None:
    """The recorded dtype that held weights can be compared in: their own, or one that they are rounded to."""
    equal = next((name for name in recorded if DTYPES[name] == held), None)
    return equal or next((name for name in recorded if _holds(held, DTYPES[name])), None)
