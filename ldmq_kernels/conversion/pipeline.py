"""`ldmq.quantize`: a plan, however it is given, or one scheme, applied to a pipeline or a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from ldmq_kernels.calibration.trajectory import denoiser
from ldmq_kernels.conversion.convert import check_convertible, convert
from ldmq_kernels.conversion.hessian import RecordedHessians
from ldmq_kernels.numerics.formats import SCHEMES
from ldmq_kernels.plans.plan import Plan, PlanError, uniform_plan

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


def quantize(
    pipe: T,
    plan: Plan | str | Path | Mapping[str, Any] | None = None,
    *,
    scheme: str | None = None,
    show_progress: bool = True,
) -> T:
    """Quantize a pipeline's UNet (or transformer), or a model, in place.

        ldmq.quantize(pipe, plan)
        ldmq.quantize(model, scheme="w8a8-dynamic")

    Afterwards `save_pretrained` writes the quantized model, and `from_pretrained` gives it back. Where the plan
    rounds weights by GPTQ, the pipeline first draws the plan's calibration prompts again. A plan that was made from
    other weights of the same shapes is applied, with a warning.

    Args:
        pipe: a diffusers pipeline, or a model.
        plan: a plan, the path of its file, or its JSON object.
        scheme: in place of a plan, one scheme for all layers that can have it; it needs no calibration, so it is not
            static.
        show_progress: show the calibration that GPTQ needs, on standard error.

    Returns:
        `pipe` itself.

    Raises:
        PlanError: neither or both of plan and scheme are given, the plan is damaged or made for another model, or the
            scheme is unknown or static.
        ConversionError: the model is quantized already or has adapters on it, one of its layers cannot be quantized,
            or the plan needs the pipeline and has only the model; it is unchanged.
        TypeError: the pipeline has neither a UNet nor a transformer.
    """
    if (plan is None) == (scheme is None):
        raise PlanError("give either a plan, or a scheme for all layers such as scheme='w8a8-dynamic'")
    if isinstance(plan, str) and plan in SCHEMES:
        raise PlanError(f"{plan!r} is a scheme and no plan file: call ldmq.quantize(..., scheme={plan!r})")
    model = pipe if isinstance(pipe, nn.Module) else denoiser(pipe)
    if plan is None:
        assert scheme is not None
        plan = uniform_plan(model, scheme)
    plan = as_plan(plan)
    hessian_of = None
    if plan.needs_inputs and not isinstance(pipe, nn.Module):
        check_convertible(model)
        hessian_of = RecordedHessians(pipe, plan, show=show_progress)
    convert(model, plan, hessian_of)
    return pipe
