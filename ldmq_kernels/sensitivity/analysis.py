"""The whole analysis: each candidate of each layer, and each block, at the UNet's output."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldmq_kernels.calibration.calibrate import Calibration
from ldmq_kernels.calibration.ranges import range_drift, spread_steps
from ldmq_kernels.calibration.trajectory import Trajectory, denoiser
from ldmq_kernels.conversion.convert import quantize_layer
from ldmq_kernels.nn import timestep_groups
from ldmq_kernels.numerics.formats import Scheme
from ldmq_kernels.plans.blocks import block_of
from ldmq_kernels.plans.layers import fingerprint, quantizable_layers
from ldmq_kernels.sensitivity.candidates import Candidate, LayerSearch, Method
from ldmq_kernels.sensitivity.output_noise import StepNoise, output_noise, pooled, summed, swapped
from ldmq_kernels.sensitivity.probes import PROBES, chunks_of_layers, record
from ldmq_kernels.sensitivity.similarity import (
    SSIM,
    Decoder,
    float_pictures,
    middle_step,
    scored_layers,
    structural_noise,
)
from ldmq_kernels.sensitivity.work import Work

ANALYSED_STEPS = 8
ALL = "all"
AUTO = "auto"
SMALL_MODEL = 2_000_000  # parameters up to which every candidate is run on its own, and two prompts at each step
EXACT_RUNS = 24  # of a larger model, with one prompt at each step: the candidates that estimates call the noisiest

Key = tuple[str, str]


@dataclass(frozen=True)
class Analysis:
    """What every choice costs in noise.

    Attributes:
        candidates: layer -> its candidates, at most one a scheme.
        output: (layer, scheme) -> noise at the UNet's output with this layer alone quantized so.
        blocks: (block, scheme) -> noise at the output with this block alone quantized so.
        exact: the keys of `output` that were run; the others are estimated by backward probes.
        signals: other measures by name, "ssim" -> (layer, scheme) -> 1 - structural similarity.
        estimates: (layer, scheme) -> what the probes said, also of those that were run.
        decoder: draws the pictures that structural similarity was measured on, with the signal "ssim".
    """

    calibration: Calibration
    steps: list[int]
    candidates: dict[str, list[Candidate]]
    output: dict[Key, StepNoise]
    blocks: dict[Key, StepNoise]
    exact: frozenset[Key] = frozenset()
    signals: dict[str, dict[Key, float]] = field(default_factory=dict)
    estimates: dict[Key, StepNoise] = field(default_factory=dict)
    decoder: Decoder | None = None

    def drift(self) -> dict[str, float]:
        """Layer -> how many times larger its input gets than at the first step."""
        return {name: range_drift(by_step) for name, by_step in self.calibration.absmax.items()}

    def candidate(self, layer: str, scheme: str) -> Candidate | None:
        """The candidate of a layer for a scheme, if the layer can have it."""
        return next((c for c in self.candidates[layer] if str(c.scheme) == scheme), None)


def quantized_copy(name: str, layer: nn.Linear | nn.Conv2d, candidate: Candidate) -> nn.Module:
    """The layer quantized as a candidate says; the float one stays as it is."""
    return candidate.copy if candidate.copy is not None else quantize_layer(name, layer, candidate.choice)


def cross_validated_noise(
    model: nn.Module, chosen: Mapping[str, Candidate], folds: Mapping[int, Trajectory], calibration: Calibration
) -> StepNoise:
    """Noise at the output with these layers quantized, on each fold of the prompts as the other fold makes them.

    Args:
        chosen: layer -> a candidate that GPTQ does not round.
        folds: of a float trajectory of `calibration`, see `Trajectory.by_fold`.

    Raises:
        ValueError: the output is not finite, or GPTQ rounds one of the layers.
    """
    modules, found = quantizable_layers(model), []
    for fold, trajectory in folds.items():
        copies = {name: quantize_layer(name, modules[name], c.judged_on(fold)) for name, c in chosen.items()}
        with swapped(model, copies), timestep_groups.following(model, calibration.timestep_groups):
            found.append(output_noise(model, trajectory, guidance_scale=calibration.settings.guidance_scale))
    return pooled(found)


class _Bench:
    """The float model, the analysed part of its trajectory, and runs along it with some layers quantized."""

    def __init__(self, pipe: Any, calibration: Calibration, steps: list[int], prompts: int | None) -> None:
        self.pipe, self.model, self.calibration = pipe, denoiser(pipe), calibration
        self.modules = quantizable_layers(self.model)
        self.trajectory = analysed_part(calibration.trajectory, steps, prompts)
        self.folds = self.trajectory.by_fold()

    @contextlib.contextmanager
    def quantized(self, copies: Mapping[str, nn.Module]) -> Iterator[None]:
        """The model with these layers in place of its own, inside this block."""
        with swapped(self.model, copies), timestep_groups.following(self.model, self.calibration.timestep_groups):
            yield

    def noise_of(self, chosen: dict[str, Candidate]) -> StepNoise:
        """Noise at the UNet's output with these layers quantized, cross-validated over the folds of the prompts."""
        return cross_validated_noise(self.model, chosen, self.folds, self.calibration)


def analysed_part(trajectory: Trajectory, steps: Sequence[int], prompts: int | None) -> Trajectory:
    """The calls of some steps, each with `prompts` of its prompts: others at each step, in turn; None takes all."""
    part = trajectory.at_steps(steps)
    if prompts is None:
        return part
    drawn = sorted({prompt for call in part.calls for prompt in call.prompts})
    calls = []
    for place, step in enumerate(sorted({call.step for call in part.calls})):
        wanted = {drawn[(place * prompts + i) % len(drawn)] for i in range(min(prompts, len(drawn)))}
        calls += [
            call.of_prompts(sorted(wanted & set(call.prompts)))
            for call in part.calls
            if call.step == step and wanted & set(call.prompts)
        ]
    return replace(part, calls=calls)


def _search(bench: _Bench, schemes: list[Scheme], method: Method, probes: int, work: Work, show: bool) -> Any:
    def search(names: list[str]) -> Iterator[tuple[str, list[Candidate]]]:
        for chunk in chunks_of_layers(bench.model, bench.trajectory, names, probes):
            seen = record(bench.model, bench.trajectory, chunk, probes)
            for name in chunk:
                layer_search = LayerSearch(name, bench.modules[name], seen.pop(name), bench.calibration, method)
                yield name, layer_search.candidates(schemes)

    names = list(bench.calibration.absmax)
    return work.run("noise of each layer", names, search, show=show)


def _exact_keys(estimates: dict[Key, StepNoise], candidates: dict[str, list[Candidate]], exact: str | int) -> list[Key]:
    """What is run alone: not what GPTQ rounds, which on the samples that it was rounded for has too little noise."""
    everything = [(name, str(c.scheme)) for name, found in candidates.items() for c in found if c.copy is None]
    if exact == ALL:
        return everything
    estimated = [key for key in everything if key in estimates]
    noisiest = sorted(estimated, key=lambda key: -estimates[key].mean_power)[: int(exact)]
    unknown = [key for key in everything if key not in estimates]
    return list(dict.fromkeys([*unknown, *noisiest]))


def _run_each(
    bench: _Bench, stage: str, sets: dict[str, dict[str, Candidate]], work: Work, show: bool
) -> dict[str, StepNoise]:
    def run(items: list[str]) -> Iterator[tuple[str, StepNoise]]:
        for item in items:
            yield item, bench.noise_of(sets[item])

    return work.run(stage, list(sets), run, show=show)


def _similarity(
    bench: _Bench, decoder: Decoder, candidates: dict[str, list[Candidate]], work: Work, show: bool
) -> dict[Key, float]:
    trajectory = middle_step(bench.trajectory)
    pictures = float_pictures(trajectory, decoder)
    sets = {f"{name} {c.scheme}": (name, c) for name in scored_layers(candidates) for c in candidates[name]}

    def run(items: list[str]) -> Iterator[tuple[str, float]]:
        for item in items:
            name, candidate = sets[item]
            with bench.quantized({name: quantized_copy(name, bench.modules[name], candidate)}):
                yield item, structural_noise(bench.model, trajectory, decoder, pictures)

    found = work.run("similarity of pictures", list(sets), run, show=show)
    return {(sets[item][0], str(sets[item][1].scheme)): value for item, value in found.items()}


def _settings(calibration: Calibration, model: nn.Module, **others: Any) -> dict[str, Any]:
    return {
        "model": fingerprint(model),
        "mode": calibration.mode,
        "prompts": list(calibration.prompts),
        **asdict(calibration.settings),
        **others,
    }


@torch.no_grad()
def analyze(
    pipe: Any,
    calibration: Calibration,
    schemes: Sequence[Scheme],
    *,
    analysed_steps: int = ANALYSED_STEPS,
    analysed_prompts: int | str | None = AUTO,
    exact: str | int = AUTO,
    signals: Sequence[str] = ("sqnr",),
    method: Method | None = None,
    work_dir: Path | None = None,
    show: bool = False,
) -> Analysis:
    """Measure SQNR at the UNet's output for every layer and every block, in each scheme.

    Args:
        pipe: the pipeline that was calibrated, still in full precision.
        schemes: what to try; the float scheme needs no trial.
        analysed_steps: how many sampling steps, spread over the trajectory, each trial is run on.
        analysed_prompts: how many prompts at each of them, others in turn; None takes all, "auto" two of a small
            model and one of a large one.
        exact: "all" runs the UNet for every candidate of every layer, a number for so many that the backward
            probes estimate to be the noisiest, "auto" for all of a small model and 24 of a large one.
        signals: "sqnr", and "ssim" for the structural similarity of pictures.
        method: parts of the search of each layer; None makes all.
        work_dir: keeps results, so that the same call goes on after a kill.

    Raises:
        ValueError: an unknown signal or `exact`, or an output that is not finite.
        WorkError: the folder holds work of other settings.
    """
    if unknown := set(signals) - {"sqnr", SSIM}:
        raise ValueError(f"unknown signal {sorted(unknown)[0]!r}: choose among sqnr and ssim")
    method = method or Method()
    trials = [scheme for scheme in schemes if scheme.quantizes]
    steps = spread_steps(calibration.trajectory.steps, analysed_steps)
    small = sum(p.numel() for p in denoiser(pipe).parameters()) <= SMALL_MODEL
    if exact == AUTO:
        exact = ALL if small else EXACT_RUNS
    if exact != ALL and not isinstance(exact, int):
        raise ValueError(f"exact is {exact!r}: choose 'all', 'auto' or a number of runs")
    if analysed_prompts == AUTO:
        analysed_prompts = 2 if small else 1
    if isinstance(analysed_prompts, str):
        raise ValueError(f"analysed_prompts is {analysed_prompts!r}: choose 'auto', a number, or None for all")
    bench = _Bench(pipe, calibration, steps, analysed_prompts)
    settings = _settings(
        calibration,
        bench.model,
        schemes=[str(s) for s in trials],
        steps=steps,
        analysed_prompts=analysed_prompts,
        method=asdict(method),
    )
    work = Work(work_dir, settings)
    candidates = _search(bench, trials, method, PROBES, work, show)
    estimates = {
        (name, str(c.scheme)): c.estimate for name, found in candidates.items() for c in found if c.estimate is not None
    }
    keys = _exact_keys(estimates, candidates, exact)
    chosen = {(name, str(c.scheme)): {name: c} for name, found in candidates.items() for c in found}
    measured = _run_each(bench, "SQNR of each layer", {" ".join(key): chosen[key] for key in keys}, work, show)
    output = estimates | {key: measured[" ".join(key)] for key in keys}
    output = {key: output[key] for key in chosen}
    blocks = _blocks(bench, chosen, output, exact, work, show)
    decoder, similarity = None, {}
    if SSIM in signals:
        decoder = Decoder(pipe, calibration.settings.guidance_scale)
        similarity = {SSIM: _similarity(bench, decoder, candidates, work, show)}
    return Analysis(calibration, steps, candidates, output, blocks, frozenset(keys), similarity, estimates, decoder)


def _blocks(
    bench: _Bench,
    chosen: dict[Key, dict[str, Candidate]],
    output: dict[Key, StepNoise],
    exact: str | int,
    work: Work,
    show: bool,
) -> dict[Key, StepNoise]:
    """Each block's noise: run where every layer is and none is rounded by GPTQ, else the sum of its layers'."""
    members: dict[Key, dict[str, Candidate]] = {}
    for (name, scheme), candidate in chosen.items():
        members.setdefault((block_of(bench.model, name), scheme), {}).update(candidate)
    summed_up = {key: summed(output[name, key[1]] for name in layers) for key, layers in members.items()}
    if exact != ALL:
        return summed_up
    plain = {" ".join(key): m for key, m in members.items() if all(c.copy is None for c in m.values())}
    runs = _run_each(bench, "SQNR of each block", plain, work, show)
    return {key: runs.get(" ".join(key), total) for key, total in summed_up.items()}
