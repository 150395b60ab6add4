"""`ldmq.quantize`: a plan, however it is given, applied to a pipeline or a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from ldmq_kernels.calibration.trajectory import denoiser
from ldmq_kernels.conversion.convert import convert
from ldmq_kernels.planning.plan import Plan

T = TypeVar("T")


def as_plan(plan: Plan | str | Path | Mapping[str, Any], source: str = "plan") -> Plan:
    """A plan from itself, from its file or from its JSON object, which errors call `source`.

    Raises:
        PlanError: there is no plan in the file or the object.
    """
    if isinstance(plan, Plan):
        return plan
    if isinstance(plan, str | Path):
        return Plan.load(plan)
    return Plan.from_dict(dict(plan) if isinstance(plan, Mapping) else plan, source)


def quantize(pipe: T, plan: Plan | str | Path | Mapping[str, Any]) -> T:
    """Quantize a pipeline's UNet (or transformer) in place as a plan says.

    Afterwards `save_pretrained` writes the quantized model, and `from_pretrained` gives it back.

    Args:
        pipe: a diffusers pipeline, or a model.
        plan: a plan, the path of its file, or its JSON object.

    Returns:
        `pipe` itself.

    Raises:
        PlanError: the plan is damaged or made for another model.
        ConversionError: the model is quantized already, or one of its layers cannot be quantized; it is unchanged.
        TypeError: the pipeline has neither a UNet nor a transformer.
    """
    convert(pipe if isinstance(pipe, nn.Module) else denoiser(pipe), as_plan(plan))
    return pipe
