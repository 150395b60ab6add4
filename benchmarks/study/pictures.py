"""How many dB in the picture, by which tool: python -m benchmarks pictures

W8A8 on the layers that SDNQ computes in 8 bits, and other tools with the layers that they take, drawn on held-out
captions by both models of the study. Every picture counts by its own dB: their mean, and the worst tenth. A call of the
model for one picture is timed in turn with the float model's, eager and compiled; tools that are made for torch.compile
are timed compiled, too, and the faster of both counts. A row is written as soon as it is there, with its commit, and
one that is there for as many captions is not measured again.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from collections.abc import Callable, Collection
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ldmq_kernels
from benchmarks.harness import results
from benchmarks.harness.machine import device, machine
from benchmarks.harness.tables import markdown
from benchmarks.harness.timing import Call, medians
from benchmarks.study.evaluation import TEST_SEED, Setup, with_unet
from benchmarks.study.inspect_model import checkpoint_bytes, inspect_model
from benchmarks.study.own_plans import Choices, on_layers, own_plans, plan_of, quantized, twice_computed
from benchmarks.study.peers import NOT_INSTALLED, OURS, Quantization, peers
from benchmarks.study.subjects import SUBJECTS, Subject
from ldmq_kernels.calibration.calibrate import calibrate
from ldmq_kernels.calibration.ranges import ALL_STEPS
from ldmq_kernels.calibration.settings import SamplingSettings
from ldmq_kernels.calibration.trajectory import record_trajectory
from ldmq_kernels.demo.run import CALIBRATION_PROMPTS, calibration_captions, held_out_captions
from ldmq_kernels.numerics.formats import SCHEMES
from ldmq_kernels.planning.drawn import FloatEnds, Spread
from ldmq_kernels.planning.planner import HELD_OUT_SEED
from ldmq_kernels.planning.request import split_calls
from ldmq_kernels.plans.plan import Plan
from ldmq_kernels.sensitivity.analysis import Analysis, analyze
from ldmq_kernels.sensitivity.candidates import LayerCandidate

ROWS = results.ROOT / "build" / "pictures.jsonl"
RIVAL = "w8a8 dynamic, everywhere"  # SDNQ's configuration, on whose layers this package is compared
ON_THEM = "SDNQ's layers"
ONE_PRODUCT, WITH_SPLIT = ("w8a8-dynamic", "w8a8-rotated"), ("w8a8-dynamic", "w8a8-rotated", "w8a8x2")
SPLIT_SHARE = 0.05  # of the operations that SDNQ makes in 8 bits: what is made twice at most
COUNT = "{0[stored]} / {0[computed]} / {0[all]}"
FLOAT, COMPILED, OWN, OWN_COMPILED = "float", "float, compiled", "own", "own, compiled"
FOR_COMPILING = ("sdnq", "torchao")  # whose documentation has models compiled
ROUNDS = 41  # of calls in turns


class Comparison:
    """One model, its float pictures of held-out captions, and all that quantizes it."""

    def __init__(self, subject: Subject, captions: int) -> None:
        self._subject, self._captions = subject, captions
        self._settings = SamplingSettings(subject.steps, subject.guidance_scale, 0)

    @functools.cached_property
    def setup(self) -> Setup:
        """The float pipeline, calibrated."""
        dtype = torch.float16 if device().type == "cuda" else torch.float32
        pipe = self._subject.load(dtype).to(device())
        calibrated_on, verified_on = split_calls(calibration_captions(CALIBRATION_PROMPTS))
        held_out = record_trajectory(pipe, verified_on, replace(self._settings, seed=HELD_OUT_SEED))
        return Setup(pipe, calibrate(pipe, calibrated_on, self._settings), held_out)

    @functools.cached_property
    def ends(self) -> FloatEnds:
        """The float pictures."""
        texts = [text for text, _ in held_out_captions(self._captions)]
        return FloatEnds(self.setup.pipe, texts, replace(self._settings, seed=TEST_SEED))

    @functools.cached_property
    def rival_layers(self) -> tuple[Collection[str], Collection[str]]:
        """Names of the layers that SDNQ stores, and that it computes, in 8 bits."""
        unet, call = self.setup.unet, self.setup.held_out.calls[0]
        rival = next(peer for peer in peers() if peer.configuration == RIVAL)
        seen = inspect_model(rival.build(self.setup), unet, call)
        return seen.stored, seen.computed

    @functools.cached_property
    def _compiled(self) -> Any:
        """The float model by torch.compile."""
        return torch.compile(self.setup.unet)

    def milliseconds(self, tool: str, model: nn.Module) -> dict[str, float]:
        """The median times of a call for one picture: of the float model and of this one, in turns."""
        every = self.setup.held_out.calls[0]
        call = every.of_prompts(every.prompts[:1])
        models = {FLOAT: self.setup.unet, COMPILED: self._compiled, OWN: model}
        if tool in FOR_COMPILING:
            models[OWN_COMPILED] = torch.compile(model)

        def timed(of: nn.Module) -> Call:
            return torch.inference_mode()(lambda: call.run(of))

        return medians({name: timed(of) for name, of in models.items()}, ROUNDS)

    @functools.cached_property
    def analysis(self) -> Analysis:
        """Every candidate of W8A8 with scales that are measured, and of the split form."""
        calibration = own_plans(self.setup).calibration(ALL_STEPS)
        return analyze(self.setup.pipe, calibration, [SCHEMES[s] for s in WITH_SPLIT], exact=0)

    def plain(self) -> nn.Module:
        """Dynamic scales on SDNQ's layers, and nothing more."""
        plans = own_plans(self.setup)
        choices = plans.plain_choices("w8a8-dynamic", plans.whole)
        return self._made(plan_of(self.setup.unet, on_layers(choices, *self.rival_layers), plans.whole))

    def one_product(self) -> nn.Module:
        """Dynamic or rotated on SDNQ's layers, whichever makes less noise in the layer's own output."""
        return self._made(self._plan({name: found.layer_plan for name, found in self._quietest().items()}))

    def with_gptq(self) -> nn.Module:
        """The same, and every weight rounded by GPTQ, which the search tries for 4 bits alone."""
        plan = self._plan({name: found.layer_plan for name, found in self._quietest().items()})
        return self._made(plan.with_gptq(self.setup.unet))

    def with_gptq_by_the_end(self) -> nn.Module:
        """The same, rounded by what errors of inputs and outputs make of the calibration's pictures."""
        plan = self._plan({name: found.layer_plan for name, found in self._quietest().items()})
        return self._made(plan.with_gptq(self.setup.unet, end=True))

    def with_split(self) -> nn.Module:
        """The same, but split activations where a product more takes most noise away, for few operations in all."""
        choices = self._quietest()
        operations = self.analysis.calibration.operations
        computed = self.rival_layers[1]
        left = SPLIT_SHARE * sum(operations[name] for name in computed)
        gains = []
        for name in computed:
            split = self.analysis.candidate(name, "w8a8x2")
            if split is not None and split.estimate is not None and choices[name].estimate is not None:
                gains.append((_mean(choices[name]) - _mean(split), operations[name], name, split))
        for _, cost, name, split in sorted(gains, key=lambda gain: -gain[0] / gain[1]):
            if cost <= left:
                left -= cost
                choices[name] = split
        return self._made(self._plan({name: candidate.layer_plan for name, candidate in choices.items()}))

    def _quietest(self) -> dict[str, LayerCandidate]:
        return {
            name: min((c for c in each if str(c.scheme) in ONE_PRODUCT), key=lambda c: c.noise)
            for name, each in self.analysis.candidates.items()
            if each
        }

    def _plan(self, choices: Choices) -> Plan:
        return plan_of(self.setup.unet, on_layers(choices, *self.rival_layers), self.analysis.calibration)

    def _made(self, plan: Plan) -> nn.Module:
        return quantized(self.setup, plan)

    def row(self, tool: str, configuration: str, build: Callable[[], nn.Module]) -> dict[str, Any]:
        """Draw with a model and compare."""
        model, unet = build(), self.setup.unet
        seen = inspect_model(model, unet, self.setup.held_out.calls[0])
        drawn = with_unet(self.setup.pipe, model, self.ends.compare)
        return {
            "tool": tool,
            "configuration": configuration,
            "convolutions": asdict(seen.counts["conv2d"]),
            "linears": asdict(seen.counts["linear"]),
            "bytes": seen.bytes,
            "note": twice_computed(model, self.setup),
            "by_picture": {measure: list(decibels) for measure, decibels in drawn.by_picture.items()},
            "ms": self.milliseconds(tool, model),
        }


def _mean(candidate: LayerCandidate) -> float:
    """Of the estimated noise at the model's output over steps."""
    assert candidate.estimate is not None
    return sum(candidate.estimate.by_step.values()) / len(candidate.estimate.by_step)


def todo(comparison: Comparison) -> list[tuple[str, str, Callable[[], nn.Module]]]:
    """Tool, configuration and what builds the model, the most telling first."""
    ours = [
        (OURS, f"w8a8 dynamic, plain, {ON_THEM}", comparison.plain),
        (OURS, f"w8a8 dynamic or rotated, {ON_THEM}", comparison.one_product),
        (OURS, f"w8a8 dynamic or rotated, GPTQ, {ON_THEM}", comparison.with_gptq),
        (OURS, f"w8a8 dynamic or rotated, GPTQ by the end, {ON_THEM}", comparison.with_gptq_by_the_end),
        (OURS, f"w8a8 dynamic or rotated, some split, {ON_THEM}", comparison.with_split),
    ]
    return [*ours, *((peer.tool, peer.configuration, partial(_built, peer, comparison)) for peer in peers())]


def _built(peer: Quantization, comparison: Comparison) -> nn.Module:
    return peer.build(comparison.setup)


def measured(subject: Subject, captions: int, rows: Path, only: str) -> None:
    """Write every row that is not there yet."""
    known = {(r["model"], r["tool"], r["configuration"]) for r in _read(rows, captions)}
    comparison = Comparison(subject, captions)
    versions = {peer.tool: peer for peer in peers()}
    for tool, configuration, build in todo(comparison):
        if (subject.name, tool, configuration) in known or only not in f"{tool}: {configuration}":
            continue
        try:
            row = comparison.row(tool, configuration, build)
        except ImportError:
            print(f"{tool}: {NOT_INSTALLED}", flush=True)
            continue
        version = versions[tool].version if tool in versions else ldmq_kernels.__version__
        head = {"model": subject.name, "captions": captions, "steps": subject.steps, "version": version}
        full = checkpoint_bytes(comparison.setup.unet, comparison.setup.unet)
        row |= head | {"share_of_fp16": row["bytes"] / full, "commit": machine()["commit"]}
        with rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(_line(row), flush=True)


def _read(rows: Path, captions: int) -> list[dict[str, Any]]:
    """The rows of so many captions: others' means are of other pictures."""
    found = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    return [row for row in found if row["captions"] == captions]


def _line(row: dict[str, Any]) -> list[str]:
    psnr, latent = (Spread.of(row["by_picture"][measure]) for measure in ("psnr", "latent"))
    ms = row["ms"]
    own = min(ms[OWN], ms.get(OWN_COMPILED, ms[OWN]))
    return [
        row["model"],
        f"{row['tool']} {row['version']}: {row['configuration']}" + (f" ({row['note']})" if row["note"] else ""),
        f"{row['share_of_fp16']:.3f}x",
        f"{own:.1f}",
        f"{own / ms[FLOAT]:.2f}x / {own / ms[COMPILED]:.2f}x",
        COUNT.format(row["convolutions"]),
        COUNT.format(row["linears"]),
        str(row["captions"]),
        f"{psnr.mean:.2f}",
        f"{psnr.worst_tenth:.2f}",
        f"{latent.mean:.2f}",
        row["commit"][:10],
    ]


HEAD = [
    "model",
    "tool",
    "bytes, of fp16",
    "ms",
    "of float32's, eager / compiled",
    "convolutions",
    "linears",
    "pictures",
    "PSNR, dB: mean of pictures",
    "worst tenth",
    "SQNR of the latent, dB",
    "commit",
]


def table(data: dict[str, Any]) -> str:
    """The first table of the study."""
    first = data["rows"][0]
    words = (
        f"**What the picture keeps, for how many bytes and milliseconds, by which tool** (held-out captions, "
        f"{first['steps']} steps, on {data['device']}, torch {data['torch']}; milliseconds of a call of the model for "
        f"one picture, {data['threads']} threads, and their share of the float model's in turns with it; SDNQ and "
        "torchao eager or compiled, whichever is faster; layers: weights in 8 bits / computed in 8 bits / all; a "
        "picture's PSNR and its latent's SQNR are against the float model's from the same noise). Models so small take "
        "longer to be called, layer by layer, than to be computed: [results.md](results.md) has a UNet of Stable "
        "Diffusion 1.5's size. No GPU has run the kernels."
    )
    return f"{words}\n\n" + markdown(HEAD, [_line(row) for row in _in_order(data["rows"])])


def readme_lines(data: dict[str, Any]) -> list[list[str]]:
    """Bytes and PSNR of every tool whose layers are SDNQ's, for the README."""
    rows = [row for row in data["rows"] if row["configuration"] == RIVAL or ON_THEM in row["configuration"]]
    return [
        [
            f"{line[0]} model, W8A8: {line[1]}",
            f"{line[2]} of fp16",
            f"{line[8]} dB in the mean of {line[7]}, {line[9]} dB for the worst tenth; {line[4]} of float32's "
            "time for one, eager / compiled",
        ]
        for row in _in_order(rows)
        for line in [_line(row)]
    ]


def _in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    order = {name: place for place, name in enumerate(SUBJECTS)}
    return sorted(rows, key=lambda r: (order[r["model"]], r["tool"] == OURS))


def main(arguments: list[str]) -> None:
    """Measure what is not there yet, then write the results file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks pictures", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SUBJECTS, action="append", help="which models; both, if none is given")
    parser.add_argument("--captions", type=int, default=64, help="held out, drawn once each")
    parser.add_argument("--only", default="", help="rows whose words have this in them")
    parser.add_argument("--rows", type=Path, default=ROWS, help="where rows go as they come")
    options = parser.parse_args(arguments)
    os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")  # the numbers are the same, and nothing is timed here
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    for name in options.model or SUBJECTS:
        measured(SUBJECTS[name], options.captions, options.rows, options.only)
    rows = _read(options.rows, options.captions)
    summary = {
        f"pictures/{row['model']}/{row['configuration']}/psnr_db": Spread.of(row["by_picture"]["psnr"]).mean
        for row in rows
        if row["tool"] == OURS
    }
    print(f"written: {results.keep('pictures', [{'op': 'picture', **row} for row in rows], summary)}")
