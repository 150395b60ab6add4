"""`ldmq.quantize`: a plan, however it is given, or one scheme, applied to a pipeline or a model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from ldmq_kernels.calibration.denoisers import chosen, denoiser, denoisers
from ldmq_kernels.calibration.drawings import given_calls
from ldmq_kernels.conversion.convert import check_convertible, convert
from ldmq_kernels.conversion.hessian import RecordedHessians
from ldmq_kernels.conversion.summary import summarize
from ldmq_kernels.nn import QuantizedLayer
from ldmq_kernels.numerics.formats import SCHEMES
from ldmq_kernels.plans.plan import Plan, PlanError, uniform_plan

logger = logging.getLogger(__name__)

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
    modules_to_not_convert: Sequence[str] = (),
    calls: Sequence[Mapping[str, Any]] | Mapping[str, Any] | None = None,
    forward_loop: Callable[[Any], Any] | Sequence[Callable[[Any], Any]] | None = None,
    show_progress: bool = True,
) -> T:
    """Quantize a pipeline's UNet (or transformer), or a model, in place.

        ldmq.quantize(pipe, plan)
        ldmq.quantize(model, scheme="w8a8-dynamic")

    Afterwards `save_pretrained` writes the quantized model, and `from_pretrained` gives it back. Where the plan
    rounds weights by GPTQ, the pipeline first draws again what the plan was made from. A plan of one denoiser leaves
    the pipeline's others in float, and says so; a scheme is given to all of them. A plan that was made from
    other weights of the same shapes is applied, with a warning.

    Args:
        pipe: a diffusers pipeline, or a model.
        plan: a plan, the path of its file, or its JSON object.
        scheme: in place of a plan, one scheme for all layers that can have it; it needs no calibration, so it is not
            static.
        modules_to_not_convert: names of layers, or of modules that hold some, that stay in float beside a scheme; see
            `plans.plan.uniform_plan`.
        calls: what the plan was made from, as `ldmq.plan` was given it, where the plan rounds by GPTQ; a plan file
            holds prompts alone. `forward_loop` alike.
        show_progress: show the calibration that GPTQ needs, on standard error.

    Returns:
        `pipe` itself.

    Raises:
        PlanError: neither or both of plan and scheme are given, the plan is damaged or made for another model, or the
            scheme is unknown or static.
        ConversionError: the model is quantized already or has adapters fused into it, one of its layers cannot be
            quantized, or the plan needs the pipeline and has only the model; it is unchanged.
        TypeError: the pipeline has neither a UNet nor a transformer.
    """
    if (plan is None) == (scheme is None):
        raise PlanError("give either a plan, or a scheme for all layers such as scheme='w8a8-dynamic'")
    if plan is not None and modules_to_not_convert:
        raise PlanError("modules_to_not_convert goes with a scheme: a plan says itself what stays in float")
    if isinstance(plan, str) and plan in SCHEMES:
        raise PlanError(f"{plan!r} is a scheme and no plan file: call ldmq.quantize(..., scheme={plan!r})")
    if plan is None:
        assert scheme is not None
        models = [pipe] if isinstance(pipe, nn.Module) else _denoisers(pipe)
        plans = {model: uniform_plan(model, scheme, modules_to_not_convert) for model in models}
        for model in models:
            check_convertible(model)  # all or none
        for model, of_model in plans.items():
            convert(model, of_model)
            _say_what_has_no_scheme(model)
        return pipe
    plan = as_plan(plan)
    if isinstance(pipe, nn.Module):
        convert(pipe, plan)
        _say_what_has_no_scheme(pipe)
        return pipe
    planned = chosen(pipe, plan.model.get("part"))
    model = denoiser(planned)
    hessian_of = None
    if plan.needs_inputs:
        check_convertible(model)
        drawn = () if calls is None and forward_loop is None else given_calls(None, calls, forward_loop)
        hessian_of = RecordedHessians(planned, plan, drawn, show=show_progress)
    convert(model, plan, hessian_of)
    _say_what_has_no_scheme(model)
    for name, other in denoisers(pipe).items() if model in denoisers(pipe).values() else ():
        if other is not model and not any(isinstance(m, QuantizedLayer) for m in other.modules()):
            logger.warning(
                "%s stays in float: plan it too, by ldmq.plan(pipe, ..., part=%r), before its pipeline is quantized",
                name,
                name,
            )
    return pipe


def _say_what_has_no_scheme(model: nn.Module) -> None:
    """Tell what of a model that is quantized now could not be, such as 3-D convolutions."""
    summary = summarize(model)
    for kind, modules in summary.without_scheme.items():
        share = sum(module.bytes for module in modules) / summary.bytes_before
        logger.warning(
            "%d %s of this %s stay in float, %.1f %% of its bytes, since there is no scheme for them: %s",
            len(modules),
            kind,
            type(model).__name__,
            100 * share,
            ", ".join(module.name for module in modules),
        )


def _denoisers(pipe: Any) -> list[nn.Module]:
    """All denoisers of a pipeline that has one at least."""
    return [*denoisers(pipe).values()] or [denoiser(pipe)]
