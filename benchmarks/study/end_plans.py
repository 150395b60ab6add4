"""Plans for the pictures beside plans for the UNet's output, at equal bytes: python -m benchmarks end-plans

One analysis of a model, from which plans are made within the same bytes, that keep the SQNR of the UNet's
output, that of the final latents, or the PSNR of the pictures. Each is drawn on captions that neither the analysis nor
the planner's own check saw, and compared with the float pictures: mean, median and worst tenth, beside what was
predicted before. The model was never trained on these captions. Others are like those that plans are made from, which
is what a prediction is for: drawn, too, and equally held out. Each row has too what the layers' noise adds up to by
every measure, and how many layers have the scheme that the plan for the UNet's output gives them: how much room the
bytes leave.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from benchmarks.harness import results
from benchmarks.harness.machine import device
from benchmarks.harness.tables import markdown
from benchmarks.study.evaluation import TEST_SEED
from benchmarks.study.subjects import DEMO, SUBJECTS, Subject
from ldmq_kernels.calibration.adjoint import LATENT, PICTURE
from ldmq_kernels.calibration.calibrate import calibrate
from ldmq_kernels.calibration.denoisers import denoiser
from ldmq_kernels.calibration.settings import SamplingSettings
from ldmq_kernels.calibration.trajectory import record_trajectory
from ldmq_kernels.demo.run import calibration_captions, held_out_captions
from ldmq_kernels.numerics.formats import FLOAT, parse_schemes
from ldmq_kernels.planning.assignment import SQNR
from ldmq_kernels.planning.drawn import Drawn, EndCheck, FloatEnds, mean_within_db, with_more_seeds
from ldmq_kernels.planning.evaluate import PlanEvaluator
from ldmq_kernels.planning.options import noise_columns
from ldmq_kernels.planning.planner import held_out_settings
from ldmq_kernels.planning.request import split_calls
from ldmq_kernels.planning.session import Session
from ldmq_kernels.planning.target import MEASURES, Measure, Target
from ldmq_kernels.plans.cost import weight_bytes
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.sensitivity.analysis import EXACT_RUNS, Analysis, analyze

WHAT = "end_plans"
INT8 = ("w8a8-static", "w8a8-timestep", "w8a8-dynamic")
INT4 = ("w4a8-static", "w4a8-timestep", "w4a8-dynamic")
CASES = {  # formats, and the share of fp16's bytes that they may take
    "W8A8 and a tenth of the weights in fp16": ((*INT8, "fp16"), 0.55),
    "W4A8 and W8A8": ((*INT4, *INT8), 0.32),
}


def _sessions(pipe: Any, analysis: Analysis, checks: dict[Measure, EndCheck | None], held_out: Any) -> dict[str, Any]:
    """Case and measure -> a session on the candidates of the case alone."""
    found: dict[str, Any] = {}
    for case, (formats, _) in CASES.items():
        few = {name: [c for c in of if str(c.scheme) in formats] for name, of in analysis.candidates.items()}
        part = replace(analysis, candidates=few)
        found[case] = {
            measure: Session(denoiser(pipe), part, held_out, formats, ends=check) for measure, check in checks.items()
        }
    return found


def _sums(session: Session, choices: dict[str, str]) -> dict[str, float]:
    """What the layers' noise adds up to by each measure, in dB."""
    found = {}
    for measure in MEASURES:
        columns = noise_columns(session.analysis, measure)
        powers = np.zeros(len(columns.weights))
        for name, scheme in choices.items():
            candidate = session.analysis.candidate(name, scheme) if name in session.analysis.candidates else None
            if candidate is not None:
                powers += columns.of(name, candidate)
        found[measure] = float(np.array(columns.weights) @ (-10 * np.log10(powers)))
    return found


def measured(subject: Subject, pipe: Any, prompts: int, captions: int) -> list[dict[str, Any]]:
    """One row a case and measure.

    Args:
        prompts: that plans are made from.
        captions: held out, of each kind.
    """
    model, settings = denoiser(pipe), SamplingSettings(subject.steps, subject.guidance_scale, 0)
    given = calibration_captions(prompts)
    calibrated_on, verified_on = split_calls(given)
    like_them = dict.fromkeys(text for text in calibration_captions(prompts + 2 * captions) if text not in given)
    calibration = calibrate(pipe, calibrated_on, settings)
    schemes = parse_schemes(tuple(dict.fromkeys(s for formats, _ in CASES.values() for s in formats)))
    began = time.perf_counter()
    analysis = analyze(pipe, calibration, schemes, exact=EXACT_RUNS, ends=(LATENT, PICTURE), show=True)
    seconds = time.perf_counter() - began
    others = held_out_settings(settings)
    held_out = record_trajectory(pipe, verified_on, others)
    drawn = FloatEnds(pipe, with_more_seeds(verified_on), others)
    calibrated = FloatEnds(pipe, calibration.calls, settings, calibration.trajectory.outputs)
    ends: tuple[Measure, ...] = ("latent", "psnr")
    checks: dict[Measure, EndCheck | None] = {"sqnr": None, **{m: EndCheck(m, drawn, calibrated) for m in ends}}
    at_test = replace(settings, seed=TEST_SEED)
    test = FloatEnds(pipe, [text for text, _ in held_out_captions(captions)], at_test)
    test_alike = FloatEnds(pipe, list(like_them)[:captions], at_test)
    full = sum(weight_bytes(layer, FLOAT) for layer in quantizable_layers(model).values())
    evaluator, rows = PlanEvaluator(model, analysis), []
    for case, sessions in _sessions(pipe, analysis, checks, held_out).items():
        of_output: dict[str, str] = {}
        for measure, session in sessions.items():
            plan = session.plan(Target(bytes=int(CASES[case][1] * full))).plan
            choices = {name: str(layer_plan.scheme) for name, layer_plan in plan.layers(model).items()}
            of_output = of_output or choices
            alike = sum(scheme == of_output[name] for name, scheme in choices.items()) / len(choices)
            spread, spread_alike = (_spread(evaluator.drawn(choices, of)) for of in (test, test_alike))
            row = {"op": "plan", "case": case, "keeps": measure, "share_of_fp16": plan.measured["weight_bytes"] / full}
            row |= {"model": subject.name, "sum_db": _sums(session, choices), "alike": alike}
            row |= {"drawn": spread, "drawn_alike": spread_alike, "captions": captions, "prompts": prompts}
            rows.append(row | {"measured": plan.measured, "analysis_seconds": seconds})
            print(rows[-1], flush=True)
    return rows


def _spread(drawn: Drawn) -> dict[Measure, dict[str, float | None]]:
    return {m: asdict(s) | {"within": mean_within_db(drawn.by_picture[m])} for m, s in drawn.spread.items()}


def table(data: dict[str, Any]) -> str:
    """Plans at equal bytes, for the pages."""
    lines = []
    for row in data["rows"]:
        psnr, latent, keeps = row["drawn"]["psnr"], row["drawn"]["latent"], row["keeps"]
        predicted, checked = (f"{row['measured'][f'{word}_{keeps}_db']:.1f}" for word in ("predicted", "held_out"))
        predicted += _within(row["measured"].get(f"predicted_{keeps}_db_within"))
        here = ""
        if keeps != SQNR:
            drawn = [row[kind][keeps] for kind in ("drawn_alike", "drawn")]
            here = "".join(f" / {of['mean']:.1f}{_within(of['within'])}" for of in drawn)
        lines.append(
            [
                row["case"],
                f"{row['share_of_fp16']:.3f}x",
                MEASURES[keeps],
                f"{psnr['mean']:.1f} / {psnr['median']:.1f} / {psnr['worst_tenth']:.1f}",
                f"{latent['mean']:.1f} / {latent['median']:.1f} / {latent['worst_tenth']:.1f}",
                f"{predicted} / {checked}{here}",
                f"{row['sum_db']['psnr']:.1f}",
                f"{row['alike']:.0%}",
            ]
        )
    first = data["rows"][0]
    words = (
        f"**Plans for the pictures** (the {first['model']} model, equal bytes, plans from {first['prompts']} captions; "
        f"{first['captions']} held-out captions that the model was not trained on; mean, median and worst tenth of "
        "pictures in dB; what is predicted is a mean, beside it that of the planner's check, that of as many held-out "
        "captions like those that the plan was made from, and that of those that the model was not trained on; after "
        f"±, its 95 % interval, by how pictures differ). {' '.join(_room(data))}"
    )
    head = ["formats", "of fp16", "keeps", "PSNR", "latents' SQNR", "predicted / check / alike / not trained on"]
    head += ["PSNR by the sum of the layers' noise", "layers as for the UNet's output"]
    return f"{words}\n\n" + markdown(head, lines)


def _within(decibels: float | None) -> str:
    return "" if decibels is None else f" ± {decibels:.1f}"


def _room(data: dict[str, Any]) -> Iterator[str]:
    """What plans for the pictures gain in each case, drawn, and by the sum of noise, in which they are the best."""
    for case in CASES:
        of_case = {row["keeps"]: row for row in data["rows"] if row["case"] == case}
        drawn, summed = (
            value(of_case["psnr"]) - value(of_case[SQNR])
            for value in (lambda row: row["drawn"]["psnr"]["mean"], lambda row: row["sum_db"]["psnr"])
        )
        yield (
            f"{case}: keeping the pictures in place of the UNet's output gains {drawn:+.1f} dB of PSNR drawn, "
            f"{summed:+.1f} dB by the sum of the layers' noise in them: the most that these bytes leave room for."
        )


def results_of(subject: Subject) -> str:
    """The kind of the results file of a model."""
    return WHAT if subject.name == DEMO else f"{WHAT}_{subject.name}"


def main(arguments: list[str]) -> None:
    """Measure and write the results file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks end-plans", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(SUBJECTS), default=DEMO)
    parser.add_argument(
        "--prompts", type=int, default=128, help="that plans are made from; the last quarter checks them"
    )
    parser.add_argument(
        "--captions", type=int, default=96, help="held out, of each of two kinds, drawn with every plan"
    )
    options = parser.parse_args(arguments)
    subject = SUBJECTS[options.model]
    what = results_of(subject)
    results.check_keep(what)
    dtype = torch.float16 if device().type == "cuda" else torch.float32
    pipe = subject.load(dtype).to(device())
    pipe.set_progress_bar_config(disable=True)
    rows = measured(subject, pipe, options.prompts, options.captions)
    gains = [
        ours["drawn"]["psnr"]["mean"] - base["drawn"]["psnr"]["mean"]
        for base in rows
        for ours in rows
        if base["case"] == ours["case"] and (base["keeps"], ours["keeps"]) == (SQNR, "psnr")
    ]
    off = {
        kind: max(
            abs(row["measured"][f"predicted_{row['keeps']}_db"] - row[kind][row["keeps"]]["mean"])
            for row in rows
            if row["keeps"] != SQNR
        )
        for kind in ("drawn", "drawn_alike")
    }
    summary = {f"{what}/least_gain_db": min(gains), f"{what}/most_gain_db": max(gains)}
    summary |= {f"{what}/most_off_db": off["drawn"], f"{what}/most_off_alike_db": off["drawn_alike"]}
    print(f"written: {results.keep(what, rows, summary)}")
