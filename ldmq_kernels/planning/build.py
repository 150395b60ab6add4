"""From an assignment of schemes to the plan file's content: rules, exceptions, and why."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ldmq_kernels.calibration.calibrate import Calibration
from ldmq_kernels.calibration.settings import recorded
from ldmq_kernels.numerics.formats import FLOAT, SCHEMES
from ldmq_kernels.planning.rules import compress
from ldmq_kernels.planning.target import Target
from ldmq_kernels.planning.times import LayerTimes
from ldmq_kernels.plans.blocks import block_of
from ldmq_kernels.plans.plan import LayerPlan, Plan, model_record
from ldmq_kernels.sensitivity.analysis import Analysis
from ldmq_kernels.sensitivity.output_noise import finite_db


def build_plan(
    model: nn.Module,
    analysis: Analysis,
    schemes: Mapping[str, str],
    target: Target,
    formats: Sequence[str],
    *,
    sensitive: Collection[str] = (),
    times: LayerTimes | None = None,
    weights: Mapping[str, str] | None = None,
) -> Plan:
    """The plan that gives every layer its scheme, as the analysis' candidates have it.

    Args:
        schemes: layer -> scheme, of all layers.
        sensitive: the blocks that had to start with higher precision.
        times: the times by which layers that would get slower stayed in 16 bit.
        weights: the `weights_record` of the model.
    """
    rules, exceptions = compress(schemes)
    calibration = analysis.calibration
    plan = Plan(model_record(model), rules, target=target.to_dict())
    if weights is not None:
        plan.model["weights"] = dict(weights)
    plan.timestep_groups = list(calibration.timestep_groups)
    precise = {name: block for name in exceptions if (block := block_of(model, name)) in sensitive}
    reasons = {name: _reason(name, schemes[name], analysis, precise.get(name), times) for name in exceptions}
    for name, scheme in schemes.items():
        candidate = None if scheme == str(FLOAT) else analysis.candidate(name, scheme)
        reason = reasons.get(name, "")
        plan.set(
            name,
            LayerPlan(SCHEMES[scheme], reason) if candidate is None else replace(candidate.layer_plan, reason=reason),
        )
    plan.calibration = {
        "mode": calibration.mode,
        **_drawn(calibration),
        **recorded(calibration.settings),
        "analysed_steps": analysis.steps,
        "timestep_groups": list(calibration.timestep_groups),
        "formats": list(formats),
    }
    return plan


def _drawn(calibration: Calibration) -> dict[str, Any]:
    """What the plan says of what was drawn: the texts of prompts; of pipeline calls and functions how many."""
    texts = [call for call in calibration.calls if isinstance(call, str)]
    if len(texts) == len(calibration.calls):
        return {"prompts": len(texts), "texts": texts}
    return {"calls": len(calibration.calls)}


def _alone(analysis: Analysis, name: str, scheme: str) -> float:
    return finite_db(analysis.output[name, scheme].mean_power)


def _reason(name: str, scheme: str, analysis: Analysis, sensitive: str | None, times: LayerTimes | None) -> str:
    if name not in analysis.candidates:
        return "never ran in calibration"
    candidates = analysis.candidates[name]
    if sensitive is not None and SCHEMES[scheme].is_precise:
        first = f"sensitive block {sensitive}"
        return (
            first if scheme == str(FLOAT) else f"{first}; alone {_alone(analysis, name, scheme):.1f} dB at the output"
        )
    if scheme != str(FLOAT):
        words = [f"alone {_alone(analysis, name, scheme):.1f} dB at the output"]
        static = next((c for c in candidates if c.scheme.activations.name == "static"), None)
        if static is not None and str(static.scheme) != scheme:
            noise = _alone(analysis, name, str(static.scheme))
            words.append(f"{static.scheme} {noise:.1f} dB, input grows {analysis.drift()[name]:.2f}x over the steps")
        return "; ".join(words)
    if not candidates:
        return "none of the formats fits this layer"
    if times is not None:
        unchanged = times.layers[name, scheme]
        fastest = min(times.layers[name, str(c.scheme)] for c in candidates)
        if fastest > unchanged:
            where = f", predicted for {times.predicted_for}" if times.predicted_for else ""
            return f"slower when quantized: {fastest:.3f} ms in place of {unchanged:.3f} ms{where}"
    best = max(candidates, key=lambda c: _alone(analysis, name, str(c.scheme)))
    return f"even {best.scheme} alone leaves {_alone(analysis, name, str(best.scheme)):.1f} dB at the output"
