"""How well the method's estimates hold on the demo model, kept as a results file: python benchmarks/method.py

One row a scheme: the noise that backward probes estimate for each layer beside the noise of running the UNet with
that layer alone quantized, by rank correlation and by the error in dB, all rounded to nearest. Layers' own
noise, which is what an analysis without probes would rank by, stands beside it. Then calibration on the first step
beside calibration on all steps, layer by layer, and what plans were predicted to reach beside what they reach on
held-out prompts.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from scipy import stats

from benchmarks import common
from ldmq_kernels import demo
from ldmq_kernels.calibration.calibrate import Calibration, calibrate
from ldmq_kernels.calibration.ranges import ALL_STEPS, FIRST_STEP, range_drift
from ldmq_kernels.calibration.trajectory import SamplingSettings
from ldmq_kernels.demo.run import CALIBRATION_PROMPTS, GUIDANCE, STEPS, calibration_captions
from ldmq_kernels.numerics.formats import parse_schemes
from ldmq_kernels.planning.planner import Target, make_plan, split_prompts
from ldmq_kernels.sensitivity.analysis import ALL, Analysis, analyze
from ldmq_kernels.sensitivity.candidates import PLAIN, Method
from ldmq_kernels.sensitivity.output_noise import finite_db

FORMATS = ("w8a8", "w4a8", "w8a16", "w4a16")
PLANS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("w8a8",), 36.0),
    (("w8a8",), 41.5),
    (("w8a8", "w8a16", "fp16"), 38.0),
    (("w8a8-static", "w8a8x2"), 38.0),
    (("w4a8", "w8a8", "w8a16", "fp16"), 34.0),
)
DRIFT = 1.05  # times that a range grows after the first step
SENSITIVE_DB = 1.0  # that a layer loses where its scale comes from the first step alone


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


def single_step(pipe: Any, prompts: list[str], settings: SamplingSettings) -> dict[str, Any]:
    """First-step beside all-step calibration: time, and SQNR of each layer alone with a static scale.

    Layers that lose by it are sensitive to time. The search knows their ranges of all steps: what it leaves lost is
    what it missed.
    """
    seconds = {}
    for mode in (ALL_STEPS, FIRST_STEP):
        began = time.perf_counter()
        calibrate(pipe, prompts, settings, mode=mode, whole=mode == ALL_STEPS)
        seconds[mode] = time.perf_counter() - began
    calibration = calibrate(pipe, prompts, settings)
    lost = _lost_on_one_step(pipe, calibration, PLAIN)
    left = _lost_on_one_step(pipe, calibration, Method())
    sensitive = [name for name, db in lost.items() if db > SENSITIVE_DB]
    drift = {name: range_drift(by_step) for name, by_step in calibration.absmax.items()}
    return {
        "op": "single_step",
        "seconds_first_step": seconds[FIRST_STEP],
        "seconds_all_steps": seconds[ALL_STEPS],
        "layers": len(lost),
        "time_sensitive": len(sensitive),
        "time_sensitive_with_drift": sum(drift[name] > DRIFT for name in sensitive),
        "missed": sum(left[name] > SENSITIVE_DB for name in sensitive),
        "lost_db_by_layer": {
            name: [round(db, 2), round(left[name], 2), round(drift[name], 2)]
            for name, db in sorted(lost.items(), key=lambda item: -item[1])
        },
    }


def _lost_on_one_step(pipe: Any, calibration: Calibration, method: Method) -> dict[str, float]:
    """Layer -> dB at the UNet's output that a static scale of the first step has less than one of all steps."""
    static = parse_schemes(["w8a8-static"])
    first, every = (
        analyze(pipe, replace(calibration, mode=mode), static, exact=ALL, method=method).output
        for mode in (FIRST_STEP, ALL_STEPS)
    )
    return {key[0]: every[key].mean_db - first[key].mean_db for key in every if key in first}


def plans(pipe: Any, prompts: list[str], settings: SamplingSettings) -> list[dict[str, Any]]:
    """Predicted and measured SQNR of plans for some targets, and how long each took from calibration on."""
    rows = []
    for formats, target in PLANS:
        began = time.perf_counter()
        measured = make_plan(pipe, prompts, Target(sqnr_db=target), formats=formats, settings=settings).plan.measured
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


def main() -> None:
    """Measure all of it and write the results file."""
    dtype = torch.float16 if common.device().type == "cuda" else torch.float32
    pipe = demo.load_demo_pipeline(dtype, demo.WEIGHTS).to(common.device())
    prompts, settings = calibration_captions(CALIBRATION_PROMPTS), SamplingSettings(STEPS, GUIDANCE, 0)
    calibrated_on, _ = split_prompts(prompts)
    schemes = parse_schemes(FORMATS)
    calibration = calibrate(pipe, calibrated_on, settings)
    analysis = analyze(pipe, calibration, schemes, exact=ALL, method=Method(gptq=False), show=True)
    rows = [agreement(analysis, str(scheme)) for scheme in schemes]
    steps = single_step(pipe, calibrated_on, settings)
    found = plans(pipe, prompts, settings)
    summary = {
        "estimate/least_spearman": min(row["spearman"] for row in rows),
        "single_step/times_faster": steps["seconds_all_steps"] / steps["seconds_first_step"],
        "plan/largest_error_db": max(abs(row["predicted_db"] - row["measured_db"]) for row in found),
    }
    print(f"written: {common.write_results('method', [*rows, steps, *found], summary)}")


if __name__ == "__main__":
    main()
