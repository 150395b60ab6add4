"""What planning for the pictures costs beside planning for the model's output: python -m benchmarks plan-time

The whole method on one model, once for each target, in turns; processor time of one thread, so that what else the
machine does counts little.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from benchmarks.harness import results
from benchmarks.harness.tables import markdown
from benchmarks.study.subjects import DEMO, SUBJECTS, Subject
from ldmq_kernels.calibration.settings import SamplingSettings
from ldmq_kernels.demo.run import CALIBRATION_PROMPTS, TARGET_DB, calibration_captions
from ldmq_kernels.planning.planner import make_plan
from ldmq_kernels.planning.request import PlanRequest
from ldmq_kernels.planning.target import MEASURES, Target

WHAT = "plan_time"
PSNR_DB = 52.0  # what a plan for the demo's own target draws


def measured(subject: Subject, target: Target) -> dict[str, Any]:
    """One plan and the seconds that it takes."""
    pipe = subject.load(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    settings = SamplingSettings(subject.steps, subject.guidance_scale, 0)
    request = PlanRequest(calibration_captions(CALIBRATION_PROMPTS), target, settings=settings)
    began, wall = time.process_time(), time.perf_counter()
    plan = make_plan(pipe, request).plan
    row = {"op": "plan", "keeps": request.measure, "target": target.to_dict(), "measured": plan.measured}
    return row | {"cpu_seconds": time.process_time() - began, "seconds": time.perf_counter() - wall}


def table(data: dict[str, Any]) -> str:
    """Processor time of each target, for the pages."""
    lines = [
        [
            MEASURES[row["keeps"]],
            f"{row['cpu_seconds']:.0f} s",
            f"{row['measured']['predicted_' + row['keeps'] + '_db']:.1f} dB",
            f"{row['measured']['held_out_' + row['keeps'] + '_db']:.1f} dB",
        ]
        for row in data["rows"]
    ]
    words = "**What planning costs** (the demo model, the whole method, processor time of one thread, in turns)"
    return f"{words}\n\n" + markdown(["keeps", "processor time", "predicted", "held out"], lines)


def main(arguments: list[str]) -> None:
    """Measure and write the results file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks plan-time", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args(arguments)
    results.check_keep(WHAT)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for _ in range(options.rounds):
        for target in (Target(sqnr_db=TARGET_DB), Target(psnr_db=PSNR_DB)):
            rows.append(measured(SUBJECTS[DEMO], target))
            print(rows[-1], flush=True)
    seconds = {
        keeps: sum(row["cpu_seconds"] for row in rows if row["keeps"] == keeps) / options.rounds
        for keeps in ("sqnr", "psnr")
    }
    print(f"written: {results.keep(WHAT, rows, {f'{WHAT}/ratio': seconds['psnr'] / seconds['sqnr']})}")
