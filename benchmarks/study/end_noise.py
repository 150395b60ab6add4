"""How well noise at the end of the trajectory is known before it is drawn: python -m benchmarks ends --model second

Every layer in every scheme, or some of them drawn at random, is quantized alone, and pictures are drawn by the
pipeline's own call; its noise in the final latents and in the pictures stands beside what the adjoint of the sampler
predicted, with as many probes as plans are made with, and beside the noise at the model's output, averaged over steps.
The probes are random, so there are several sets of them. What GPTQ rounds is left out, since it knows the
calibration's own samples. Each picture is drawn with what the other half of the prompts makes of the layer, as
candidates are judged.

Sizes are means over pictures of decibels, as those of plans are: noise that is pooled is that of one or two pictures,
which a few probes in each know badly.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy import special, stats
from torch import Tensor, nn

from benchmarks.harness import results
from benchmarks.harness.machine import device
from benchmarks.harness.tables import markdown
from benchmarks.study.subjects import DEMO, SUBJECTS, Subject
from ldmq_kernels.calibration.adjoint import LATENT, PICTURE, CallWeights, EndCall, EndTrajectory, sampler_adjoint
from ldmq_kernels.calibration.calibrate import Calibration, calibrate
from ldmq_kernels.calibration.decoding import decoded
from ldmq_kernels.calibration.denoisers import denoiser
from ldmq_kernels.calibration.drawings import draw
from ldmq_kernels.calibration.probes import PROBES, EndRecord, chunks_of_layers, end_records, record
from ldmq_kernels.calibration.ranges import spread_steps
from ldmq_kernels.calibration.settings import SamplingSettings
from ldmq_kernels.conversion.convert import quantize_layer
from ldmq_kernels.demo.run import CALIBRATION_PROMPTS, calibration_captions
from ldmq_kernels.nn import timestep_groups
from ldmq_kernels.nn.kinds import kind_of
from ldmq_kernels.numerics.formats import parse_schemes
from ldmq_kernels.planning.request import split_calls
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.sensitivity.analysis import ANALYSED_STEPS
from ldmq_kernels.sensitivity.candidates import LayerCandidate, LayerSearch, Method
from ldmq_kernels.sensitivity.end_noise import EndNoise, LayerEndNoise
from ldmq_kernels.sensitivity.ends import PROBES as END_PROBES
from ldmq_kernels.sensitivity.output_noise import swapped

SCHEMES = ("w8a8-static", "w8a8-timestep", "w8a8-dynamic", "w8a8x2", "w8a8-rotated", "w8a16", "w4a8-dynamic", "w4a16")
ENDS = (LATENT, PICTURE)
WHAT = "ends"
ADJOINT, OUTPUT = "adjoint", "model output"


class _ByFold(nn.Module):
    """Each row of a batch by the layer that judges its prompt; rows are prompts in turn."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        parts = [layer(x[fold::2]) for fold, layer in enumerate(self.layers)]
        return torch.stack(parts, 1).flatten(0, 1)


@dataclass(frozen=True)
class _Setup:
    pipe: Any
    calibration: Calibration
    pictures: Tensor

    def effects(self, name: str, candidate: LayerCandidate) -> dict[str, list[float]]:
        """The relative noise in each latent, and the mean squared error of each picture, drawn with one layer."""
        layer = quantizable_layers(denoiser(self.pipe))[name]
        judges = _ByFold([quantize_layer(name, layer, candidate.judged_on(fold)) for fold in (0, 1)])
        model, calibration = denoiser(self.pipe), self.calibration
        with swapped(model, {name: judges}), timestep_groups.following(model, calibration.timestep_groups):
            latents = draw(self.pipe, calibration.calls, calibration.settings, "latent")[0]
        exact = calibration.trajectory.latents.double()
        off = {LATENT: (latents - exact).double(), PICTURE: (decoded(self.pipe.vae, latents) - self.pictures).double()}
        power = exact.square().flatten(1).sum(1)
        return {
            LATENT: (off[LATENT].square().flatten(1).sum(1) / power).tolist(),
            PICTURE: off[PICTURE].square().flatten(1).mean(1).tolist(),
        }


def mean_db(noise: Sequence[float]) -> float:
    """The mean over pictures of noise in dB."""
    return float(np.mean(10 * np.log10(noise)))


def pooled_db(noise: Sequence[float]) -> float:
    """The mean over pictures of noise, in dB."""
    return float(10 * np.log10(np.mean(noise)))


def estimated_db(noise: Sequence[float], probes: int) -> float:
    """The same of estimates by probes, without what the logarithm of a mean of so many squares is short of on average.

    A probe's amplitude is a sum of many random signs, so that its square is nearly of the chi-squared distribution.
    """
    return mean_db(noise) - 10 / np.log(10) * float(special.digamma(probes / 2) - np.log(probes / 2))


def _set(ends: EndTrajectory, probes: int, place: int) -> tuple[EndTrajectory, list[int]]:
    """One of several sets of probes, and where its probes are among all."""
    kept = [end * ends.probes + place * probes + i for end in range(len(ends.ends)) for i in range(probes)]
    calls = [EndCall(c.call, c.adjoints[kept], _weights(c.weights, kept)) for c in ends.calls]
    return replace(ends, calls=calls, probes=probes), kept


def _weights(weights: CallWeights, kept: list[int]) -> CallWeights:
    return CallWeights(weights.amplitude[kept], weights.power[kept])


def _of_set(record: EndRecord, kept: list[int]) -> EndRecord:
    gradients = None if record.gradients is None else record.gradients[kept]
    return replace(record, gradients=gradients, weights=_weights(record.weights, kept))


def _estimates(
    setup: _Setup, ends: EndTrajectory, probes: int, pairs: Sequence[tuple[str, str]]
) -> Iterator[tuple[str, LayerCandidate, list[EndNoise]]]:
    """Layers with their candidates, and noise at the end by each set of probes."""
    model, calibration = denoiser(setup.pipe), setup.calibration
    trajectory = calibration.trajectory.at_steps(spread_steps(calibration.trajectory.steps, ANALYSED_STEPS))
    sets = [_set(ends, probes, place) for place in range(ends.probes // probes)]
    layers, found, sums = quantizable_layers(model), {}, {}
    for chunk in chunks_of_layers(model, trajectory.calls, PROBES, list(dict.fromkeys(name for name, _ in pairs))):
        records = record(model, trajectory, chunk)
        for name in chunk:
            search = LayerSearch(name, layers[name], records.pop(name), calibration, Method(gptq=False))
            wanted = [scheme for layer_name, scheme in pairs if layer_name == name]
            found[name] = search.candidates(parse_schemes(wanted))
            sums[name] = [LayerEndNoise(part, search.judges) for part, _ in sets]
    for chunk in chunks_of_layers(model, [ends.calls[0].call], len(ENDS) * ends.probes, list(found)):
        for name, of_call in end_records(model, ends, chunk):
            for total, (_, kept) in zip(sums[name], sets, strict=True):
                total.add(_of_set(of_call, kept))
    for name, candidates in found.items():
        noises = [total.noise() for total in sums[name]]
        yield from ((name, candidate, [n[str(candidate.scheme)] for n in noises]) for candidate in candidates)


def agreement(true: Sequence[float], predicted: Sequence[float]) -> dict[str, float]:
    """Rank correlation, and by how many dB predictions are too high: the median of sizes, and percentiles."""
    off = np.array(predicted) - np.array(true)
    return {
        "spearman": float(stats.spearmanr(true, predicted).statistic),
        "median_size_db": float(np.median(np.abs(off))),
        "median_db": float(np.median(off)),
        "p10_db": float(np.percentile(off, 10)),
        "p90_db": float(np.percentile(off, 90)),
    }


def _pairs(pipe: Any, calibration: Calibration, count: int | None) -> list[tuple[str, str]]:
    """So many layers of each scheme, drawn at random; all if None."""
    layers, random = quantizable_layers(denoiser(pipe)), np.random.default_rng(0)
    names = [n for n in calibration.absmax if getattr(layers[n], "groups", 1) == 1]
    return [
        (str(name), scheme)
        for scheme in SCHEMES
        for name in (names if count is None else random.choice(names, count, replace=False))
        if kind_of(layers[str(name)]) in parse_schemes([scheme])[0].format.layers
    ]


def measured(
    subject: Subject, pipe: Any, guidance: float, count: int | None, probes: int, sets: int
) -> Iterator[dict[str, Any]]:
    """One row a layer and scheme, then one for each end, signal and set of probes."""
    prompts, _ = split_calls(calibration_captions(CALIBRATION_PROMPTS))
    settings = SamplingSettings(subject.steps, guidance, 0)
    calibration = calibrate(pipe, prompts, settings)
    with torch.no_grad():
        setup = _Setup(pipe, calibration, decoded(pipe.vae, calibration.trajectory.latents))
    ends = sampler_adjoint(
        pipe, calibration.trajectory, prompts, settings, range(len(prompts)), ends=ENDS, probes=sets * probes
    )
    rows = []
    for name, candidate, noises in _estimates(setup, ends, probes, _pairs(pipe, calibration, count)):
        assert candidate.estimate is not None
        with torch.no_grad():
            true = setup.effects(name, candidate)
        if min(min(of_end) for of_end in true.values()) == 0:
            continue  # what a model of joint blocks makes of its text in the last one is never used
        estimates = [{end: list(noise.by_picture[end].values()) for end in ENDS} for noise in noises]
        row = {"op": "layer", "guidance": guidance, "layer": name, "scheme": str(candidate.scheme)}
        row |= {"true": {end: mean_db(of_end) for end, of_end in true.items()}}
        row |= {"true, pooled": {end: pooled_db(of_end) for end, of_end in true.items()}}
        row |= {ADJOINT: [{end: estimated_db(found, probes) for end, found in e.items()} for e in estimates]}
        row |= {f"{ADJOINT}, pooled": [{end: pooled_db(found) for end, found in e.items()} for e in estimates]}
        rows.append(row | {OUTPUT: 10 * np.log10(candidate.estimate.mean_power)})
        yield rows[-1]
    for end in ENDS:
        true = [row["true"][end] for row in rows]
        shared = {"op": "agreement", "guidance": guidance, "end": end, "pairs": len(rows), "all": count is None}
        shared |= {"probes": probes, "schemes": list(dict.fromkeys(row["scheme"] for row in rows))}
        yield shared | {"signal": OUTPUT} | agreement(true, [row[OUTPUT] for row in rows])
        for place in range(sets):
            found = agreement(true, [row[ADJOINT][place][end] for row in rows])
            off = [row[f"{ADJOINT}, pooled"][place][end] - row["true, pooled"][end] for row in rows]
            found["pooled_size_db"] = float(np.median(np.abs(off)))
            yield shared | {"signal": ADJOINT, "set": place} | found


def table(data: dict[str, Any]) -> str:
    """Rank correlations and sizes of each signal, for the pages."""
    groups: dict[tuple[float, str, str], list[dict[str, Any]]] = {}
    for row in data["rows"]:
        if row["op"] == "agreement":
            groups.setdefault((row["guidance"], row["end"], row["signal"]), []).append(row)
    lines = []
    for (guidance, end, signal), rows in groups.items():
        size = ["", "", ""]
        if signal != OUTPUT:
            size = [
                ", ".join(f"{row['median_size_db']:.2f}" for row in rows),
                ", ".join(f"{row['median_db']:+.1f} ({row['p10_db']:+.1f} to {row['p90_db']:+.1f})" for row in rows),
                ", ".join(f"{row['pooled_size_db']:.2f}" for row in rows if "pooled_size_db" in row),
            ]
        lines.append([f"{guidance:g}", end, signal, ", ".join(f"{row['spearman']:.3f}" for row in rows), *size])
    count, probes = (max(row[key] for rows in groups.values() for row in rows) for key in ("pairs", "probes"))
    last = data["rows"][-1]
    drawn = f"all {count} layers and schemes" if last["all"] else f"{count} layers and schemes at random"
    words = (
        f"**What is known of a layer's noise at the end** (the {last['model']} model, {drawn}, each alone: "
        f"{', '.join(last['schemes'])}; noise in the final latents and the pictures, drawn and predicted; each set "
        f"of {probes} probes apart; sizes are means over pictures of dB, as those of plans are; noise pooled over "
        "pictures is that of one or two of them, and known less well)"
    )
    head = ["guidance", "end", "signal", "rank correlation", "dB off, median", "dB too high, median (10th to 90th %)"]
    return f"{words}\n\n" + markdown([*head, "pooled: dB off, median"], lines)


def results_of(subject: Subject) -> str:
    """The kind of the results file of a model."""
    return WHAT if subject.name == DEMO else f"{WHAT}_{subject.name}"


def main(arguments: list[str]) -> None:
    """Measure and write the results file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks ends", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(SUBJECTS), default=DEMO)
    parser.add_argument("--layers", type=int, help="drawn for each scheme; all by default")
    parser.add_argument("--guidance", type=float, nargs="+", help="the model's own and 7.5 by default")
    parser.add_argument("--probes", type=int, default=END_PROBES, help="of a set, at each end")
    parser.add_argument("--sets", type=int, default=3, help="of probes")
    options = parser.parse_args(arguments)
    subject = SUBJECTS[options.model]
    results.check_keep(results_of(subject))
    dtype = torch.float16 if device().type == "cuda" else torch.float32
    pipe = subject.load(dtype).to(device())
    pipe.set_progress_bar_config(disable=True)
    rows = []
    for guidance in options.guidance or [subject.guidance_scale, 7.5]:
        for row in measured(subject, pipe, guidance, options.layers, options.probes, options.sets):
            rows.append(row | {"model": subject.name})
            print(rows[-1], flush=True)
    found = [row for row in rows if row["op"] == "agreement" and row["signal"] == ADJOINT]
    summary = {
        f"{results_of(subject)}/least_spearman": min(row["spearman"] for row in found),
        f"{results_of(subject)}/largest_median_size_db": max(row["median_size_db"] for row in found),
    }
    print(f"written: {results.keep(results_of(subject), rows, summary)}")
