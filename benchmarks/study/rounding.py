"""What other ways of GPTQ rounding do to the pictures: python -m benchmarks rounding

Every layer is W8A8, dynamic or rotated as its own noise says, and the weights are rounded to nearest, by GPTQ as it
is built in, or by one of its variations: other damping, inputs as they come, scales that the Hessian chooses in
place of the largest weight. By the layers' inputs, or by the end of the trajectory. Held-out captions are drawn.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.harness import results
from benchmarks.harness.tables import markdown
from benchmarks.study import verdict
from benchmarks.study.evaluation import TEST_SEED, Setup, with_unet
from benchmarks.study.own_plans import on_layers, own_plans, plan_of, quantized
from benchmarks.study.remedies import LEFT_OUT
from benchmarks.study.subjects import SUBJECTS, Subject
from ldmq_kernels.calibration.calibrate import calibrate
from ldmq_kernels.calibration.denoisers import denoiser
from ldmq_kernels.calibration.ranges import ALL_STEPS
from ldmq_kernels.calibration.settings import SamplingSettings
from ldmq_kernels.calibration.trajectory import record_trajectory
from ldmq_kernels.demo.run import CALIBRATION_PROMPTS, calibration_captions, held_out_captions
from ldmq_kernels.numerics import gptq
from ldmq_kernels.numerics.formats import SCHEMES, int8, rounding
from ldmq_kernels.numerics.gptq import Hessian
from ldmq_kernels.numerics.kronecker import KroneckerHessian
from ldmq_kernels.planning.drawn import FloatEnds, Spread
from ldmq_kernels.planning.request import split_calls
from ldmq_kernels.plans.plan import Plan
from ldmq_kernels.sensitivity.analysis import analyze

ONE_PRODUCT = ("w8a8-dynamic", "w8a8-rotated")
DAMPINGS = (0.003, 0.03)
SHARES = (1.0, 0.98, 0.96, 0.94, 0.92, 0.9, 0.87, 0.84, 0.8)  # of the largest weight that a scale covers
BUILT_IN = "as built in: damping 0.01, inputs of most power first, the largest weight sets the scale"


def _damped(by: float) -> AbstractContextManager[Any]:
    return mock.patch.object(gptq, "DAMPING", by)


def _as_they_come() -> AbstractContextManager[Any]:
    """GPTQ from the first input to the last, whatever their power."""
    return mock.patch.object(gptq.torch, "argsort", lambda power, **_: torch.arange(len(power) - 1, -1, -1))


def scaled_by_hessian(weight: Tensor, hessian: Hessian | None = None) -> tuple[Tensor, Tensor]:
    """As `quantize_weight_int8`, with the scale of `SHARES` for each output whose error counts least once rounded."""
    if hessian is None:
        return QUANTIZE(weight)
    inputs = hessian.inputs if isinstance(hessian, KroneckerHessian) else hessian
    flat = weight.float().flatten(1)
    largest = (flat.abs().amax(1) / int8.INT8_MAX).clamp_min(rounding.SMALLEST_SCALE)
    order = gptq.rounding_order(inputs, flat.shape[1])
    errors = []
    for share in SHARES:
        steps = (share * largest)[:, None].expand_as(flat)
        error = flat - steps * gptq.gptq_round(flat, steps, gptq.integers_up_to(int8.INT8_MAX), order)
        errors.append(((error @ inputs) * error).sum(1))
    scale = largest * torch.tensor(SHARES)[torch.stack(errors).argmin(0)]
    steps = rounding.per_channel(scale, weight)
    return rounding.rounded(weight.float(), steps, int8.INT8_MAX, rounding.order_of(weight, hessian)), scale


QUANTIZE = int8.quantize_weight_int8
VARIATIONS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    BUILT_IN: contextlib.nullcontext,
    **{f"damping {by}": lambda by=by: _damped(by) for by in DAMPINGS},
    "inputs as they come": _as_they_come,
    "scales by the Hessian": lambda: mock.patch.object(int8, "quantize_weight_int8", scaled_by_hessian),
}
OF_THE_END = (BUILT_IN, "scales by the Hessian")


def _plan(setup: Setup, subject: Subject) -> Plan:
    """Every layer in W8A8 with the quieter of two schemes; those that SDNQ computes in float hold int8 weights."""
    calibration = own_plans(setup).calibration(ALL_STEPS)
    found = analyze(setup.pipe, calibration, [SCHEMES[name] for name in ONE_PRODUCT], exact=0)
    choices = {name: min(each, key=lambda c: c.noise).layer_plan for name, each in found.candidates.items() if each}
    computed = [name for name in choices if name not in LEFT_OUT[subject.name]]
    return plan_of(setup.unet, on_layers(choices, list(choices), computed), calibration)


def _cases(plan: Plan, model: torch.nn.Module) -> Iterator[tuple[str, str, Plan]]:
    """What weights are rounded by, the variation's words, and the plan."""
    yield "nearest", BUILT_IN, plan
    by_inputs, by_the_end = plan.with_gptq(model), plan.with_gptq(model, end=True)
    yield from (("inputs", words, by_inputs) for words in VARIATIONS)
    yield from (("the end", words, by_the_end) for words in OF_THE_END)


def measured(subject: Subject, captions: int) -> list[dict[str, Any]]:
    """A row for each way of rounding on one model."""
    pipe, settings = subject.load(torch.float32), SamplingSettings(subject.steps, subject.guidance_scale, 0)
    pipe.set_progress_bar_config(disable=True)
    calibrated_on, verified_on = split_calls(calibration_captions(CALIBRATION_PROMPTS))
    setup = Setup(pipe, calibrate(pipe, calibrated_on, settings), record_trajectory(pipe, verified_on, settings))
    texts = [text for text, _ in held_out_captions(captions)]
    ends, rows = FloatEnds(pipe, texts, replace(settings, seed=TEST_SEED)), []
    for by, words, plan in _cases(_plan(setup, subject), denoiser(pipe)):
        with VARIATIONS[words]():
            model = quantized(setup, plan)
        drawn = with_unet(pipe, model, ends.compare)
        by_picture = {measure: list(decibels) for measure, decibels in drawn.by_picture.items()}
        rows.append({"op": "drawn", "model": subject.name, "by": by, "variation": words, "by_picture": by_picture})
        print(_line(rows[-1]), flush=True)
    return rows


def _line(row: dict[str, Any]) -> list[str]:
    psnr, latent = (Spread.of(row["by_picture"][measure]) for measure in ("psnr", "latent"))
    words = "" if row["by"] == "nearest" else row["variation"]
    return [row["model"], row["by"], words, f"{psnr.mean:.2f}", f"{psnr.worst_tenth:.2f}", f"{latent.mean:.2f}"]


def table(data: dict[str, Any]) -> str:
    """Ways of rounding and what they do to the pictures, for the pages."""
    found = []
    for by in ("inputs", "the end"):
        tried = verdict.by_words([row for row in data["rows"] if row["by"] == by], "variation")
        found += [f"by {by}, {words}" for words in verdict.paying(tried, tried.get(BUILT_IN, {}))]
    words = (
        f"**Other ways of GPTQ** ({len(data['rows'][0]['by_picture']['psnr'])} held-out captions, W8A8, dynamic or "
        f"rotated; {data['device']}, torch {data['torch']}, commit {(data.get('commit') or 'none')[:10]}). "
        f"{verdict.told(found, 'GPTQ as it is built in')}"
    )
    head = ["model", "rounded by", "how", "PSNR, dB: mean of pictures", "worst tenth", "SQNR of the latent, dB"]
    return f"{words}\n\n" + markdown(head, [_line(row) for row in data["rows"]])


def main(arguments: list[str]) -> None:
    """Measure both models and write the results file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks rounding", description=__doc__.splitlines()[0])
    parser.add_argument("--captions", type=int, default=16, help="held out, drawn once each")
    options = parser.parse_args(arguments)
    results.check_keep("rounding")
    rows = [row for subject in SUBJECTS.values() for row in measured(subject, options.captions)]
    print(f"written: {results.keep('rounding', rows, {})}")
