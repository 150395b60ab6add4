"""`ldmq.quantize`: a plan, however it is given, applied to a pipeline or a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from ldmq_kernels.calibration.trajectory import denoiser
from ldmq_kernels.conversion.convert import check_convertible, convert
from ldmq_kernels.conversion.moments import RecordedMoments
from ldmq_kernels.plans.plan import Plan

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


def quantize(pipe: T, plan: Plan | str | Path | Mapping[str, Any], *, show_progress: bool = True) -> T:
    """Quantize a pipeline's UNet (or transformer) in place as a plan says.

    Afterwards `save_pretrained` writes the quantized model, and `from_pretrained` gives it back. Where the plan
    rounds weights by GPTQ, the pipeline first draws the plan's calibration prompts again.

    Args:
        pipe: a diffusers pipeline, or a model.
        plan: a plan, the path of its file, or its JSON object.
        show_progress: of the calibration that GPTQ needs, on standard error.

    Returns:
        `pipe` itself.

    Raises:
        PlanError: the plan is damaged or made for another model.
        ConversionError: the model is quantized already or has adapters on it, one of its layers cannot be quantized,
            or the plan needs the pipeline and has only the model; it is unchanged.
        TypeError: the pipeline has neither a UNet nor a transformer.
    """
    model = pipe if isinstance(pipe, nn.Module) else denoiser(pipe)
    plan = as_plan(plan)
    moments = None
    if plan.needs_inputs and not isinstance(pipe, nn.Module):
        check_convertible(model)
        moments = RecordedMoments(pipe, plan, show=show_progress)
    convert(model, plan, moments)
    return pipe
