"""Calibrate, analyse, choose, verify on what was not calibrated on, and repair."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldmq_kernels.calibration.calibrate import Calibration, calibrate
from ldmq_kernels.calibration.ranges import FIRST_STEP
from ldmq_kernels.calibration.trajectory import SamplingSettings, Trajectory, denoiser, record_trajectory
from ldmq_kernels.numerics.formats import FLOAT, parse_schemes
from ldmq_kernels.numerics.sqnr import from_db, to_db
from ldmq_kernels.planning import knapsack
from ldmq_kernels.planning.cost import operation_cost, weight_bytes
from ldmq_kernels.planning.plan import Plan, PlanError, model_record, quantizable_layers
from ldmq_kernels.sensitivity.analysis import ANALYSED_STEPS, Analysis, analyze
from ldmq_kernels.sensitivity.local_noise import Candidate, quantized_copy
from ldmq_kernels.sensitivity.output_noise import StepNoise, finite_db, output_noise, swapped

logger = logging.getLogger(__name__)

DEFAULT_FORMATS = ("w8a8", "w8a16", "fp16")
HELD_OUT_SEED = 1_000_003  # far from the seeds that calibration counts up from
REPAIRS = 6
REPAIR_MARGIN_DB = 0.2


@dataclass(frozen=True)
class Target:
    """What a plan must reach: SQNR of the UNet output in dB, averaged over steps, or bytes of weights."""

    sqnr_db: float | None = None
    bytes: int | None = None

    def __post_init__(self) -> None:
        if (self.sqnr_db is None) == (self.bytes is None):
            raise ValueError("give one target: SQNR in dB, or bytes")

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the plan file."""
        return {"sqnr_db": self.sqnr_db} if self.sqnr_db is not None else {"bytes": self.bytes}


@dataclass(frozen=True)
class PlanResult:
    """A plan with what it was made from, for the report."""

    plan: Plan
    analysis: Analysis
    held_out: StepNoise
    predicted_db: float


def split_prompts(prompts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Prompts to calibrate on, and prompts to verify on: the last quarter, or all where there are too few."""
    unique = [text.strip() for text in prompts if text.strip()]
    if not unique:
        raise ValueError("there is no prompt: give at least one line of text to calibrate on")
    held = max(1, len(unique) // 4)
    return (unique[:-held], unique[-held:]) if len(unique) > 1 else (unique, unique)


def make_options(model: nn.Module, analysis: Analysis, allow_float: bool) -> list[knapsack.Option]:
    """Every choice of every layer with its noise at the output, bytes and operations."""
    options = []
    for name, layer in quantizable_layers(model).items():
        if name not in analysis.candidates:
            continue  # a layer that the pipeline never runs stays as it is
        operations = analysis.calibration.operations[name]
        found = analysis.candidates[name]
        for candidate in found:
            noise = analysis.output[name, str(candidate.scheme)].mean_power
            size = weight_bytes(layer, candidate.scheme, smoothed=candidate.smoothing is not None)
            cost = operation_cost(operations, candidate.scheme)
            options.append(knapsack.Option(name, str(candidate.scheme), noise, size, cost))
        if allow_float or not found:
            options.append(
                knapsack.Option(name, str(FLOAT), 0.0, weight_bytes(layer, FLOAT), operation_cost(operations, FLOAT))
            )
    return options


def _choose(options: list[knapsack.Option], target: Target, noise_limit: float) -> dict[str, knapsack.Option]:
    try:
        if target.bytes is not None:
            return knapsack.least_noise(options, target.bytes)
        return knapsack.fewest_bytes(options, noise_limit)
    except knapsack.Infeasible:
        if target.bytes is not None:
            least = int(knapsack.smallest_bytes(options))
            raise PlanError(
                f"{target.bytes} bytes cannot be met: with these formats the weights take at least {least} bytes; "
                "allow a smaller format, such as w4a8"
            ) from None
        most = to_db(knapsack.smallest_noise(options))
        raise PlanError(
            f"{target.sqnr_db} dB cannot be met: with these formats at most about {most:.1f} dB; "
            "lower the target, or allow w8a16 or fp16"
        ) from None


def _reason(choice: knapsack.Option, analysis: Analysis) -> str:
    name = choice.layer
    others = [c for c in analysis.candidates[name] if str(c.scheme) != choice.scheme]
    if choice.scheme == str(FLOAT):
        if not others:
            return "none of the formats fits this layer"
        best = max(others, key=lambda c: finite_db(analysis.output[name, str(c.scheme)].mean_power))
        noise = finite_db(analysis.output[name, str(best.scheme)].mean_power)
        return f"even {best.scheme} alone leaves {noise:.1f} dB at the output"
    words = [f"alone {finite_db(choice.noise):.1f} dB at the output"]
    static = next((c for c in others if c.scheme.is_static), None)
    if static is not None:
        noise = finite_db(analysis.output[name, str(static.scheme)].mean_power)
        words.append(f"{static.scheme} {noise:.1f} dB, input grows {analysis.drift()[name]:.2f}x over the steps")
    return "; ".join(words)


def build_plan(
    model: nn.Module, analysis: Analysis, chosen: dict[str, knapsack.Option], target: Target, formats: Sequence[str]
) -> Plan:
    """The plan file's content: the commonest scheme as the rule, the other layers as exceptions with reasons."""
    common = Counter(o.scheme for o in chosen.values()).most_common(1)[0][0]
    calibration = analysis.calibration
    plan = Plan(model_record(model), [{"pattern": "*", "scheme": common}], target=target.to_dict())
    for name in quantizable_layers(model):
        if name not in chosen:
            plan.exceptions[name] = {"scheme": str(FLOAT), "reason": "never ran in calibration"}
            continue
        if chosen[name].scheme != common:
            reason = _reason(chosen[name], analysis)
            plan.exceptions[name] = {"scheme": chosen[name].scheme, "reason": reason}
        candidate = analysis.candidate(name, chosen[name].scheme)
        if candidate is not None and candidate.smoothing is not None:
            plan.smoothing[name] = candidate.smoothing.cpu()
        scale = _scale_to_note(analysis, name, candidate)
        if scale is not None:
            plan.input_scales[name] = scale
    plan.calibration = {
        "mode": calibration.mode,
        "prompts": len(calibration.prompts),
        "num_inference_steps": calibration.settings.num_inference_steps,
        "guidance_scale": calibration.settings.guidance_scale,
        "seed": calibration.settings.seed,
        "analysed_steps": analysis.steps,
        "formats": list(formats),
    }
    return plan


def _scale_to_note(analysis: Analysis, name: str, chosen: Candidate | None) -> float | None:
    """The static scale that goes with the smoothing that the plan holds, so that a scheme can be edited by hand."""
    if chosen is not None and chosen.scheme.is_static:
        return chosen.input_scale
    if chosen is not None and chosen.smoothing is not None:
        return None
    unsmoothed = (c for c in analysis.candidates[name] if c.scheme.is_static and c.smoothing is None)
    static = next(unsmoothed, None)
    return None if static is None else static.input_scale


def measure_plan(model: nn.Module, plan: Plan, trajectory: Trajectory) -> StepNoise:
    """Noise at the output of the whole quantized model along a float trajectory; the model stays float."""
    modules = quantizable_layers(model)
    copies: dict[str, nn.Module] = {
        name: quantized_copy(modules[name], choice)
        for name, choice in plan.layers(model).items()
        if choice.scheme.quantizes
    }
    with torch.no_grad(), swapped(model, copies):
        return output_noise(model, trajectory)


def plan_from_analysis(
    model: nn.Module, analysis: Analysis, held_out: Trajectory, target: Target, formats: Sequence[str]
) -> PlanResult:
    """Solve, verify on the held-out trajectory, and repair by asking for more until the target is met.

    Raises:
        PlanError: the target cannot be met; the text says what can.
    """
    options = make_options(model, analysis, str(FLOAT) in formats)
    asked = target.sqnr_db if target.sqnr_db is not None else 0.0
    best = -1e9
    for _ in range(1 + REPAIRS):
        chosen = _choose(options, target, from_db(asked))
        plan = build_plan(model, analysis, chosen, target, formats)
        noise = measure_plan(model, plan, held_out)
        predicted = to_db(sum(o.noise for o in chosen.values()))
        size = int(sum(o.bytes for o in chosen.values()))
        float_size = sum(weight_bytes(layer, FLOAT) for layer in quantizable_layers(model).values())
        plan.measured = {
            "held_out_sqnr_db": round(finite_db(0.0) if noise.mean_power == 0 else noise.mean_db, 3),
            "predicted_sqnr_db": round(min(predicted, 200.0), 3),
            "weight_bytes": size,
            "weight_bytes_fp16": float_size,
        }
        if target.sqnr_db is None or noise.mean_power == 0 or noise.mean_db >= target.sqnr_db:
            return PlanResult(plan, analysis, noise, predicted)
        best = max(best, noise.mean_db)
        logger.info("the plan reaches %.2f dB of %.2f on held-out prompts: repairing", noise.mean_db, target.sqnr_db)
        asked += target.sqnr_db - noise.mean_db + REPAIR_MARGIN_DB
    raise PlanError(
        f"{target.sqnr_db} dB is not reached on held-out prompts after {REPAIRS} repairs: the best plan has "
        f"{best:.2f} dB; lower the target, allow more precise formats, or calibrate on more prompts"
    )


def make_plan(
    pipe: Any,
    prompts: Sequence[str],
    target: Target,
    *,
    formats: Sequence[str] = DEFAULT_FORMATS,
    calibration_mode: str = FIRST_STEP,
    settings: SamplingSettings | None = None,
    analysed_steps: int = ANALYSED_STEPS,
    show: bool = False,
) -> PlanResult:
    """The whole method on a full-precision pipeline. See `plan` for the arguments."""
    schemes = parse_schemes(tuple(formats))
    calibrated_on, verified_on = split_prompts(prompts)
    settings = settings or SamplingSettings()
    model = denoiser(pipe)
    calibration: Calibration = calibrate(pipe, calibrated_on, settings, mode=calibration_mode, show=show)
    analysis = analyze(pipe, calibration, schemes, analysed_steps=analysed_steps, show=show)
    held_out_settings = SamplingSettings(
        settings.num_inference_steps, settings.guidance_scale, settings.seed + HELD_OUT_SEED
    )
    held_out = record_trajectory(pipe, verified_on, held_out_settings, show=show)
    return plan_from_analysis(model, analysis, held_out, target, [str(s) for s in schemes])


def plan(
    pipe: Any,
    prompts: Sequence[str],
    *,
    target_sqnr_db: float | None = None,
    target_bytes: int | None = None,
    formats: Sequence[str] = DEFAULT_FORMATS,
    calibration_mode: str = FIRST_STEP,
    num_inference_steps: int = 20,
    guidance_scale: float = 7.5,
    seed: int = 0,
    show_progress: bool = True,
    out: str | Path | None = None,
) -> Plan:
    """Choose a precision for every linear and convolution of a pipeline's UNet.

    Args:
        pipe: a diffusers text-to-image pipeline in full precision.
        prompts: what the pipeline will be used for; the last quarter verifies the plan.
        target_sqnr_db: SQNR of the UNet output along the float trajectory, averaged over sampling
            steps, that the plan must reach with the fewest bytes.
        target_bytes: or bytes of the UNet's quantizable weights within which SQNR is to be highest.
        formats: formats or schemes to choose among; "w8a8" stands for static and dynamic.
        calibration_mode: "first-step" (the paper's single sampling step) or "all-steps".
        out: where to write the plan file.

    Returns:
        The verified plan.

    Raises:
        ValueError: bad arguments, no prompts, a quantized model, values that are not finite.
        PlanError: the target cannot be met; the text says what can.
    """
    result = make_plan(
        pipe,
        prompts,
        Target(target_sqnr_db, target_bytes),
        formats=formats,
        calibration_mode=calibration_mode,
        settings=SamplingSettings(num_inference_steps, guidance_scale, seed),
        show=show_progress,
    )
    if out is not None:
        result.plan.save(out)
    return result.plan
