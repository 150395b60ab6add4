"""How well noise at the end of the trajectory is known before it is drawn: python -m benchmarks ends

Layers and schemes of the demo model are drawn at random. Each is quantized alone and pictures are drawn by the
pipeline's own call; its noise in the final latents and in the pictures stands beside what the adjoint of the sampler
predicted, with all steps and with some, and beside the noise at the UNet's output, averaged over steps. What GPTQ
rounds is left out, since it knows the calibration's own samples. Each picture is drawn with what the other half of the
prompts makes of the layer, as candidates are judged.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from benchmarks.harness import results
from benchmarks.harness.machine import device
from benchmarks.harness.tables import markdown
from ldmq_kernels import demo
from ldmq_kernels.calibration.calibrate import Calibration, calibrate
from ldmq_kernels.calibration.denoisers import denoiser
from ldmq_kernels.calibration.drawings import draw
from ldmq_kernels.calibration.ranges import spread_steps
from ldmq_kernels.calibration.settings import SamplingSettings
from ldmq_kernels.conversion.convert import quantize_layer
from ldmq_kernels.demo.run import CALIBRATION_PROMPTS, GUIDANCE, STEPS, calibration_captions
from ldmq_kernels.nn import timestep_groups
from ldmq_kernels.nn.kinds import kind_of
from ldmq_kernels.numerics.formats import parse_schemes
from ldmq_kernels.planning.request import split_calls
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.sensitivity.adjoint import LATENT, PICTURE, EndTrajectory, sampler_adjoint
from ldmq_kernels.sensitivity.analysis import ANALYSED_STEPS
from ldmq_kernels.sensitivity.candidates import LayerCandidate, LayerSearch, Method
from ldmq_kernels.sensitivity.decoding import decoded
from ldmq_kernels.sensitivity.end_noise import EndNoise, end_noise
from ldmq_kernels.sensitivity.output_noise import swapped
from ldmq_kernels.sensitivity.probes import PROBES, chunks_of_layers, record, record_ends

SCHEMES = ("w8a8-static", "w8a8-timestep", "w8a8-dynamic", "w8a16", "w4a8-dynamic")
ENDS = (LATENT, PICTURE)
SIGNALS = ("all steps", "some steps", "UNet output")


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

    def effects(self, name: str, candidate: LayerCandidate) -> dict[str, float]:
        """The noise in latents, pooled and relative, and the mean squared error of pictures, drawn with one layer."""
        layer = quantizable_layers(denoiser(self.pipe))[name]
        judges = _ByFold([quantize_layer(name, layer, candidate.judged_on(fold)) for fold in (0, 1)])
        model, calibration = denoiser(self.pipe), self.calibration
        with swapped(model, {name: judges}), timestep_groups.following(model, calibration.timestep_groups):
            latents = draw(self.pipe, calibration.calls, calibration.settings, "latent")[0]
        exact = calibration.trajectory.latents
        pictures = decoded(self.pipe.vae, latents)
        return {
            LATENT: float((latents - exact).double().square().sum() / exact.double().square().sum()),
            PICTURE: float((pictures - self.pictures).double().square().mean()),
        }

    def predicted(self, noise: EndNoise) -> dict[str, float]:
        """The same of an estimate."""
        power = self.calibration.trajectory.latents.double().square().flatten(1).sum(1)
        relative = torch.tensor([noise.by_picture[LATENT][i] for i in range(len(power))], dtype=torch.float64)
        return {LATENT: float((relative * power).sum() / power.sum()), PICTURE: noise.mean(PICTURE)}


def _estimates(
    setup: _Setup, ends: EndTrajectory, some: EndTrajectory, pairs: Sequence[tuple[str, str]]
) -> Iterator[tuple[str, LayerCandidate, EndNoise]]:
    """Layers with their candidates, and noise at the end by some steps alone."""
    model, calibration = denoiser(setup.pipe), setup.calibration
    trajectory = calibration.trajectory.at_steps(list(some.step_weights))
    replays = [(trajectory.calls, PROBES), ([of_call.call for of_call in ends.calls], len(ENDS) * ends.probes)]
    for chunk in chunks_of_layers(model, replays, list(dict.fromkeys(name for name, _ in pairs))):
        records, end_records = record(model, trajectory, chunk), record_ends(model, ends, chunk)
        for name in chunk:
            layer, of_layer = quantizable_layers(model)[name], end_records.pop(name)
            search = LayerSearch(name, layer, records.pop(name), calibration, Method(gptq=False), ends, of_layer)
            wanted = [scheme for layer_name, scheme in pairs if layer_name == name]
            found = search.candidates(parse_schemes(wanted))
            kept = [one for one in of_layer if one.step in some.step_weights]
            by_some = end_noise(layer, kept, some, search.judges)
            yield from ((name, candidate, by_some[str(candidate.scheme)]) for candidate in found)


def agreement(true: Sequence[float], predicted: Sequence[float]) -> dict[str, float]:
    """Rank correlation, and by how many dB predictions are too high: the median of sizes, and percentiles."""
    off = 10 * np.log10(np.array(predicted) / np.array(true))
    return {
        "spearman": float(stats.spearmanr(true, predicted).statistic),
        "median_size_db": float(np.median(np.abs(off))),
        "median_db": float(np.median(off)),
        "p10_db": float(np.percentile(off, 10)),
        "p90_db": float(np.percentile(off, 90)),
    }


def measured(pipe: Any, guidance: float, count: int, probes: int) -> list[dict[str, Any]]:
    """One row a layer and scheme, then one for each signal and end."""
    prompts, _ = split_calls(calibration_captions(CALIBRATION_PROMPTS))
    settings = SamplingSettings(STEPS, guidance, 0)
    calibration = calibrate(pipe, prompts, settings)
    with torch.no_grad():
        setup = _Setup(pipe, calibration, decoded(pipe.vae, calibration.trajectory.latents))
    began = time.perf_counter()
    ends = sampler_adjoint(
        pipe, calibration.trajectory, prompts, settings, range(len(prompts)), ends=ENDS, probes=probes
    )
    seconds = time.perf_counter() - began
    some = ends.at_steps(spread_steps(STEPS, ANALYSED_STEPS))
    layers, random = quantizable_layers(denoiser(pipe)), np.random.default_rng(0)
    names = [n for n in calibration.absmax if getattr(layers[n], "groups", 1) == 1]
    pairs = [
        (str(name), scheme)
        for scheme in SCHEMES
        for name in random.choice(names, count, replace=False)
        if kind_of(layers[str(name)]) in parse_schemes([scheme])[0].format.layers
    ]
    rows = []
    for name, candidate, by_some in _estimates(setup, ends, some, pairs):
        assert candidate.end is not None
        assert candidate.estimate is not None
        with torch.no_grad():
            row = {
                "op": "layer",
                "guidance": guidance,
                "layer": name,
                "scheme": str(candidate.scheme),
                "true": setup.effects(name, candidate),
                "all steps": setup.predicted(candidate.end),
                "some steps": setup.predicted(by_some),
                "UNet output": dict.fromkeys(ENDS, candidate.estimate.mean_power),
            }
        rows.append(row)
        print(row, flush=True)
    summary = [
        {"op": "agreement", "guidance": guidance, "end": end, "signal": signal, "pairs": len(rows), "seconds": seconds}
        | agreement([row["true"][end] for row in rows], [row[signal][end] for row in rows])
        for end in ENDS
        for signal in SIGNALS
    ]
    return [*rows, *summary]


def table(data: dict[str, Any]) -> str:
    """Rank correlations and sizes of each signal, for the pages."""
    lines = []
    for row in data["rows"]:
        if row["op"] != "agreement":
            continue
        size = f"{row['median_db']:+.1f} ({row['p10_db']:+.1f} to {row['p90_db']:+.1f})"
        if row["signal"] == "UNet output":
            size = ""
        lines.append([f"{row['guidance']:g}", row["end"], row["signal"], f"{row['spearman']:.3f}", size])
    count = max(row["pairs"] for row in data["rows"] if row["op"] == "agreement")
    words = (
        f"**What is known of a layer's noise at the end** (the demo model, {count} layers and schemes drawn at random, "
        "each alone; noise in the final latents and the pictures, drawn and predicted)"
    )
    return f"{words}\n\n" + markdown(["guidance", "end", "signal", "rank correlation", "dB too high"], lines)


def main(arguments: list[str]) -> None:
    """Measure and write the results file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks ends", description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12, help="drawn for each of five schemes")
    parser.add_argument("--guidance", type=float, nargs="+", default=[GUIDANCE, 7.5])
    parser.add_argument("--probes", type=int, default=4, help="at each end")
    options = parser.parse_args(arguments)
    dtype = torch.float16 if device().type == "cuda" else torch.float32
    pipe = demo.load_demo_pipeline(dtype, demo.WEIGHTS).to(device())
    rows = [row for guidance in options.guidance for row in measured(pipe, guidance, options.layers, options.probes)]
    found = [row for row in rows if row["op"] == "agreement" and row["signal"] == "all steps"]
    summary = {
        "ends/least_spearman": min(row["spearman"] for row in found),
        "ends/largest_median_size_db": max(row["median_size_db"] for row in found),
    }
    print(f"written: {results.keep('ends', rows, summary)}")
