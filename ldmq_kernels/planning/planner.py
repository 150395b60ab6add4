"""Calibrate, analyse, choose, verify on what was not calibrated on, and repair."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ldmq_kernels.calibration.adjoint import is_whole
from ldmq_kernels.calibration.autoencoders import WHICH, is_autoencoder, takes_a_timestep
from ldmq_kernels.calibration.calibrate import calibrate
from ldmq_kernels.calibration.denoisers import ENCODERS, chosen, denoiser, denoiser_name, denoisers, whole_pipeline
from ldmq_kernels.calibration.drawings import check_calls, given_calls
from ldmq_kernels.calibration.ranges import ALL_STEPS, FIRST_STEP
from ldmq_kernels.calibration.settings import SamplingSettings, Settings, changed, each_of, with_defaults
from ldmq_kernels.calibration.trajectory import Trajectory, record_trajectory
from ldmq_kernels.kernels.devices import device_of
from ldmq_kernels.numerics.formats import parse_schemes
from ldmq_kernels.planning.assignment import SQNR
from ldmq_kernels.planning.drawn import LARGE_PICTURES, PICTURES, EndCheck, FloatEnds, with_more_seeds
from ldmq_kernels.planning.options import independent_of_cuts
from ldmq_kernels.planning.predicted_times import predict_times
from ldmq_kernels.planning.request import PlanRequest
from ldmq_kernels.planning.session import PlanResult, Session
from ldmq_kernels.planning.target import Target
from ldmq_kernels.planning.times import LayerTimes, cache_file, measure_times
from ldmq_kernels.plans.plan import Plan, plan_output
from ldmq_kernels.sensitivity.analysis import Analysis, analyze, open_work

logger = logging.getLogger(__name__)

HELD_OUT_SEED = 1_000_003  # far from the seeds that calibration counts up from
HELD_OUT, SAME_PROMPTS = "held-out prompts", "the calibration's own prompt, from another seed"
HELD_OUT_CALLS, SAME_CALL = "held-out calls", "the calibration's own call, from another seed"


def measure_layers(
    model: nn.Module, analysis: Analysis, *, predicted_for: str | None = None, show: bool = False
) -> LayerTimes:
    """Times of all layers for one picture, on the device that the model is on, or predicted for one of the table."""
    first = analysis.calibration.trajectory.calls[0]
    call = first.of_prompts(first.prompts[:1])
    if predicted_for is not None:
        return predict_times(model, analysis, call, device_of(predicted_for))
    return measure_times(model, analysis, call, path=cache_file(call.output.device), show=show)


def held_out_settings(settings: Settings) -> tuple[SamplingSettings, ...]:
    """The settings that held-out pictures are drawn with: seeds that calibration never reaches."""
    return tuple(replace(one, seed=one.seed + HELD_OUT_SEED) for one in each_of(settings))


def analyzed(pipe: Any, request: PlanRequest) -> tuple[Analysis, Trajectory, str]:
    """Calibrate and analyse on most prompts or calls, and record the float trajectory of the others.

    Returns:
        The analysis, the held-out trajectory, and in words what it was recorded on.

    Raises:
        ValueError: the pipeline does not take what a call gives, which is said before anything is drawn.
    """
    calibrated_on, verified_on = request.calibration_calls, request.held_out_calls
    check_calls(pipe, [*calibrated_on, *verified_on], request.settings)
    schemes, mode = parse_schemes(request.schemes), request.calibration_mode
    open_work(
        pipe, request.work_dir, calibrated_on, request.settings, mode, schemes, ends=request.ends
    )  # refused first
    calibration = calibrate(pipe, calibrated_on, request.settings, mode=mode, show=request.show)
    analysis = analyze(
        pipe,
        calibration,
        schemes,
        signals=request.signals,
        ends=request.ends,
        work_dir=request.work_dir,
        show=request.show,
    )
    held_out = record_trajectory(pipe, verified_on, held_out_settings(request.settings), show=request.show)
    of_prompts = all(isinstance(call, str) for call in (*calibrated_on, *verified_on))
    if calibrated_on != verified_on if of_prompts else not request.has_one_call:
        return analysis, held_out, HELD_OUT if of_prompts else HELD_OUT_CALLS
    what, verified = ("prompt", SAME_PROMPTS) if of_prompts else ("call", SAME_CALL)
    logger.warning("there is one %s: the plan is verified on %s; give more to tell more", what, verified)
    return analysis, held_out, verified


def open_session(pipe: Any, request: PlanRequest) -> Session:
    """Calibrate, analyse, and time the layers where the request needs it: all that plans for any target share."""
    if request.ends and request.part in ENCODERS:
        raise ValueError(f"{request.part} draws nothing itself: give target_sqnr_db, for what it gives the denoiser")
    pipe = chosen(pipe, request.part)
    model = denoiser(pipe)
    request = request.with_room(model)
    if not takes_a_timestep(model):
        request = without_timesteps(request, model)
    analysis, held_out, verified_on = analyzed(pipe, request)
    if request.cut_latents:
        analysis = replace(analysis, candidates=independent_of_cuts(model, analysis.candidates))
    return Session(
        model,
        analysis,
        held_out,
        request.schemes,
        signals=request.signals,
        times=measure_layers(model, analysis, predicted_for=request.times_for, show=request.show)
        if request.needs_times
        else None,
        hybrid=request.hybrid,
        verified_on=verified_on,
        part=None if denoiser_name(pipe) == next(iter(denoisers(pipe)), None) else denoiser_name(pipe),
        ends=end_check(pipe, request, analysis) if request.ends else None,
    )


def end_check(pipe: Any, request: PlanRequest, analysis: Analysis) -> EndCheck:
    """Draw in float what plans for the end of the trajectory are judged by.

    Raises:
        ValueError: the pipeline gives no latents, or the request is for PSNR and its latents cannot be decoded.
    """
    pictures = PICTURES if is_whole(denoiser(pipe)) else LARGE_PICTURES
    verified_on, calibration = with_more_seeds(request.held_out_calls, pictures), analysis.calibration
    held_out = FloatEnds(pipe, verified_on, held_out_settings(request.settings), show=request.show)
    if request.measure not in held_out.measures:
        raise ValueError(
            f"{type(whole_pipeline(pipe)).__name__} has no VAE that decodes its latents as they are: give a target for "
            "the latents, target_latent_db"
        )
    calibrated = FloatEnds(pipe, calibration.calls, calibration.settings, calibration.trajectory.outputs)
    return EndCheck(request.measure, held_out, calibrated)


def make_plan(pipe: Any, request: PlanRequest) -> PlanResult:
    """The whole method on a full-precision pipeline: the verified plan, with what it was made from.

    Raises:
        ValueError: the request has no target, the model is quantized, or it computes values that are not finite.
        PlanError: the target cannot be met; the text says what can.
    """
    if request.target is None:
        raise ValueError("the request has no target: give it one, such as Target(sqnr_db=38)")
    if request.target.psnr_db is not None and is_autoencoder(denoiser(chosen(pipe, request.part))):
        return _plan_of_decoded(pipe, request, request.target)
    return open_session(pipe, request).plan(request.target)


def without_timesteps(request: PlanRequest, model: nn.Module) -> PlanRequest:
    """The request for a model that is called without a timestep: no timestep groups, and ranges from all its calls.

    Raises:
        ValueError: the request is for the end of the trajectory, which such a model is not followed to.
    """
    if request.ends:
        raise ValueError(
            f"a {type(model).__name__} is planned for its own output: give target_sqnr_db"
            + (", or target_psnr_db for the decoded picture" if is_autoencoder(model) else "")
        )
    schemes = [str(scheme) for scheme in parse_schemes(request.schemes) if not scheme.has_timestep_scales]
    return replace(request, formats=schemes, calibration_mode=ALL_STEPS)


def _plan_of_decoded(pipe: Any, request: PlanRequest, target: Target) -> PlanResult:
    """The plan of an autoencoder for a PSNR of the decoded pictures.

    Noise and pictures have one power each: with values in [-1, 1] the PSNR is the SQNR and what the power of the
    pictures is short of 4, that of black against white.

    Raises:
        ValueError: the pipeline's calls encode, too, or never decode.
    """
    own = replace(target, psnr_db=None, sqnr_db=target.psnr_db)
    session = open_session(pipe, replace(request, target=own))
    calls = [*session.analysis.calibration.trajectory.calls, *session.held_out.calls]
    if any(call.kwargs.get(WHICH) != "decode" for call in calls):
        raise ValueError(
            "target_psnr_db is of decoded pictures, and these calls encode pictures too: give target_sqnr_db, which is "
            "of both outputs"
        )
    powers = [float(call.output.double().square().mean()) for call in session.held_out.calls]
    above = 10 * math.log10(4 * len(powers) / sum(powers))
    assert target.psnr_db is not None
    result = session.plan(replace(own, sqnr_db=target.psnr_db - above))
    result.plan.target = target.to_dict()
    result.plan.measured["held_out_psnr_db"] = round(result.plan.measured["held_out_sqnr_db"] + above, 3)
    return result


def plan(
    pipe: Any,
    prompts: Sequence[str] | str | None = None,
    *,
    calls: Sequence[Mapping[str, Any]] | Mapping[str, Any] | None = None,
    forward_loop: Callable[[Any], Any] | Sequence[Callable[[Any], Any]] | None = None,
    part: str | None = None,
    target_sqnr_db: float | None = None,
    target_latent_db: float | None = None,
    target_psnr_db: float | None = None,
    target_bytes: int | None = None,
    target_milliseconds: float | None = None,
    target_layers: int | None = None,
    formats: Sequence[str] | None = None,
    calibration_mode: str = FIRST_STEP,
    signals: Sequence[str] = (SQNR,),
    hybrid: float = 0.0,
    time_layers: bool = False,
    times_for: str | None = None,
    cut_latents: bool = False,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    scheduler: str | None = None,
    settings: Sequence[Mapping[str, Any]] | None = None,
    work_dir: str | Path | None = None,
    show_progress: bool = True,
    out: str | Path | None = None,
) -> Plan:
    """Choose a precision for every linear and convolution of a pipeline's UNet, or another of its denoisers.

        ldmq.plan(pipe, ["a red cat", "a blue bowl"], target_sqnr_db=38)
        ldmq.plan(pipe, calls=[dict(prompt="a red cat", image=sketch, strength=0.6), ...], target_sqnr_db=38)
        ldmq.plan(pipe, forward_loop=[draw_a_cat, draw_a_bowl], target_sqnr_db=38)

    What is drawn is given in one of three ways, and should be like what the pipeline will be used for. The last
    quarter verifies the plan; one alone is verified on itself, from another seed.

    Targets may be combined: the first of noise, bytes and milliseconds that is not limited is made as small as
    the others allow.

    Args:
        pipe: a diffusers pipeline in full precision.
        prompts: texts, of which several are drawn together; a single one may be given as it is.
        calls: arguments of the pipeline's own call, each a mapping: `dict(prompt=..., image=..., timesteps=...)`. What
            is random has a generator of its own, unless the call gives one.
        forward_loop: functions that take the pipeline and run it once, where nothing else serves. What is random is
            seeded for each.
        part: which denoiser is planned where a pipeline has several, such as "transformer_2"; the first one if None.
            "vae", "controlnet" and "adapter" are planned for their own outputs, as the pipeline calls them: a VAE for
            the decoded pictures, and where the calls encode, for what it encodes too; of several nets each one by its
            place, "controlnet.nets.0". Text and image encoders, such as "text_encoder", are for what they give first.
        target_sqnr_db: least SQNR of the model's output along the float trajectory, averaged over sampling steps.
        target_latent_db: least SQNR of the final latents, in place of it: predicted by the adjoint of the sampler and
            verified by drawing held-out prompts, averaged over pictures. The plan tells the median and the worst tenth.
        target_psnr_db: least PSNR of the pictures against the float ones, alike; of a VAE, of the same latents decoded.
        target_bytes: most bytes of the UNet's quantizable weights.
        target_milliseconds: most time of one UNet call for one picture on the pipeline's device.
        target_layers: most layers that may stay in 16 bit.
        formats: formats or schemes to choose among; "w8a8" stands for static, timestep, dynamic, split and rotated.
            If None: w8a8, w8a16 and fp16, and w4a8 and w4a16 too where the weights take more than `target_bytes` by
            these alone.
        calibration_mode: "first-step" (the paper's single sampling step), "sampled-steps" (four, spread evenly),
            "drawn-steps" (four, from a normal distribution) or "all-steps": which steps a static range starts
            from. The search widens it where the analysed trajectory shows more.
        signals: what a plan without a target in dB keeps: "sqnr" at the UNet's output, "latent" or "psnr" of what is
            drawn; and "ssim" to keep the structure of pictures too, see `planning.assignment.Chooser`.
        hybrid: share of the noise whose blocks start with higher precision, as in the paper; 0 for none.
        time_layers: time the layers on the pipeline's device, as targets in milliseconds do: a layer that would get
            slower stays in 16 bit.
        times_for: another device, such as "h200", whose times are predicted from its data sheet in place of measured
            ones on this; the plan says that they are predicted.
        cut_latents: whether latents will be cut in parts that the model sees one by one, as parallel sampling of videos
            does: convolutions get no scale that is measured over all of their input, which would depend on the cut.
        num_inference_steps: of all that is drawn and does not say itself; if None 20 for prompts, and for calls as
            the pipeline has it by default. 7.5 is the `guidance_scale` of prompts alike.
        seed: of the first one drawn; the others count up.
        height: of the pictures in pixels, as the pipeline draws by default if None; and `width` alike.
        scheduler: the class of diffusers that the pipeline draws with, such as "DPMSolverMultistepScheduler", with the
            configuration of its own one; its own if None.
        settings: several settings to plan for at once, each with what differs from the arguments above:
            `[dict(num_inference_steps=4, guidance_scale=1.0), dict(scheduler="EulerAncestralDiscreteScheduler")]`.
            Everything is drawn at each of them, scales cover all, and the worst must keep the target in dB.
        work_dir: keeps the analysis, so that the same call goes on after a kill; it is made for its owner alone, and
            refused where others may read or write it, or where it holds the work of another model or other settings.
        out: where to write the plan file, which is tried before anything else; an older plan there is replaced.

    Returns:
        The verified plan.

    Raises:
        ValueError: bad arguments, nothing to draw, arguments that the pipeline's call does not take, a quantized model,
            values that are not finite.
        TypeError: the pipeline has no such part.
        PlanError: the target cannot be met; the text says what can.
        OSError: `out` cannot be written, or is something else than a plan.
    """
    drawn = given_calls(prompts, calls, forward_loop)
    plain = SamplingSettings(num_inference_steps, guidance_scale, seed, height, width, scheduler)
    base = plain if prompts is None else with_defaults(plain)
    request = PlanRequest(
        drawn,
        Target(target_sqnr_db, target_bytes, target_milliseconds, target_layers, target_latent_db, target_psnr_db),
        formats=formats,
        calibration_mode=calibration_mode,
        settings=base if settings is None else changed(base, settings),
        signals=signals,
        part=part,
        hybrid=hybrid,
        time_layers=time_layers,
        times_for=times_for,
        cut_latents=cut_latents,
        work_dir=None if work_dir is None else Path(work_dir).expanduser(),
        show=show_progress,
    )
    with contextlib.nullcontext() if out is None else plan_output(out) as write:
        result = make_plan(pipe, request)
        if write is not None:
            write(result.plan)
    return result.plan
