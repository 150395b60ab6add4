"""Calibrate, analyse, choose, verify on what was not calibrated on, and repair."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ldmq_kernels.calibration.calibrate import calibrate
from ldmq_kernels.calibration.ranges import FIRST_STEP
from ldmq_kernels.calibration.trajectory import SamplingSettings, Trajectory, denoiser, record_trajectory
from ldmq_kernels.numerics.formats import parse_schemes
from ldmq_kernels.planning.choice import SQNR
from ldmq_kernels.planning.session import PlanResult, Session
from ldmq_kernels.planning.target import Target
from ldmq_kernels.planning.times import LayerTimes, measure_times
from ldmq_kernels.planning.trial import measure_plan
from ldmq_kernels.plans.plan import Plan
from ldmq_kernels.sensitivity.analysis import ANALYSED_STEPS, Analysis, analyze

__all__ = ["DEFAULT_FORMATS", "HELD_OUT_SEED", "PlanResult", "Target", "make_plan", "measure_plan", "plan"]

logger = logging.getLogger(__name__)

DEFAULT_FORMATS = ("w8a8", "w8a16", "fp16")
HELD_OUT_SEED = 1_000_003  # far from the seeds that calibration counts up from
HELD_OUT, SAME_PROMPTS = "held-out prompts", "the calibration's own prompt, from another seed"


def split_prompts(prompts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Prompts to calibrate on, and prompts to verify on: the last quarter, or all where there are too few."""
    unique = [text.strip() for text in prompts if text.strip()]
    if not unique:
        raise ValueError("there is no prompt: give at least one line of text to calibrate on")
    held = max(1, len(unique) // 4)
    return (unique[:-held], unique[-held:]) if len(unique) > 1 else (unique, unique)


def plan_from_analysis(
    model: nn.Module,
    analysis: Analysis,
    held_out: Trajectory,
    target: Target,
    formats: Sequence[str],
    *,
    signals: Sequence[str] = (SQNR,),
    times: LayerTimes | None = None,
    hybrid: float = 0.0,
) -> PlanResult:
    """Solve, verify on the held-out trajectory, and ask again until the target is met and not by far exceeded.

    Args:
        times: of the layers, where the target or the user asks for them; see `planning.times.measure_times`.

    See `session.Session` for the others.

    Raises:
        PlanError: the target cannot be met; the text says what can.
    """
    if times is None and target.needs_times:
        times = measure_layers(model, analysis)
    session = Session(model, analysis, held_out, formats, signals=signals, times=times, hybrid=hybrid)
    return session.plan(target)


def measure_layers(model: nn.Module, analysis: Analysis, *, show: bool = False) -> LayerTimes:
    """Times of all layers for one picture, on the device that the model is on."""
    return measure_times(model, analysis, analysis.calibration.trajectory.calls[0].of_prompts([0]), show=show)


def analyzed(
    pipe: Any,
    prompts: Sequence[str],
    formats: Sequence[str],
    *,
    calibration_mode: str = FIRST_STEP,
    settings: SamplingSettings | None = None,
    analysed_steps: int = ANALYSED_STEPS,
    signals: Sequence[str] = (SQNR,),
    work_dir: Path | None = None,
    show: bool = False,
) -> tuple[Analysis, Trajectory, str]:
    """Calibrate and analyse on most prompts, and record the float trajectory of the others.

    Returns:
        The analysis, the held-out trajectory, and in words what it was recorded on.
    """
    calibrated_on, verified_on = split_prompts(prompts)
    settings = settings or SamplingSettings()
    calibration = calibrate(pipe, calibrated_on, settings, mode=calibration_mode, show=show)
    schemes = parse_schemes(tuple(formats))
    analysis = analyze(
        pipe, calibration, schemes, analysed_steps=analysed_steps, signals=signals, work_dir=work_dir, show=show
    )
    others = replace(settings, seed=settings.seed + HELD_OUT_SEED)
    held_out = record_trajectory(pipe, verified_on, others, show=show)
    if calibrated_on != verified_on:
        return analysis, held_out, HELD_OUT
    logger.warning("there is one prompt: the plan is verified on %s; give more prompts to tell more", SAME_PROMPTS)
    return analysis, held_out, SAME_PROMPTS


def make_plan(
    pipe: Any,
    prompts: Sequence[str],
    target: Target,
    *,
    formats: Sequence[str] = DEFAULT_FORMATS,
    calibration_mode: str = FIRST_STEP,
    settings: SamplingSettings | None = None,
    analysed_steps: int = ANALYSED_STEPS,
    signals: Sequence[str] = (SQNR,),
    hybrid: float = 0.0,
    time_layers: bool = False,
    work_dir: Path | None = None,
    show: bool = False,
) -> PlanResult:
    """The whole method on a full-precision pipeline. See `plan` for the arguments."""
    names = [str(scheme) for scheme in parse_schemes(tuple(formats))]
    analysis, held_out, verified_on = analyzed(
        pipe,
        prompts,
        names,
        calibration_mode=calibration_mode,
        settings=settings,
        analysed_steps=analysed_steps,
        signals=signals,
        work_dir=work_dir,
        show=show,
    )
    model = denoiser(pipe)
    times = measure_layers(model, analysis, show=show) if time_layers or target.needs_times else None
    result = plan_from_analysis(model, analysis, held_out, target, names, signals=signals, times=times, hybrid=hybrid)
    result.plan.measured["verified_on"] = verified_on
    return result


def plan(
    pipe: Any,
    prompts: Sequence[str],
    *,
    target_sqnr_db: float | None = None,
    target_bytes: int | None = None,
    target_milliseconds: float | None = None,
    target_layers: int | None = None,
    formats: Sequence[str] = DEFAULT_FORMATS,
    calibration_mode: str = FIRST_STEP,
    signals: Sequence[str] = (SQNR,),
    hybrid: float = 0.0,
    time_layers: bool = False,
    num_inference_steps: int = 20,
    guidance_scale: float = 7.5,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    work_dir: str | Path | None = None,
    show_progress: bool = True,
    out: str | Path | None = None,
) -> Plan:
    """Choose a precision for every linear and convolution of a pipeline's UNet.

    Targets may be combined: the first of noise, bytes and milliseconds that is not limited is made as small as
    the others allow.

    Args:
        pipe: a diffusers text-to-image pipeline in full precision.
        prompts: what the pipeline will be used for; the last quarter verifies the plan. A single one is verified
            on itself, from another seed.
        target_sqnr_db: least SQNR of the UNet output along the float trajectory, averaged over sampling steps.
        target_bytes: most bytes of the UNet's quantizable weights.
        target_milliseconds: most time of one UNet call for one picture on the pipeline's device.
        target_layers: most layers that may stay in 16 bit.
        formats: formats or schemes to choose among; "w8a8" stands for static, timestep, dynamic and split.
        calibration_mode: "first-step" (the paper's single sampling step), "sampled-steps" or "all-steps": which steps
            a static range starts from. The search widens it where the analysed trajectory shows more.
        signals: "sqnr", and "ssim" to keep the structure of pictures too; see `planning.choice.Chooser`.
        hybrid: share of the noise whose blocks start with higher precision, as in the paper; 0 for none.
        time_layers: time the layers on the pipeline's device, as targets in milliseconds do: a layer that would get
            slower stays in 16 bit.
        height: of the pictures in pixels, as the pipeline draws by default if None; and `width` alike.
        work_dir: keeps the analysis, so that the same call goes on after a kill.
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
        Target(target_sqnr_db, target_bytes, target_milliseconds, target_layers),
        formats=formats,
        calibration_mode=calibration_mode,
        settings=SamplingSettings(num_inference_steps, guidance_scale, seed, height, width),
        signals=signals,
        hybrid=hybrid,
        time_layers=time_layers,
        work_dir=None if work_dir is None else Path(work_dir),
        show=show_progress,
    )
    if out is not None:
        result.plan.save(out)
    return result.plan
