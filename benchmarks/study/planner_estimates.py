"""How well the method's estimates hold on the demo model, kept as a results file: python -m benchmarks estimates

One row a scheme: the noise that backward probes estimate for each layer beside the noise of running the UNet with
that layer alone quantized, by rank correlation and by the error in dB, all rounded to nearest. Layers' own
noise, which is what an analysis without probes would rank by, stands beside it. Then what plans were predicted to
reach beside what they reach on held-out prompts.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from scipy import stats

from benchmarks.harness import results
from benchmarks.harness.machine import device
from benchmarks.harness.tables import markdown
from ldmq_kernels import demo
from ldmq_kernels.calibration.calibrate import calibrate
from ldmq_kernels.calibration.settings import SamplingSettings
from ldmq_kernels.demo.run import CALIBRATION_PROMPTS, GUIDANCE, STEPS, calibration_captions
from ldmq_kernels.numerics.formats import parse_schemes
from ldmq_kernels.planning.planner import make_plan
from ldmq_kernels.planning.request import PlanRequest, split_calls
from ldmq_kernels.planning.target import Target
from ldmq_kernels.sensitivity.analysis import ALL, Analysis, analyze
from ldmq_kernels.sensitivity.candidates import Method
from ldmq_kernels.sensitivity.output_noise import finite_db

FORMATS = ("w8a8", "w4a8-static", "w4a8-rotated", "w8a16", "w4a16")
PLANS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("w8a8",), 41.5),
    (("w8a8", "w8a16", "fp16"), 38.0),
    (("w4a8", "w8a8", "w8a16", "fp16"), 34.0),
)


def agreement(analysis: Analysis, scheme: str) -> dict[str, Any]:
    """Estimates of one scheme beside exact runs, over all layers."""
    keys = [key for key in analysis.exact if key[1] == scheme]
    exact = np.array([analysis.output[key].mean_power for key in keys])
    estimated = np.array([analysis.estimates[key].mean_power for key in keys])
    own = [next(c.noise for c in analysis.candidates[name] if str(c.scheme) == scheme) for name, _ in keys]
    return {
        "op": "estimate",
        "scheme": scheme,
        "layers": len(keys),
        "spearman": float(stats.spearmanr(exact, estimated).statistic),
        "spearman_of_own_noise": float(stats.spearmanr(exact, own).statistic),
        "sum_exact_db": finite_db(float(exact.sum())),
        "sum_estimated_db": finite_db(float(estimated.sum())),
        "deviation_db": float(np.std(10 * np.log10(exact / estimated))),
    }


def plans(pipe: Any, prompts: list[str], settings: SamplingSettings) -> list[dict[str, Any]]:
    """Predicted and measured SQNR of plans for some targets, and how long each took from calibration on."""
    rows = []
    for formats, target in PLANS:
        began = time.perf_counter()
        measured = make_plan(
            pipe, PlanRequest(prompts, Target(sqnr_db=target), formats, settings=settings)
        ).plan.measured
        rows.append(
            {
                "op": "plan",
                "formats": list(formats),
                "target_db": target,
                "predicted_db": measured["predicted_sqnr_db"],
                "measured_db": measured["held_out_sqnr_db"],
                "share_of_fp16": measured["weight_bytes"] / measured["weight_bytes_fp16"],
                "seconds": time.perf_counter() - began,
            }
        )
    return rows


def table(data: dict[str, Any]) -> str:
    """Estimates beside runs, and predictions beside measurements, for the pages."""
    estimates = [
        [
            row["scheme"],
            f"{row['spearman']:.3f}",
            f"{row['spearman_of_own_noise']:.2f}",
            f"{row['sum_exact_db']:.1f} / {row['sum_estimated_db']:.1f} dB",
        ]
        for row in data["rows"]
        if row["op"] == "estimate"
    ]
    predicted = [
        [
            ", ".join(row["formats"]),
            f"{row['target_db']:.1f}",
            f"{row['predicted_db']:.1f}",
            f"{row['measured_db']:.1f}",
            f"{row['share_of_fp16']:.3f}x",
            f"{row['seconds']:.0f}",
        ]
        for row in data["rows"]
        if row["op"] == "plan"
    ]
    return "\n\n".join(
        [
            "**What the planner knows** (the demo model): noise of each layer at the UNet's output, estimated by "
            "backward probes and run one by one",
            markdown(
                ["scheme", "rank correlation", "of layers' own noise", "sum over layers, run / estimated"], estimates
            ),
            markdown(["formats", "asked, dB", "predicted", "held out", "of fp16", "seconds"], predicted),
        ]
    )


def main(arguments: list[str]) -> None:
    """Measure all of it and write the results file."""
    argparse.ArgumentParser(prog="python -m benchmarks estimates", description=__doc__).parse_args(arguments)
    results.check_keep("method")
    dtype = torch.float16 if device().type == "cuda" else torch.float32
    pipe = demo.load_demo_pipeline(dtype, demo.WEIGHTS).to(device())
    prompts, settings = calibration_captions(CALIBRATION_PROMPTS), SamplingSettings(STEPS, GUIDANCE, 0)
    calibrated_on, _ = split_calls(prompts)
    schemes = parse_schemes(FORMATS)
    calibration = calibrate(pipe, calibrated_on, settings)
    analysis = analyze(pipe, calibration, schemes, exact=ALL, method=Method(gptq=False), show=True)
    rows = [agreement(analysis, str(scheme)) for scheme in schemes]
    found = plans(pipe, prompts, settings)
    summary = {
        "estimate/least_spearman": min(row["spearman"] for row in rows),
        "plan/largest_error_db": max(abs(row["predicted_db"] - row["measured_db"]) for row in found),
    }
    print(f"written: {results.keep('method', [*rows, *found], summary)}")
