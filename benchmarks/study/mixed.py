"""Plans that mix 4 and 8 bits at 0.32 of fp16's bytes, by what layers may choose among: python -m benchmarks mixed

One analysis of a model, from which a plan is made within the same bytes for each set of formats: split activations
(`x2`), 16-bit activations, both or neither. Each is drawn on captions that neither the analysis nor the planner's
check saw. Each row says how many of the model's operations are no int8 product (activations in 16 bit), and how many
are two (split activations): what the decibels cost in time.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from benchmarks.harness import results
from benchmarks.harness.machine import device
from benchmarks.harness.tables import markdown
from benchmarks.study.evaluation import TEST_SEED
from benchmarks.study.subjects import SUBJECTS, Subject
from ldmq_kernels.calibration.calibrate import calibrate
from ldmq_kernels.calibration.denoisers import denoiser
from ldmq_kernels.calibration.settings import SamplingSettings
from ldmq_kernels.calibration.trajectory import record_trajectory
from ldmq_kernels.demo.run import CALIBRATION_PROMPTS, calibration_captions, held_out_captions
from ldmq_kernels.numerics.formats import FLOAT, SCHEMES, Scheme, parse_schemes
from ldmq_kernels.planning.drawn import FloatEnds
from ldmq_kernels.planning.evaluate import PlanEvaluator
from ldmq_kernels.planning.planner import held_out_settings
from ldmq_kernels.planning.request import split_calls
from ldmq_kernels.planning.session import Session
from ldmq_kernels.planning.target import Target
from ldmq_kernels.plans.cost import weight_bytes
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.sensitivity.analysis import analyze

SHARE = 0.32  # of the bytes of fp16
INT8 = ("w8a8", "w4a8")
FORMATS = (*INT8, "w8a16", "w4a16", "fp16")
WITH_SPLIT, WITH_16_BIT = "w8a8 and w4a8", "w8a8, w4a8, w8a16 and w4a16, without split activations"
DEFAULT = "w8a8, w4a8, w8a16, w4a16 and fp16"
CASES: dict[str, Callable[[Scheme], bool]] = {  # words -> whether a scheme of FORMATS is offered
    "w8a8 and w4a8, without split activations": lambda s: s.format.name in INT8 and not s.is_split,
    WITH_SPLIT: lambda s: s.format.name in INT8,
    WITH_16_BIT: lambda s: s.quantizes and not s.is_split,
    DEFAULT: lambda s: True,
}


def _shares(choices: Mapping[str, str], operations: Mapping[str, int]) -> dict[str, float]:
    """Shares of the operations: in 16 bit, of split activations, and with 4-bit weights."""
    schemes = {name: SCHEMES[choices[name]] for name in operations}
    whole = sum(operations.values())

    def share(counts: Callable[[Scheme], bool]) -> float:
        return sum(operations[name] for name, scheme in schemes.items() if counts(scheme)) / whole

    return {
        "no_int8": share(lambda s: s.format.name not in INT8),
        "split": share(lambda s: s.is_split),
        "int4_weights": share(lambda s: s.format.name.startswith("w4")),
    }


def measured(subject: Subject, pipe: Any, captions: int) -> list[dict[str, Any]]:
    """One row for each set of formats."""
    model, settings = denoiser(pipe), SamplingSettings(subject.steps, subject.guidance_scale, 0)
    calibrated_on, verified_on = split_calls(calibration_captions(CALIBRATION_PROMPTS))
    calibration = calibrate(pipe, calibrated_on, settings)
    analysis = analyze(pipe, calibration, parse_schemes(FORMATS), show=True)
    held_out = record_trajectory(pipe, verified_on, held_out_settings(settings))
    test = FloatEnds(pipe, [text for text, _ in held_out_captions(captions)], replace(settings, seed=TEST_SEED))
    full = sum(weight_bytes(layer, FLOAT) for layer in quantizable_layers(model).values())
    evaluator, rows = PlanEvaluator(model, analysis), []
    for case, offered in CASES.items():
        names = [str(scheme) for scheme in parse_schemes(FORMATS) if offered(scheme)]
        few = {name: [c for c in of if str(c.scheme) in names] for name, of in analysis.candidates.items()}
        session = Session(model, replace(analysis, candidates=few), held_out, names)
        plan = session.plan(Target(bytes=int(SHARE * full))).plan
        choices = {name: str(layer_plan.scheme) for name, layer_plan in plan.layers(model).items()}
        drawn = evaluator.drawn(choices, test)
        row = {"op": "plan", "model": subject.name, "formats": case, "captions": captions}
        row |= {"share_of_fp16": plan.measured["weight_bytes"] / full, "layers": dict(Counter(choices.values()))}
        row |= {"operations": _shares(choices, calibration.operations), "measured": plan.measured}
        rows.append(row | {"drawn": {measure: asdict(spread) for measure, spread in drawn.spread.items()}})
        print(rows[-1], flush=True)
    return rows


def table(data: dict[str, Any]) -> str:
    """Plans at 0.32 of fp16's bytes, for the pages."""
    lines = []
    for row in data["rows"]:
        psnr, shares = row["drawn"]["psnr"], row["operations"]
        lines.append(
            [
                row["model"],
                row["formats"],
                f"{row['share_of_fp16']:.3f}x",
                f"{psnr['mean']:.2f}",
                f"{psnr['worst_tenth']:.2f}",
                f"{row['drawn']['latent']['mean']:.2f}",
                *(f"{shares[name]:.0%}" for name in ("no_int8", "split", "int4_weights")),
            ]
        )
    words = (
        f"**4 and 8 bits mixed, at {SHARE} of fp16's bytes** ({data['rows'][0]['captions']} held-out captions; plans "
        f"for the SQNR of the UNet's output; {data['device']}, torch {data['torch']}, commit "
        f"{(data.get('commit') or 'none')[:10]}; the last three columns are shares of the model's multiplications). "
        f"16-bit activations in place of split ones: {_instead(data['rows'])}. A plan for so few bytes that names no "
        "formats is offered those of the last row."
    )
    head = ["model", "formats offered", "of fp16", "PSNR, dB: mean of pictures", "worst tenth"]
    head += ["SQNR of the latent, dB", "not int8 (16-bit activations)", "int8 twice (split)", "4-bit weights"]
    return f"{words}\n\n" + markdown(head, lines)


def readme_lines(data: dict[str, Any]) -> list[list[str]]:
    """Bytes and PSNR of the plans that may use everything, for the README."""
    return [
        [
            f"{row['model']} model, 4 and 8 bits mixed: ldmq_kernels",
            f"{row['share_of_fp16']:.3f}x of fp16",
            f"{row['drawn']['psnr']['mean']:.2f} dB in the mean of {row['captions']}, "
            f"{row['drawn']['psnr']['worst_tenth']:.2f} dB for the worst tenth",
        ]
        for row in data["rows"]
        if row["formats"] == DEFAULT
    ]


def _instead(rows: list[dict[str, Any]]) -> str:
    """How much more PSNR 16-bit activations keep than split ones, on each model."""
    kept = {(row["model"], row["formats"]): row["drawn"]["psnr"]["mean"] for row in rows}
    gains = {model: kept[model, WITH_16_BIT] - kept[model, WITH_SPLIT] for model in dict.fromkeys(m for m, _ in kept)}
    return ", ".join(f"{gain:+.1f} dB of PSNR ({model})" for model, gain in gains.items())


def main(arguments: list[str]) -> None:
    """Measure both models and write the results file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks mixed", description=__doc__.splitlines()[0])
    parser.add_argument("--captions", type=int, default=32, help="held out, drawn with every plan")
    options = parser.parse_args(arguments)
    results.check_keep("mixed")
    rows = []
    for subject in SUBJECTS.values():
        pipe = subject.load(torch.float16 if device().type == "cuda" else torch.float32).to(device())
        pipe.set_progress_bar_config(disable=True)
        rows += measured(subject, pipe, options.captions)
    summary = {f"mixed/{r['model']}/{r['formats']}/psnr_db": r["drawn"]["psnr"]["mean"] for r in rows}
    print(f"written: {results.keep('mixed', rows, summary)}")
